"""`bench.fidelity`: where two streams part."""

import pytest
from bench.fidelity import equal_prefix


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        pytest.param([1, 2, 3], [1, 2, 3], 3, id="equal"),
        pytest.param([1, 2, 3], [1, 9, 3], 1, id="parted and met again"),
        pytest.param([1, 2], [1, 2, 3], 2, id="one is longer"),
        pytest.param([], [], 0, id="nothing"),
    ],
)
def test_equal_prefix(one: list[int], other: list[int], expected: int) -> None:
    assert equal_prefix(one, other) == expected
