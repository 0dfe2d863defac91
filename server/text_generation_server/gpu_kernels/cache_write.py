"""Keys and values of a step's tokens to their slots in the cache, in the cache's number format.

Shape legend: T tokens, K key/value heads, D key width, E value width, S cache slots.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from text_generation_server.gpu_kernels.arithmetic import largest, stored


def write(key_KTD: Tensor, value_KTE: Tensor, keys_KSD: Tensor, values_KSE: Tensor, slots_T: Tensor) -> None:
    """Copy to ``slots_T`` (int64). There may be more tokens than slots: those behind go nowhere.

    The last dimension of keys and values is contiguous. What the cache's number format has no room for is cut off.
    """
    kv_heads, _, key_dim = keys_KSD.shape
    value_dim = values_KSE.shape[2]
    _write[slots_T.shape[0], kv_heads](
        key_KTD, value_KTE, keys_KSD, values_KSE, slots_T,
        key_KTD.stride(0), key_KTD.stride(1), value_KTE.stride(0), value_KTE.stride(1),
        keys_KSD.stride(0), values_KSE.stride(0),
        KEY_DIM=key_dim, VALUE_DIM=value_dim,
        KEY_BLOCK=triton.next_power_of_2(key_dim), VALUE_BLOCK=triton.next_power_of_2(value_dim),
        LARGEST=largest(keys_KSD.dtype),
        num_warps=1,
    )  # fmt: skip


@triton.jit
def _write(
    key, value, keys, values, slots,
    key_head_stride, key_token_stride, value_head_stride, value_token_stride, keys_head_stride, values_head_stride,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + token)
    at_key, at_value = tl.arange(0, KEY_BLOCK), tl.arange(0, VALUE_BLOCK)
    numbers = tl.load(key + head * key_head_stride + token * key_token_stride + at_key, mask=at_key < KEY_DIM)
    target = keys + head * keys_head_stride + slot * KEY_DIM + at_key
    tl.store(target, stored(numbers, keys, LARGEST), mask=at_key < KEY_DIM)
    numbers = tl.load(
        value + head * value_head_stride + token * value_token_stride + at_value, mask=at_value < VALUE_DIM
    )
    target = values + head * values_head_stride + slot * VALUE_DIM + at_value
    tl.store(target, stored(numbers, values, LARGEST), mask=at_value < VALUE_DIM)
