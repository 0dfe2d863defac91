"""Rotary embedding of half-split heads, in place, with or without a norm of each head before it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from text_generation_server.cpu_kernels.compiler import Kernel, new_code
from text_generation_server.cpu_kernels.language import DTYPES, LANES
from text_generation_server.cpu_kernels.rms_norm import inverse_rms

UNIT_NUMBERS = 8192
"""Numbers that a thread takes at once, about: less is not worth its while."""


def supports(head_dim: int, dtype: torch.dtype) -> bool:
    return head_dim % (2 * LANES) == 0 and dtype in DTYPES


def rotate(
    heads_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor, *, num_rotated: int, norm_HD: Tensor | None, eps: float
) -> None:
    """``x * cos + (-right, left) * sin`` for the first ``num_rotated`` heads of each token, in place, in float32.

    With ``norm_HD`` (float32) each head is RMS-normalised and scaled by its row first. ``heads_THD`` is contiguous, and
    so are cosine and sine, which have its dtype. `supports` says for which widths and dtypes.
    """
    num_tokens, num_heads, head_dim = heads_THD.shape
    assert cos_TD.shape == sin_TD.shape == (num_tokens, head_dim)
    kernel(num_heads, num_rotated, head_dim, heads_THD.dtype, None if norm_HD is None else eps)(
        heads_THD.data_ptr(),
        cos_TD.data_ptr(),
        sin_TD.data_ptr(),
        0 if norm_HD is None else norm_HD.data_ptr(),
        num_tokens,
        units=-(-num_tokens // _tokens_per_unit(num_rotated * head_dim)),
    )


def _tokens_per_unit(width: int) -> int:
    return max(1, UNIT_NUMBERS // width)


@functools.cache
def kernel(num_heads: int, num_rotated: int, head_dim: int, dtype: torch.dtype, norm_eps: float | None) -> Kernel:
    """Its arguments: the addresses of heads, cosine, sine and norm weight, and the number of tokens."""
    code = new_code("rotary")
    heads, cos, sin = (code.tensor(argument, dtype) for argument in (1, 2, 3))
    norm, num_tokens = code.tensor(4, torch.float32), code.arguments[5]
    together, half = _tokens_per_unit(num_rotated * head_dim), head_dim // 2
    with code.units((num_tokens + (together - 1)) // together) as unit:
        first = unit * together
        with code.loop(code.smaller(first + together, num_tokens), first) as token:
            angle = token * head_dim
            with code.loop(num_rotated) as index:
                head = heads + (token * num_heads + index) * head_dim
                scale = None if norm_eps is None else code.spread(inverse_rms(code, head, head_dim, norm_eps))
                for place in range(0, half, LANES):
                    left, right = head.vector(place), head.vector(place + half)
                    if scale is not None:
                        left = left * scale * norm.vector(index * head_dim + place)
                        right = right * scale * norm.vector(index * head_dim + (place + half))
                    left_cos, left_sin = cos.vector(angle + place), sin.vector(angle + place)
                    right_cos, right_sin = cos.vector(angle + (place + half)), sin.vector(angle + (place + half))
                    head.put(place, left * left_cos - right * left_sin)
                    head.put(place + half, right * right_cos + left * right_sin)
    return Kernel(code, num_arguments=5)
