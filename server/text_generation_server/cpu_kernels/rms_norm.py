"""RMS norm of rows: one pass for the mean square, one to scale; nothing is written in between."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from text_generation_server.cpu_kernels.compiler import Kernel, new_code
from text_generation_server.cpu_kernels.language import DTYPES, LANES, Code, Pointer, Value

UNIT_NUMBERS = 8192
"""Numbers that a thread takes at once: less is not worth its while."""


def supports(width: int, dtype: torch.dtype) -> bool:
    return width % LANES == 0 and dtype in DTYPES


def rms_norm(x: Tensor, weight_N: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, computed in float32 and rounded once.

    ``weight_N`` is float32. `supports` says for which widths and dtypes.
    """
    width = weight_N.shape[0]
    x = x.contiguous()
    out = torch.empty_like(x)
    num_rows = x.numel() // width
    units = -(-num_rows // _rows_per_unit(width))
    kernel(width, x.dtype, eps)(x.data_ptr(), out.data_ptr(), weight_N.data_ptr(), num_rows, units=units)
    return out


def _rows_per_unit(width: int) -> int:
    return max(1, UNIT_NUMBERS // width)


@functools.cache
def kernel(width: int, dtype: torch.dtype, eps: float) -> Kernel:
    """Its arguments: the addresses of rows, results and weight, and the number of rows."""
    code = new_code("rms_norm")
    x, out, weight = code.tensor(1, dtype), code.tensor(2, dtype), code.tensor(3, torch.float32)
    num_rows, together = code.arguments[4], _rows_per_unit(width)
    with code.units((num_rows + (together - 1)) // together) as unit:
        first = unit * together
        with code.loop(code.smaller(first + together, num_rows), first) as row:
            source, target = x + row * width, out + row * width
            scale = code.spread(inverse_rms(code, source, width, eps))
            with code.loop(width, step=LANES) as place:
                target.put(place, source.vector(place) * scale * weight.vector(place))
    return Kernel(code, num_arguments=4)


def inverse_rms(code: Code, source: Pointer, width: int, eps: float) -> Value:
    """``1 / sqrt(mean(x^2) + eps)`` of ``width`` numbers, as a float32."""
    squares = code.variable(code.vector(0))
    with code.loop(width, step=LANES) as place:
        x = source.vector(place)
        squares.set(code.multiply_add(x, x, squares.get()))
    return 1 / code.square_root(code.sum(squares.get()) / width + eps)
