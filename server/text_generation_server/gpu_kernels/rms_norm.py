"""RMS norm of rows, with or without a sum before it: one read and one write of each row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def rms_norm(x: Tensor, weight_N: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, computed in float32 and rounded once."""
    x = x.contiguous()
    out = torch.empty_like(x)
    width = weight_N.shape[0]
    _norm[x.numel() // width,](
        x, x, x, weight_N, out, eps,
        WIDTH=width, BLOCK=triton.next_power_of_2(width), HAS_ADDEND=False, num_warps=_warps(width),
    )  # fmt: skip
    return out


def add_rms_norm(x: Tensor, addend: Tensor, weight_N: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x + addend`` rounded to their dtype, and the norm of that; two new tensors."""
    assert x.shape == addend.shape and x.dtype == addend.dtype
    x, addend = x.contiguous(), addend.contiguous()
    total, out = torch.empty_like(x), torch.empty_like(x)
    width = weight_N.shape[0]
    _norm[x.numel() // width,](
        x, addend, total, weight_N, out, eps,
        WIDTH=width, BLOCK=triton.next_power_of_2(width), HAS_ADDEND=True, num_warps=_warps(width),
    )  # fmt: skip
    return total, out


def _warps(width: int) -> int:
    return 4 if width <= 4096 else 8


@triton.jit
def _norm(
    x, addend, total, weight, out, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_ADDEND: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * WIDTH
    place = tl.arange(0, BLOCK)
    is_there = place < WIDTH
    numbers = tl.load(x + row + place, mask=is_there, other=0.0).to(tl.float32)
    if HAS_ADDEND:
        numbers += tl.load(addend + row + place, mask=is_there, other=0.0).to(tl.float32)
        rounded = numbers.to(total.dtype.element_ty)
        tl.store(total + row + place, rounded, mask=is_there)
        numbers = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(numbers * numbers, 0) / WIDTH + eps)
    numbers = numbers * scale * tl.load(weight + place, mask=is_there, other=0.0).to(tl.float32)
    tl.store(out + row + place, numbers.to(out.dtype.element_ty), mask=is_there)
