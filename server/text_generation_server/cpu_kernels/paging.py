"""What kernels share that read and write the paged cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from text_generation_server.cpu_kernels.language import LANES, Pointer, Value


def padded_tables(block_tables: Sequence[list[int]], longest: int, block_size: int) -> Tensor:
    """Block ids that cover the ``longest`` tokens of a row, int64 [R, B]; unused columns are 0."""
    tables_RB = np.zeros((len(block_tables), -(-longest // block_size)), dtype=np.int64)
    for row, table in enumerate(block_tables):
        used = table[: tables_RB.shape[1]]
        tables_RB[row, : len(used)] = used
    return torch.from_numpy(tables_RB)


def first_slot(table: Pointer, tile: Value, block_size: int) -> Value:
    """Where the 16 tokens of a tile, counted from the sequence's first, begin in the cache."""
    tiles_per_block = block_size // LANES
    return (table[tile // tiles_per_block] * tiles_per_block + tile % tiles_per_block) * LANES


def copy(source: Pointer, target: Pointer, width: int) -> None:
    """One token's keys or values, to or from its slot."""
    for place in range(0, width, LANES):
        target.put(place, source.vector(place))
