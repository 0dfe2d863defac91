"""Rotary embedding of queries and keys, and the way of keys and values into the cache, in one launch.

Shape legend: T tokens, H query heads, K key/value heads, D head width, S cache slots.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from text_generation_server.attention.interface import Rotation
from text_generation_server.gpu_kernels.arithmetic import largest, stored

HEADS_AT_ONCE = 4


def rotate_and_write(
    query_HTD: Tensor,
    key_KTD: Tensor,
    value_KTD: Tensor,
    rotation: Rotation,
    keys_KSD: Tensor,
    values_KSD: Tensor,
    slots_T: Tensor,
) -> Tensor:
    """Returns the rotated queries, [H, T, D], and writes rotated keys, and values, to ``slots_T`` (int64).

    There may be more tokens than slots: of those behind, keys and values go nowhere. The last dimension of all is
    contiguous. Computed in float32 and rounded once; what the cache's number format has no room for is cut off.
    """
    query_heads, num_tokens, width = query_HTD.shape
    kv_heads = key_KTD.shape[0]
    cos_TD, sin_TD = rotation.cos_TD.contiguous(), rotation.sin_TD.contiguous()
    assert cos_TD.shape == sin_TD.shape == (num_tokens, width)
    out_THD = query_HTD.new_empty((num_tokens, query_heads, width))
    norm_HD = rotation.norm_HD
    query_programs, kv_programs = (triton.cdiv(heads, HEADS_AT_ONCE) for heads in (query_heads, kv_heads))
    _rotate[num_tokens, query_programs + 2 * kv_programs](
        query_HTD, key_KTD, value_KTD, cos_TD, sin_TD, cos_TD if norm_HD is None else norm_HD,
        out_THD, keys_KSD, values_KSD, slots_T, slots_T.shape[0],
        query_HTD.stride(0), query_HTD.stride(1), key_KTD.stride(0), key_KTD.stride(1),
        value_KTD.stride(0), value_KTD.stride(1), keys_KSD.stride(0), values_KSD.stride(0), rotation.eps,
        QUERY_HEADS=query_heads, KV_HEADS=kv_heads, QUERY_PROGRAMS=query_programs, KV_PROGRAMS=kv_programs,
        WIDTH=width, BLOCK=triton.next_power_of_2(width // 2), HEADS=HEADS_AT_ONCE, HAS_NORM=norm_HD is not None,
        LARGEST=largest(keys_KSD.dtype), num_warps=2,
    )  # fmt: skip
    return out_THD.transpose(0, 1)


@triton.jit(do_not_specialize=["num_slots"])
def _rotate(
    query, key, value, cos, sin, norm, out, keys, values, slots, num_slots,
    query_head_stride, query_token_stride, key_head_stride, key_token_stride, value_head_stride, value_token_stride,
    keys_head_stride, values_head_stride, eps,
    QUERY_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, QUERY_PROGRAMS: tl.constexpr, KV_PROGRAMS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, HAS_NORM: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Some heads of one token: first come the programs of the queries, then those of keys and of values."""
    token = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1)
    place = tl.arange(0, BLOCK)
    if program < QUERY_PROGRAMS:
        head = program * HEADS + tl.arange(0, HEADS)
        is_there = (head < QUERY_HEADS)[:, None] & (place < WIDTH // 2)[None, :]
        source = query + token * query_token_stride + head.to(tl.int64)[:, None] * query_head_stride + place[None, :]
        left, right = _rotated(source, cos, sin, norm, token, head, place, is_there, eps, WIDTH, HAS_NORM)
        target = out + (token * QUERY_HEADS + head[:, None]) * WIDTH + place[None, :]
        tl.store(target, left.to(out.dtype.element_ty), mask=is_there)
        tl.store(target + WIDTH // 2, right.to(out.dtype.element_ty), mask=is_there)
    elif token < num_slots:
        slot = tl.load(slots + token)
        head = (program - QUERY_PROGRAMS) % KV_PROGRAMS * HEADS + tl.arange(0, HEADS)
        is_there = (head < KV_HEADS)[:, None] & (place < WIDTH // 2)[None, :]
        wide_head = head.to(tl.int64)[:, None]
        if program < QUERY_PROGRAMS + KV_PROGRAMS:
            source = key + token * key_token_stride + wide_head * key_head_stride + place[None, :]
            left, right = _rotated(
                source, cos, sin, norm, token, QUERY_HEADS + head, place, is_there, eps, WIDTH, HAS_NORM
            )
            target = keys + wide_head * keys_head_stride + slot * WIDTH + place[None, :]
            # As queries are rounded: to the format that is computed in, before the cache's.
            left, right = left.to(key.dtype.element_ty), right.to(key.dtype.element_ty)
            tl.store(target, stored(left, keys, LARGEST), mask=is_there)
            tl.store(target + WIDTH // 2, stored(right, keys, LARGEST), mask=is_there)
        else:
            source = value + token * value_token_stride + wide_head * value_head_stride + place[None, :]
            target = values + wide_head * values_head_stride + slot * WIDTH + place[None, :]
            tl.store(target, stored(tl.load(source, mask=is_there), values, LARGEST), mask=is_there)
            numbers = tl.load(source + WIDTH // 2, mask=is_there)
            tl.store(target + WIDTH // 2, stored(numbers, values, LARGEST), mask=is_there)


@triton.jit
def _rotated(
    source, cos, sin, norm, token, norm_row, place, is_there, eps, WIDTH: tl.constexpr, HAS_NORM: tl.constexpr
):
    """Both halves of some heads, turned; ``source`` points to the left ones."""
    left = tl.load(source, mask=is_there, other=0.0).to(tl.float32)
    right = tl.load(source + WIDTH // 2, mask=is_there, other=0.0).to(tl.float32)
    if HAS_NORM:
        scale = tl.rsqrt((tl.sum(left * left, 1) + tl.sum(right * right, 1)) / WIDTH + eps)[:, None]
        weight = norm + norm_row[:, None] * WIDTH + place[None, :]
        left = left * scale * tl.load(weight, mask=is_there, other=0.0).to(tl.float32)
        right = right * scale * tl.load(weight + WIDTH // 2, mask=is_there, other=0.0).to(tl.float32)
    angle, is_angle = token * WIDTH + place, place < WIDTH // 2
    left_cos = tl.load(cos + angle, mask=is_angle, other=0.0).to(tl.float32)[None, :]
    right_cos = tl.load(cos + angle + WIDTH // 2, mask=is_angle, other=0.0).to(tl.float32)[None, :]
    left_sin = tl.load(sin + angle, mask=is_angle, other=0.0).to(tl.float32)[None, :]
    right_sin = tl.load(sin + angle + WIDTH // 2, mask=is_angle, other=0.0).to(tl.float32)[None, :]
    return left * left_cos - right * left_sin, right * right_cos + left * right_sin
