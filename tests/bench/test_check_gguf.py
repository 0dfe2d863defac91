"""`bench.check_gguf`: where two streams part."""

import pytest
from bench.check_gguf import common_start


@pytest.mark.parametrize(
    ("one", "other", "length"),
    [
        pytest.param([1, 2, 3], [1, 2, 3], 3, id="equal"),
        pytest.param([1, 2, 3], [1, 9, 3], 1, id="what agrees again later does not count"),
        pytest.param([1, 2, 3], [1, 2], 2, id="one is shorter"),
        pytest.param([], [1], 0, id="empty"),
    ],
)
def test_common_start(one: list[int], other: list[int], length: int) -> None:
    assert common_start(one, other) == length
