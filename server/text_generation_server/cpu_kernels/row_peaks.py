"""The largest number of each row, where it is, and the sum of exponentials below it, in one pass: what a greedy token
and its log-probability take.

A unit of work is a part of a row, small enough to be read twice from the nearest cache. Where parts begin depends on
the width alone, so a row's result does not depend on the rows beside it or on the number of threads.

Shape legend: S rows, V their width, P parts of a row.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from text_generation_server.cpu_kernels import compiler
from text_generation_server.cpu_kernels.compiler import Kernel, new_code
from text_generation_server.cpu_kernels.language import DTYPES, LANES

PART = 4096
"""Numbers; a float32 counts the places in it."""
STRETCH = 16 * LANES
"""Numbers that are summed up before they are added to the part's sum."""


def supports(width: int, dtype: torch.dtype) -> bool:
    return width % LANES == 0 and width > 0 and dtype in DTYPES and compiler.reason_unavailable() is None


def row_peaks(x_SV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Largest numbers, float32 [S]; the first place of each, int64 [S]; float64 sums of ``exp(x - largest)``, [S].

    A row with not-a-number has one for its sum, and some place. `supports` says for which widths and dtypes.
    """
    x_SV = x_SV.contiguous()
    num_rows, width = x_SV.shape
    parts_3SP = torch.empty((3, num_rows, -(-width // PART)))
    kernel(width, x_SV.dtype)(x_SV.data_ptr(), parts_3SP.data_ptr(), num_rows, units=parts_3SP[0].numel())
    largest_SP, first_SP, sums_SP = parts_3SP
    largest_S, part_S = largest_SP.max(-1)  # the first of equal parts
    first_S = first_SP.gather(-1, part_S.unsqueeze(-1)).squeeze(-1).long() + part_S * PART
    sums_S = (sums_SP.double() * (largest_SP - largest_S.unsqueeze(-1)).double().exp()).sum(-1)
    return largest_S, first_S.clamp(max=width - 1), sums_S  # nothing equals not-a-number: it is nowhere


@functools.cache
def kernel(width: int, dtype: torch.dtype) -> Kernel:
    """Its arguments: the addresses of rows and results [3, S, P], and the number of rows."""
    code = new_code("row_peaks")
    x, results, num_rows = code.tensor(1, dtype), code.tensor(2, torch.float32), code.arguments[3]
    num_parts = -(-width // PART)
    with code.units(num_rows * num_parts) as unit:
        begin = unit % num_parts * PART
        size = code.smaller(width - begin, code.integer(PART))
        part = x + (unit // num_parts * width + begin)
        highest = code.variable(part.vector(0))
        with code.loop(size, step=LANES) as place:
            highest.set(code.maximum(highest.get(), part.vector(place)))
        largest = code.largest(highest.get())
        every_lane = code.spread(largest)
        # A part may be hidden as a whole: from minus infinity its numbers have no distance.
        origin = code.choose(every_lane.equals(-math.inf), code.vector(0), every_lane)
        sums = code.variable(code.vector(0))
        places, nearest = code.variable(code.lane_numbers()), code.variable(code.vector(PART - 1))
        with code.loop(size, step=STRETCH) as first:
            stretch = code.variable(code.vector(0))  # a sum of few: a long one loses what is small beside it
            with code.loop(code.smaller(first + STRETCH, size), first, step=LANES) as place:
                numbers = part.vector(place)
                stretch.set(stretch.get() + code.exp(numbers - origin))
                found = code.choose(numbers.equals(every_lane), places.get(), nearest.get())
                nearest.set(code.choose(found < nearest.get(), found, nearest.get()))
                places.set(places.get() + LANES)
            sums.set(sums.get() + stretch.get())
        results[unit] = largest
        results[num_rows * num_parts + unit] = 0 - code.largest(0 - nearest.get())
        results[num_rows * num_parts * 2 + unit] = code.sum(sums.get())
    return Kernel(code, num_arguments=3)
