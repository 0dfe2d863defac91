"""Who owns which block of KV cache. The shard holds the tensors; only the router hands blocks out."""

from __future__ import annotations

from collections.abc import Iterable


class BlockAllocator:
    """Hands out block ids 1 .. ``num_blocks``; block 0 is the shard's padding and never leaves.

    Freed blocks are reused last-in first-out: the block written most recently is the likeliest to be in a CPU cache.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"need at least one block of at least one token, got {num_blocks} of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks, 0, -1))
        self._is_free = bytearray([0]) + bytearray([1]) * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int] | None:
        """``count`` blocks, or None when there are not that many; never a part of them."""
        if count > len(self._free):
            return None
        if count == 0:
            return []
        blocks = self._free[: -count - 1 : -1]
        del self._free[-count:]
        for block in blocks:
            self._is_free[block] = 0
        return blocks

    def free(self, blocks: Iterable[int]) -> None:
        """Take blocks back. Raises: ValueError for a block that is not out, which would give it two owners later."""
        for block in blocks:
            if not 0 < block <= self.num_blocks or self._is_free[block]:
                raise ValueError(f"block {block} is not allocated")
            self._is_free[block] = 1
            self._free.append(block)
