"""Products of bfloat16 rows with packed weights by vectors: for processors without tiles.

A block of rows and a tile of 16 outputs, or two, are summed up in registers over all inputs. A processor that
multiplies pairs of bfloat16 numbers (AVX512-BF16) does so as they lie; for others numbers become float32: those of rows
once for a unit of work, those of weights each time that they are read, two operations for 32 of them.

Each result is one sum in the order of the inputs, whatever the block is: so it does not depend on the rows beside it.
Source: Anatomy of High-Performance Matrix Multiplication, Goto and van de Geijn 2008.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from text_generation_server.cpu_kernels.compiler import Kernel, new_code, processor_has
from text_generation_server.cpu_kernels.language import LANES, Code, Pointer, Value, Variable
from text_generation_server.cpu_kernels.panels import (
    LINE,
    NUM_ARGUMENTS,
    PANEL,
    PANELS_PER_UNIT,
    STEP,
    Epilogue,
    Method,
    Operands,
    Share,
    pack_by_tiles,
)

ROWS_PER_UNIT = 48
"""A multiple of every largest block."""
INPUTS_AT_ONCE = 1536
"""Of so many rows: all of it in the second cache."""
WIDTH = INPUTS_AT_ONCE + LANES
"""Numbers from one row to the next. Known when the kernel is compiled: a block's rows have one address. No power of
two: lines at the same place of many pages throw one another out of the cache."""
PAIRS_AT_ONCE = 2
"""Of inputs, without a jump between them."""
LINES_AHEAD = 2
"""Of the cache, that a step of a block asks for of the next panel. Eight blocks of 6 rows ask for all of it; a single
one reads as fast as the memory by itself, since what it reads lies in one piece: 9 GB/s where the tiles of a panel
alternated by steps, 16 since, of 20 that both cores read."""


ROWS_THAT_ASK = 4
"""In a block that comes first, which ask for the next step's weights: the core is busy for longer than it sees ahead.
Measured for 2,048 x 2,048 with AVX2 on two cores: 4 rows take 0.61 ms instead of 0.68, 8 take 0.87 and 0.96. A single
row would read at four fifths of the speed."""


@dataclass(frozen=True, slots=True)
class Block:
    """What is summed up in registers."""

    rows: int
    tiles: int


NARROW = (Block(1, 2), Block(2, 2), Block(4, 1), Block(6, 1))
"""For 16 registers of 8 numbers: 12 hold sums. The smallest that has a place for all rows that are left is taken."""
WIDE = (Block(1, 2), Block(4, 2), Block(12, 2))
"""For 32 registers of 16 numbers: 24 hold sums."""


@functools.cache
def method() -> Method:
    """For this processor."""
    blocks = WIDE if processor_has("avx512f") else NARROW
    return method_by(blocks, by_pairs=processor_has("avx512bf16"))


def method_by(blocks: tuple[Block, ...], *, by_pairs: bool) -> Method:
    """``by_pairs``: bfloat16 numbers are multiplied as they are."""
    return Method(
        rows_per_unit=ROWS_PER_UNIT,
        kernel=lambda epilogue, has_bias: _kernel(epilogue, has_bias, blocks, by_pairs),
        own_arguments=lambda num_rows, num_inputs: (),
        pack=pack_by_tiles,
    )


@functools.cache
def _kernel(epilogue: Epilogue, has_bias: bool, blocks: tuple[Block, ...], by_pairs: bool) -> Kernel:
    code = new_code("vector_product")
    operands = Operands(code)
    with operands.shares(code, ROWS_PER_UNIT) as share:
        rows = _Rows(code, operands, blocks, share, by_pairs=by_pairs)
        _Unit(code, operands, rows, share).multiply(epilogue, has_bias=has_bias)
    return Kernel(code, num_arguments=NUM_ARGUMENTS)


class _Rows:
    """A unit's rows, as they are multiplied, and the blocks that they are cut into."""

    def __init__(
        self, code: Code, operands: Operands, blocks: tuple[Block, ...], share: Share, *, by_pairs: bool
    ) -> None:
        self.code, self.by_pairs = code, by_pairs
        self.first, self.stop = share.first_row, share.stop_row
        self.blocks, self.most = blocks, blocks[-1].rows
        self.source, self.num_inputs = operands.rows, operands.num_inputs
        room = code.scratch(ROWS_PER_UNIT * WIDTH)
        self.numbers = room.of(torch.bfloat16) if by_pairs else room
        self.num_blocks = (self.stop - self.first + (self.most - 1)) // self.most

    def take(self, first_input: Value, stop_input: Value) -> None:
        """Some inputs of all rows. The last one stands in for those that a block lacks."""
        code = self.code
        with code.loop(self.num_blocks * self.most) as row:
            own = code.smaller(self.first + row, self.stop - 1)
            source, target = self.source + (own * self.num_inputs + first_input), self.numbers + row * WIDTH
            with code.loop(stop_input - first_input, step=STEP) as place:
                if self.by_pairs:
                    target.put_bits(place, source.bits(place))
                else:
                    for each in range(0, STEP, LANES):
                        target.put(place + each, source.vector(place + each))


