"""Attention of decode rows over the paged cache: no page is copied, no row is padded.

A unit of work is the part of a row's keys that lies between two multiples of ``SEGMENT``, for one key/value head and
its query group, which fills the rows of a matrix product. Where parts begin depends on positions alone, each leaves its
own result, and a second kernel puts the parts of a row together in their order: so a row's result depends neither on
its batch mates nor on how many programs share the parts.

Nothing of a launch depends on lengths but the values in tensors, so that a CUDA graph can hold it.

Shape legend: R rows, H query heads, K key/value heads, G query heads per K, D key width, E value width, S cache slots,
U parts of all rows, B columns of block tables.
Source of the split and its merge: Flash-Decoding, Dao et al. 2023.
"""

from __future__ import annotations

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

SEGMENT = 256
"""Keys of a part: long enough that its result is a small part of what it reads, short enough that one row of a few
thousand tokens keeps a GPU busy. Not tuned on one yet."""
MERGED_AT_ONCE = 16
MOST_ROWS = 64
"""Query heads in one product; larger groups are several."""


def num_parts(first: int, stop: int) -> int:
    """Parts of a row that sees the keys ``first .. stop``."""
    return -(-stop // SEGMENT) - first // SEGMENT


def decode(
    layer: LayerSpec,
    query_HRD: Tensor,
    keys_KSD: Tensor,
    values_KSE: Tensor,
    out_RHE: Tensor,
    *,
    tables_RB: Tensor,
    contexts_R: Tensor,
    offsets_R: Tensor,
    parts_UHE: Tensor,
    sums_UH2: Tensor,
    block_size: int,
    programs: int,
    scaling: float,
    softcap: float,
    sinks_H: Tensor | None,
) -> None:
    """Fill ``out_RHE``, with zeros where a row's context is empty.

    ``tables_RB``, ``contexts_R`` and ``offsets_R`` (of a row's first part in U) are int32. ``parts_UHE`` and
    ``sums_UH2`` are float32 and overwritten. ``programs`` share the parts of a row: any number gives the same result.
    The last dimension of queries is contiguous, all others are as a whole.
    """
    num_rows = query_HRD.shape[1]
    group = layer.query_heads // layer.kv_heads
    height = min(MOST_ROWS, max(16, triton.next_power_of_2(group)))
    key_block, value_block = (max(16, triton.next_power_of_2(width)) for width in (layer.key_dim, layer.value_dim))
    tile = keys_at_once(key_block, value_block, query_HRD.dtype)
    bundles = triton.cdiv(group, height)
    _parts[num_rows, layer.kv_heads * bundles, programs](
        query_HRD, keys_KSD, values_KSE, tables_RB, contexts_R, offsets_R, parts_UHE, sums_UH2,
        query_HRD.stride(0), query_HRD.stride(1), keys_KSD.stride(0), values_KSE.stride(0), tables_RB.stride(0),
        scaling, softcap,
        HEADS=layer.query_heads, GROUP=group, BUNDLES=bundles, HEIGHT=height,
        KEY_DIM=layer.key_dim, VALUE_DIM=layer.value_dim, KEY_BLOCK=key_block, VALUE_BLOCK=value_block,
        BLOCK_SIZE=block_size, PART=SEGMENT, TILE=tile, WINDOW=layer.window, CHUNK=layer.chunk,
        HAS_SOFTCAP=softcap != 0, UPCAST=upcast(query_HRD.dtype), LOG2_E=LOG2_E,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    _merge[num_rows, layer.query_heads](
        parts_UHE, sums_UH2, contexts_R, offsets_R, out_RHE, sinks_H if sinks_H is not None else contexts_R,
        HEADS=layer.query_heads, VALUE_DIM=layer.value_dim, VALUE_BLOCK=value_block, PART=SEGMENT,
        TILE=MERGED_AT_ONCE, WINDOW=layer.window, CHUNK=layer.chunk, HAS_SINKS=sinks_H is not None, LOG2_E=LOG2_E,
        num_warps=4,
    )  # fmt: skip


# A kernel is compiled for what numbers and addresses are multiples of: not for those that change from step to step.
@triton.jit(
    do_not_specialize=["query_head_stride", "query_row_stride", "table_stride"],
    do_not_specialize_on_alignment=["tables", "contexts", "offsets"],
)
def _parts(
    query, keys, values, tables, contexts, offsets, parts, sums,
    query_head_stride, query_row_stride, key_head_stride, value_head_stride, table_stride, scaling, softcap,
    HEADS: tl.constexpr, GROUP: tl.constexpr, BUNDLES: tl.constexpr, HEIGHT: tl.constexpr,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, PART: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, LOG2_E: tl.constexpr,
):  # fmt: skip
    """The result of some parts of one row and one query group: weighted values, largest score, sum of weights."""
    row = tl.program_id(0)
    kv_head = tl.program_id(1) // BUNDLES
    in_group = tl.program_id(1) % BUNDLES * HEIGHT + tl.arange(0, HEIGHT)
    heads = kv_head * GROUP + in_group
    is_head = in_group < GROUP
    stop = tl.load(contexts + row)
    first = first_seen(stop - 1, WINDOW, CHUNK)
    first_part = first // PART
    offset = tl.load(offsets + row)
    at_key, at_value, at_tile = tl.arange(0, KEY_BLOCK), tl.arange(0, VALUE_BLOCK), tl.arange(0, TILE)
    own = tl.load(
        query + heads.to(tl.int64)[:, None] * query_head_stride + row.to(tl.int64) * query_row_stride + at_key[None, :],
        mask=is_head[:, None] & (at_key < KEY_DIM)[None, :],
        other=0.0,
    )
    keys += kv_head.to(tl.int64) * key_head_stride
    values += kv_head.to(tl.int64) * value_head_stride
    tables += row.to(tl.int64) * table_stride
    for part in range(first_part + tl.program_id(2), tl.cdiv(stop, PART), tl.num_programs(2)):
        best = tl.full([HEIGHT], float("-inf"), tl.float32)
        total = tl.zeros([HEIGHT], tl.float32)
        weighted = tl.zeros([HEIGHT, VALUE_BLOCK], tl.float32)
        begin = tl.maximum(part * PART, first // TILE * TILE)
        for start in range(begin, tl.minimum(part * PART + PART, stop), TILE):
            position = start + at_tile
            is_seen = (position >= first) & (position < stop)
            block = tl.load(tables + position // BLOCK_SIZE, mask=is_seen, other=0).to(tl.int64)
            slot = block * BLOCK_SIZE + position % BLOCK_SIZE
            # What is masked is not read: it may be not-a-number, and zero times that still is.
            key = tl.load(
                keys + slot[:, None] * KEY_DIM + at_key[None, :],
                mask=is_seen[:, None] & (at_key < KEY_DIM)[None, :],
                other=0.0,
            ).to(own.dtype)
            scores = product(own, tl.trans(key), UPCAST) * scaling
            if HAS_SOFTCAP:
                scores = capped(scores, softcap)
            scores = tl.where(is_seen[None, :], scores * LOG2_E, float("-inf"))
            new_best = tl.maximum(best, tl.max(scores, 1))  # finite: each tile has a key that is seen
            weights = tl.exp2(scores - new_best[:, None])
            decay = tl.exp2(best - new_best)
            value = tl.load(
                values + slot[:, None] * VALUE_DIM + at_value[None, :],
                mask=is_seen[:, None] & (at_value < VALUE_DIM)[None, :],
                other=0.0,
            ).to(own.dtype)
            total = total * decay + tl.sum(weights, 1)
            weighted = weighted * decay[:, None] + product(weights.to(own.dtype), value, UPCAST)
            best = new_best
        place = (offset + part - first_part).to(tl.int64) * HEADS + heads
        tl.store(sums + place * 2, best, mask=is_head)
        tl.store(sums + place * 2 + 1, total, mask=is_head)
        tl.store(
            parts + place[:, None] * VALUE_DIM + at_value[None, :],
            weighted,
            mask=is_head[:, None] & (at_value < VALUE_DIM)[None, :],
        )


@triton.jit(do_not_specialize_on_alignment=["contexts", "offsets", "sinks"])
def _merge(
    parts, sums, contexts, offsets, out, sinks,
    HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_BLOCK: tl.constexpr, PART: tl.constexpr, TILE: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, HAS_SINKS: tl.constexpr, LOG2_E: tl.constexpr,
):  # fmt: skip
    """The result of one row and head from its parts, in their order."""
    row, head = tl.program_id(0), tl.program_id(1)
    stop = tl.load(contexts + row)
    count = tl.cdiv(stop, PART) - first_seen(stop - 1, WINDOW, CHUNK) // PART
    count = tl.where(stop > 0, count, 0)
    offset = tl.load(offsets + row)
    at_value = tl.arange(0, VALUE_BLOCK)
    best = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    if HAS_SINKS:
        best = tl.load(sinks + head + tl.arange(0, 1)).to(tl.float32) * LOG2_E
        total += 1
    weighted = tl.zeros([VALUE_BLOCK], tl.float32)
    for start in range(0, count, TILE):
        part = start + tl.arange(0, TILE)
        is_part = part < count
        place = (offset + part).to(tl.int64) * HEADS + head
        bests = tl.load(sums + place * 2, mask=is_part, other=float("-inf"))
        totals = tl.load(sums + place * 2 + 1, mask=is_part, other=0.0)
        values = tl.load(
            parts + place[:, None] * VALUE_DIM + at_value[None, :],
            mask=is_part[:, None] & (at_value < VALUE_DIM)[None, :],
            other=0.0,
        )
        new_best = tl.maximum(best, tl.max(bests, 0))
        decay, factors = tl.exp2(best - new_best), tl.exp2(bests - new_best)
        total = total * decay + tl.sum(totals * factors, 0)
        weighted = weighted * decay + tl.sum(values * factors[:, None], 0)
        best = new_best
    weighted = weighted / tl.where(count > 0, total, 1.0)
    target = out + (row.to(tl.int64) * HEADS + head) * VALUE_DIM + at_value
    tl.store(target, weighted.to(out.dtype.element_ty), mask=at_value < VALUE_DIM)
