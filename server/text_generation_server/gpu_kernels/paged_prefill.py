"""Attention of prompt chunks over the paged cache, into which the chunk's own keys and values have been written.

A unit of work is some consecutive queries of one chunk with all heads of a query group: they are the rows of the
matrix products, and share the keys that are read. Keys are taken in tiles that begin at multiples of their size: a tile
from which a query sees nothing leaves its result as it is. So a result depends neither on batch mates nor on how the
prompt was cut.

Shape legend: T tokens of the chunks, C chunks, N units, H query heads, K key/value heads, D key width, E value width,
S cache slots, B columns of block tables.
Source: FlashAttention-2, Dao 2023.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from text_generation_server.attention.interface import LayerSpec
from text_generation_server.gpu_kernels.arithmetic import (
    LOG2_E,
    capped,
    first_seen,
    keys_at_once,
    product,
    upcast,
)


def height(dtype: torch.dtype) -> int:
    """Rows of a product, that is queries times heads of a group. Not tuned on a GPU yet.

    In float32 products are not for tensor cores: with more rows their results do not fit into registers.
    """
    return 16 if dtype == torch.float32 else 64


def units(query_lens: Sequence[int], group: int, dtype: torch.dtype) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
    """Chunk and first row of each unit; [N, 2]. The last ones of a chunk see most keys, so they come first."""
    made = [
        (chunk, first)
        for chunk, length in enumerate(query_lens)
        for first in reversed(range(0, length * group, height(dtype)))
    ]
    return np.array(made, dtype=np.int32)


def prefill(
    layer: LayerSpec,
    query_HTD: Tensor,
    keys_KSD: Tensor,
    values_KSE: Tensor,
    out_THE: Tensor,
    *,
    units_N2: Tensor,
    chunks_C3: Tensor,
    tables_CB: Tensor,
    block_size: int,
    scaling: float,
    softcap: float,
    sinks_H: Tensor | None,
) -> None:
    """Fill ``out_THE``.

    ``units_N2`` are those of `units`; ``chunks_C3`` has each chunk's first token in T, its length, and the length of
    its sequence with it; these and ``tables_CB`` are int32. The last dimension of queries is contiguous, all others are
    as a whole.
    """
    group = layer.query_heads // layer.kv_heads
    key_block, value_block = (max(16, triton.next_power_of_2(width)) for width in (layer.key_dim, layer.value_dim))
    tile = keys_at_once(key_block, value_block, query_HTD.dtype)
    _prefill[units_N2.shape[0], layer.kv_heads](
        query_HTD, keys_KSD, values_KSE, out_THE, units_N2, chunks_C3, tables_CB,
        sinks_H if sinks_H is not None else chunks_C3,
        query_HTD.stride(0), query_HTD.stride(1), keys_KSD.stride(0), values_KSE.stride(0), tables_CB.stride(0),
        scaling, softcap,
        HEADS=layer.query_heads, GROUP=group, HEIGHT=height(query_HTD.dtype),
        KEY_DIM=layer.key_dim, VALUE_DIM=layer.value_dim, KEY_BLOCK=key_block, VALUE_BLOCK=value_block,
        BLOCK_SIZE=block_size, TILE=tile, WINDOW=layer.window, CHUNK=layer.chunk,
        HAS_SOFTCAP=softcap != 0, HAS_SINKS=sinks_H is not None, UPCAST=upcast(query_HTD.dtype), LOG2_E=LOG2_E,
        num_warps=4, num_stages=2,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["query_head_stride", "query_token_stride", "table_stride"],
    do_not_specialize_on_alignment=["units", "chunks", "tables", "sinks"],
)
def _prefill(
    query, keys, values, out, units, chunks, tables, sinks,
    query_head_stride, query_token_stride, key_head_stride, value_head_stride, table_stride, scaling, softcap,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEIGHT: tl.constexpr,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, UPCAST: tl.constexpr, LOG2_E: tl.constexpr,
):  # fmt: skip
    """One unit with one key/value head."""
    kv_head = tl.program_id(1)
    chunk = tl.load(units + tl.program_id(0) * 2)
    first_row = tl.load(units + tl.program_id(0) * 2 + 1)
    first_token = tl.load(chunks + chunk * 3)
    length = tl.load(chunks + chunk * 3 + 1)
    context = tl.load(chunks + chunk * 3 + 2)
    row = first_row + tl.arange(0, HEIGHT)
    is_row = row < length * GROUP
    heads = kv_head * GROUP + row % GROUP
    tokens = (first_token + row // GROUP).to(tl.int64)
    positions = context - length + row // GROUP
    at_key, at_value, at_tile = tl.arange(0, KEY_BLOCK), tl.arange(0, VALUE_BLOCK), tl.arange(0, TILE)
    own = tl.load(
        query
        + heads.to(tl.int64)[:, None] * query_head_stride
        + tokens[:, None] * query_token_stride
        + at_key[None, :],
        mask=is_row[:, None] & (at_key < KEY_DIM)[None, :],
        other=0.0,
    )
    keys += kv_head.to(tl.int64) * key_head_stride
    values += kv_head.to(tl.int64) * value_head_stride
    tables += chunk.to(tl.int64) * table_stride
    best = tl.full([HEIGHT], float("-inf"), tl.float32)
    total = tl.zeros([HEIGHT], tl.float32)
    if HAS_SINKS:
        best = tl.load(sinks + heads, mask=is_row, other=0.0).to(tl.float32) * LOG2_E
        total += 1
    weighted = tl.zeros([HEIGHT, VALUE_BLOCK], tl.float32)
    first_position = context - length + first_row // GROUP
    stop = tl.minimum(context - length + (first_row + HEIGHT - 1) // GROUP + 1, context)
    first = first_seen(first_position, WINDOW, CHUNK)
    for start in range(first // TILE * TILE, stop, TILE):
        position = start + at_tile
        is_there = (position >= first) & (position < stop)
        block = tl.load(tables + position // BLOCK_SIZE, mask=is_there, other=0).to(tl.int64)
        slot = block * BLOCK_SIZE + position % BLOCK_SIZE
        # What is masked is not read: it may be not-a-number, and zero times that still is.
        key = tl.load(
            keys + slot[:, None] * KEY_DIM + at_key[None, :],
            mask=is_there[:, None] & (at_key < KEY_DIM)[None, :],
            other=0.0,
        ).to(own.dtype)
        is_seen = is_there[None, :] & (position[None, :] <= positions[:, None])
        if WINDOW:
            is_seen = is_seen & (position[None, :] > positions[:, None] - WINDOW)
        if CHUNK:
            is_seen = is_seen & (position[None, :] // CHUNK == positions[:, None] // CHUNK)
        scores = product(own, tl.trans(key), UPCAST) * scaling
        if HAS_SOFTCAP:
            scores = capped(scores, softcap)
        scores = tl.where(is_seen, scores * LOG2_E, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        # A query that has seen nothing yet has no best score to measure by.
        base = tl.where(new_best == float("-inf"), 0.0, new_best)
        weights = tl.exp2(scores - base[:, None])
        decay = tl.exp2(best - base)
        value = tl.load(
            values + slot[:, None] * VALUE_DIM + at_value[None, :],
            mask=is_there[:, None] & (at_value < VALUE_DIM)[None, :],
            other=0.0,
        ).to(own.dtype)
        total = total * decay + tl.sum(weights, 1)
        weighted = weighted * decay[:, None] + product(weights.to(own.dtype), value, UPCAST)
        best = new_best
    weighted = weighted / tl.where(is_row, total, 1.0)[:, None]
    target = out + (tokens[:, None] * HEADS + heads[:, None]) * VALUE_DIM + at_value[None, :]
    tl.store(target, weighted.to(out.dtype.element_ty), mask=is_row[:, None] & (at_value < VALUE_DIM)[None, :])