class _Unit:
    """The code of a unit: some rows, some panels, all for some of the inputs, then for the next."""

    def __init__(self, code: Code, operands: Operands, rows: _Rows, share: Share) -> None:
        self.code, self.operands, self.rows = code, operands, rows
        self.first_panel, self.stop_panel = share.first_panel, share.stop_panel
        self.results = code.scratch(PANELS_PER_UNIT * ROWS_PER_UNIT * PANEL)
        """Of one panel, or of all if inputs come in parts."""

    def multiply(self, epilogue: Epilogue, *, has_bias: bool) -> None:
        code, rows, num_inputs = self.code, self.rows, self.operands.num_inputs
        has_parts = num_inputs > INPUTS_AT_ONCE
        with code.loop(num_inputs, step=INPUTS_AT_ONCE) as first_input:
            stop_input = code.smaller(first_input + INPUTS_AT_ONCE, num_inputs)
            rows.take(first_input, stop_input)
            with code.loop(self.stop_panel, self.first_panel) as panel:
                place = (panel - self.first_panel) * (ROWS_PER_UNIT * PANEL)
                results = self.results + code.choose(has_parts, place, code.integer(0))
                self._multiply_panel(results, panel, first_input, stop_input)
                with code.when(stop_input.equals(num_inputs)), code.loop(rows.stop, rows.first) as row:
                    sums = [results.vector((row - rows.first) * PANEL + tile * LANES) for tile in range(2)]
                    self.operands.store(code, epilogue, row, panel, sums, has_bias=has_bias)

    def _multiply_panel(self, results: Pointer, panel: Value, first_input: Value, stop_input: Value) -> None:
        code, rows, num_inputs = self.code, self.rows, self.operands.num_inputs
        weights = self.operands.weights + (panel * (2 * num_inputs) + first_input) * LANES
        count = stop_input - first_input
        next_panel = code.smaller(panel + 1, self.stop_panel - 1) * num_inputs * PANEL
        with code.loop(rows.num_blocks) as number:
            first_row = number * rows.most
            left = code.smaller(rows.stop - rows.first - first_row, code.integer(rows.most))
            # Each block asks for another piece of the next panel.
            piece = code.smaller(first_input + number * count, num_inputs - count) * (LINES_AHEAD * LINE // STEP)
            part = _Part(weights, self.operands.weights + (next_panel + piece), count, first_input.equals(0))
            smaller = 0
            for block in rows.blocks:
                with code.when((left > smaller).both(left <= block.rows)):
                    self._multiply_block(block, results, first_row, part)
                smaller = block.rows

    def _multiply_block(self, block: Block, results: Pointer, first_row: Value, part: _Part) -> None:
        code, rows, tile_size = self.code, self.rows, self.operands.num_inputs * LANES
        for first_tile in range(0, 2, block.tiles):
            places = [
                [(first_row + row) * PANEL + (first_tile + tile) * LANES for tile in range(block.tiles)]
                for row in range(block.rows)
            ]
            sums = [
                [code.variable(code.choose(part.is_first, code.vector(0), results.vector(place))) for place in row]
                for row in places
            ]
            numbers = rows.numbers + first_row * WIDTH
            tiles = [part.weights + tile_size * (first_tile + tile) for tile in range(block.tiles)]
            with code.loop(part.count, step=STEP) as step:
                for line in range(LINES_AHEAD):
                    part.ahead.prefetch(step * (LINES_AHEAD * LINE // STEP) + line * LINE)
                if block.rows >= ROWS_THAT_ASK:
                    with code.when(first_row.equals(0)):
                        for tile in tiles:
                            for line in range(STEP * LANES // LINE):
                                tile.prefetch((step + STEP) * LANES + line * LINE)
                with code.loop(STEP, step=2 * PAIRS_AT_ONCE) as place:
                    for pair in range(0, 2 * PAIRS_AT_ONCE, 2):
                        bits = [weights.bits((step + place + pair) * LANES) for weights in tiles]
                        self._add_pair(sums, bits, numbers + (step + place + pair))
            for row_places, row_sums in zip(places, sums, strict=True):
                for place, total in zip(row_places, row_sums, strict=True):
                    results.put(place, total.get())

    def _add_pair(self, sums: list[list[Variable]], bits: list[Value], numbers: Pointer) -> None:
        """A pair of inputs, of all rows of a block, with those of its tiles."""
        code = self.code
        if self.rows.by_pairs:
            for row, row_sums in enumerate(sums):
                both = numbers.spread_bits(row * WIDTH)
                for pairs, total in zip(bits, row_sums, strict=True):
                    total.set(code.dot_pairs(both, pairs, total.get()))
            return
        for place, numbers_of in enumerate((code.lower_numbers, code.upper_numbers)):
            weights = [numbers_of(pairs) for pairs in bits]
            for row, row_sums in enumerate(sums):
                number = code.spread(numbers[row * WIDTH + place])
                for weight, total in zip(weights, row_sums, strict=True):
                    total.set(code.multiply_add(number, weight, total.get()))


@dataclass(frozen=True, slots=True)
class _Part:
    """Some inputs of a panel."""

    weights: Pointer
    ahead: Pointer
    """What is asked for meanwhile."""
    count: Value
    is_first: Value
