"""Keys and values of a step's tokens to their slots in the cache."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from text_generation_server.cpu_kernels import paging
from text_generation_server.cpu_kernels.compiler import Kernel, Launch, new_code

TOKENS_PER_UNIT = 16


def write(heads_KTD: Tensor, cache_KSD: Tensor, slots_T: Tensor) -> None:
    """Copy each token's keys, or values, to its slot. The last dimension of ``heads_KTD`` is contiguous; it has a token
    for each of ``slots_T`` (int64), or more. For heads that ``decode_attention.supports``."""
    kernel, arguments = launch(heads_KTD, cache_KSD, slots_T)
    kernel(*arguments, units=-(-slots_T.shape[0] // TOKENS_PER_UNIT))


def launch(heads_KTD: Tensor, cache_KSD: Tensor, slots_T: Tensor) -> Launch:
    """The same as a part of a larger launch."""
    num_heads, num_slots, width = cache_KSD.shape
    return _kernel(width, cache_KSD.dtype), (
        heads_KTD.data_ptr(),
        heads_KTD.stride(0),
        heads_KTD.stride(1),
        cache_KSD.data_ptr(),
        num_slots,
        num_heads,
        slots_T.data_ptr(),
        slots_T.shape[0],
    )


@functools.cache
def _kernel(width: int, dtype: torch.dtype) -> Kernel:
    code = new_code("cache_write")
    source, cache, slots = code.tensor(1, dtype), code.tensor(4, dtype), code.tensor(7, torch.int64)
    head_stride, token_stride, num_slots, num_heads, num_tokens = (code.arguments[each] for each in (2, 3, 5, 6, 8))
    with code.units((num_tokens + (TOKENS_PER_UNIT - 1)) // TOKENS_PER_UNIT) as unit:
        first = unit * TOKENS_PER_UNIT
        with code.loop(num_heads) as head, code.loop(code.smaller(first + TOKENS_PER_UNIT, num_tokens), first) as token:
            numbers = source + (head * head_stride + token * token_stride)
            paging.copy(numbers, cache + (head * num_slots + slots[token]) * width, width)
    return Kernel(code, num_arguments=8)
