"""Products of tiles without AMX: by the vectors of any processor, from bfloat16 numbers or from float32.

Where the processor multiplies pairs of bfloat16 numbers (AVX512-BF16), tiles are those of AMX. Elsewhere a number would
be made a float32 in each product that it takes part in: rows and pairs are put into tiles as float32, once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from text_generation_server.cpu_kernels.compiler import processor_has
from text_generation_server.cpu_kernels.language import LANES, Code, Pointer, Value, Variable
from text_generation_server.cpu_kernels.tiles import NUMBERS, ROWS, STEP

UNROLL = 2
"""Pairs between two looks at whether there are more."""


class VectorTiles:
    """A tile holds 16 pairs of 16 lanes. In float32 they are [16 pairs, 2, 16 lanes]; those of rows [16 rows, 2,
    16 pairs], or, side by side, [16 pairs, 2, 16 rows]."""

    def __init__(self, code: Code, *, dtype: torch.dtype | None = None) -> None:
        """``dtype``: of the numbers in tiles, if not what is fastest; bfloat16 or float32."""
        self.code = code
        self.dtype = dtype or best_dtype(has_bfloat16=code.has_bfloat16)
        self._rows_at_once = ROWS if processor_has("avx512f") else 4
        """As many sums, and a few numbers besides, as there are registers for."""

    @property
    def reads_in_place(self) -> bool:
        """Whether rows may lie where others have put bfloat16 numbers. If not, they are tiles of `put_pairs`, or, side
        by side, of `put_numbers`."""
        return self.dtype == torch.bfloat16

    @contextlib.contextmanager
    def shaped(self, address: Value) -> Iterator[None]:
        """Vectors have no shape to be set."""
        yield

    def put_pairs(self, place: Pointer, bits: Value) -> None:
        """Make 16 pairs of bfloat16 numbers a row of a tile."""
        if self.reads_in_place:
            place.put_bits(0, bits)
        else:
            self.put_numbers(place, self.code.lower_numbers(bits), self.code.upper_numbers(bits))

    def put_numbers(self, place: Pointer, lower: Value, upper: Value) -> None:
        """Make float32 numbers a row of pairs, rounded if need be; not-a-number as `Code.to_half` has it."""
        if self.reads_in_place:
            place.put_bits(0, self.code.upper_halves(self.code.to_half(lower), self.code.to_half(upper)))
        else:
            place.put(0, lower)
            place.put(LANES, upper)

    def add_products(
        self,
        sums: list[Pointer],
        rows: list[Pointer],
        pairs: Pointer,
        *,
        steps: Value | int,
        row_numbers: int,
        step_numbers: int,
        is_new: bool,
    ) -> None:
        """As `Tiles.add_products`. Rows of float32 that are 1 number apart lie side by side."""
        code, height = self.code, self._rows_at_once
        for target, source in zip(sums, rows, strict=True):
            with code.loop(ROWS, step=height) as first:
                own = target + first * LANES
                totals = [code.variable(code.vector(0) if is_new else own.vector(row * LANES)) for row in range(height)]
                with code.loop(steps) as step:
                    left = source + first * row_numbers + step * step_numbers
                    with code.loop(ROWS, step=UNROLL) as pair:
                        for place in range(UNROLL):
                            self._add_pair(totals, left, row_numbers, pairs + step * NUMBERS, pair + place)
                for row, total in enumerate(totals):
                    own.put(row * LANES, total.get())

    def _add_pair(self, totals: list[Variable], left: Pointer, row_numbers: int, right: Pointer, pair: Value) -> None:
        code, lanes = self.code, right + pair * STEP
        if self.reads_in_place:
            bits, numbers = lanes.bits(0), left + pair * 2
            for row, total in enumerate(totals):
                total.set(code.dot_pairs(numbers.spread_bits(row * row_numbers), bits, total.get()))
            return
        numbers = left + (pair * STEP if row_numbers == 1 else pair)
        for half in (0, LANES):
            vector = lanes.vector(half)
            for row, total in enumerate(totals):
                number = code.spread(numbers[row * row_numbers + half])
                total.set(code.multiply_add(number, vector, total.get()))


def best_dtype(*, has_bfloat16: bool) -> torch.dtype:
    """What tiles hold here."""
    return torch.bfloat16 if has_bfloat16 else torch.float32
