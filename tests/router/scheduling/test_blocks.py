from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_generation_router.scheduling.blocks import BlockAllocator


def test_block_zero_is_never_handed_out() -> None:
    assert sorted(BlockAllocator(4, 16).allocate(4) or []) == [1, 2, 3, 4]


def test_a_request_for_too_many_takes_none() -> None:
    blocks = BlockAllocator(4, 16)
    assert blocks.allocate(5) is None
    assert blocks.num_free == 4


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_blocks_for_tokens(tokens: int, blocks: int) -> None:
    assert BlockAllocator(4, 16).blocks_for(tokens) == blocks


@pytest.mark.parametrize("block", [0, -1, 5, 2])
def test_a_block_that_is_not_out_cannot_come_back(block: int) -> None:
    blocks = BlockAllocator(4, 16)
    with pytest.raises(ValueError, match="is not allocated"):
        blocks.free([block])


@given(st.lists(st.integers(0, 9), max_size=200), st.randoms(use_true_random=False))
def test_no_block_has_two_owners_and_none_is_lost(sizes: list[int], random) -> None:  # type: ignore[no-untyped-def]
    blocks = BlockAllocator(20, 16)
    owned: list[list[int]] = []
    for size in sizes:
        taken = blocks.allocate(size)
        if taken is None:
            blocks.free(owned.pop(random.randrange(len(owned))))
        else:
            owned.append(taken)
        out = [block for taken in owned for block in taken]
        assert len(out) == len(set(out)) == blocks.num_used
        assert blocks.num_free + blocks.num_used == 20
