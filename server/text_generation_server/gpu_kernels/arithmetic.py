"""What several kernels compute with, and where kernels can run."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""TRITON_INTERPRET=1 when Triton was imported: kernels run on the CPU, statement by statement."""

LOG2_E = 1.4426950408889634
"""Kernels compute powers of two: that is the instruction that there is."""

SHORT_FLOATS = (torch.float16, torch.bfloat16)
FLOATS = (*SHORT_FLOATS, torch.float32)


def reason_unavailable(device: torch.device) -> str | None:
    """Why no kernel can run on ``device``; None if they can."""
    if device.type == "cuda" or INTERPRETED:
        return None
    return f"Triton has no back end for {device.type}"


def upcast(dtype: torch.dtype) -> bool:
    """Whether products are to be computed from float32: Triton's interpreter multiplies bfloat16 matrices wrongly."""
    return INTERPRETED and dtype == torch.bfloat16


def largest(dtype: torch.dtype) -> float:
    """Beyond it a number has to be cut off before it is stored as ``dtype``; 0 for what need not be.

    Eight bits have no infinity, or one that would swallow a whole row: overflow would make not-a-number of it.
    """
    return torch.finfo(dtype).max if dtype.itemsize == 1 else 0.0


def keys_at_once(key_block: int, value_block: int, dtype: torch.dtype) -> int:
    """Keys of one product in attention: two tiles of keys and values, and the queries, fit into the shared memory of
    any GPU that computes in bfloat16. A power of two, like the padded widths."""
    fitting = 2**15 // ((key_block + value_block) * dtype.itemsize)
    return max(16, min(64, 1 << (fitting.bit_length() - 1)))


@triton.jit
def product(left, right, UPCAST: tl.constexpr):
    """Matrix product in float32, without TF32."""
    if UPCAST:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def capped(scores, softcap):
    """``softcap * tanh(scores / softcap)``; the hyperbolic tangent of Triton's library is not in its interpreter."""
    return softcap * (2 / (1 + tl.exp(scores * (-2 / softcap))) - 1)


@triton.jit
def first_seen(position, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """The first position that a query at ``position`` sees."""
    first = position * 0
    if WINDOW:
        first = tl.maximum(position - (WINDOW - 1), 0)
    if CHUNK:
        first = position // CHUNK * CHUNK
    return first


@triton.jit
def stored(numbers, pointer, LARGEST: tl.constexpr):
    """``numbers`` in the type that ``pointer`` points to, cut off where that has no room; NaN stays NaN."""
    if LARGEST > 0:
        numbers = numbers.to(tl.float32)
        numbers = tl.where(numbers > LARGEST, LARGEST, tl.where(numbers < -LARGEST, -LARGEST, numbers))
    return numbers.to(pointer.dtype.element_ty)
