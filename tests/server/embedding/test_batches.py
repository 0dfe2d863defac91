"""`embedding.batches`: every text once, little padding."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from text_generation_server.embedding.batches import FEW_TOKENS, MAX_PADDING, group_by_length


def test_texts_of_one_length_are_computed_together_up_to_the_limit() -> None:
    assert group_by_length([8] * 5, max_tokens=24) == [[0, 1, 2], [3, 4]]


def test_a_text_longer_than_the_limit_is_alone() -> None:
    assert group_by_length([3000, 2, 2500], max_tokens=2048) == [[0], [2], [1]]


def test_short_texts_are_not_padded_to_long_ones() -> None:
    assert group_by_length([200, 10, 199, 10], max_tokens=512) == [[0, 2], [1, 3]]


@given(lengths=st.lists(st.integers(1, 700), max_size=200), max_tokens=st.integers(1, 4096))
def test_groups(lengths: list[int], max_tokens: int) -> None:
    groups = group_by_length(lengths, max_tokens)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        padded = len(group) * max(lengths[index] for index in group)
        padding = padded - sum(lengths[index] for index in group)
        assert len(group) == 1 or padded <= max_tokens
        assert padded <= FEW_TOKENS or padding <= MAX_PADDING * padded
