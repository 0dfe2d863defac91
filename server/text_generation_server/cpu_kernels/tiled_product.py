"""Products of bfloat16 rows with packed weights by AMX.

Source: see ``tiles.py``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from text_generation_server.cpu_kernels import tiles
from text_generation_server.cpu_kernels.compiler import Kernel, new_code
from text_generation_server.cpu_kernels.language import LANES, Code, Value
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
    pack_by_steps,
)
from text_generation_server.cpu_kernels.tiles import Tiles

ROWS_PER_UNIT = 128
"""Rows that a thread multiplies with a panel that it has once read, 32 at once: two tiles by two. Measured for all
products of a model of 135M parameters, processor time of one core: 128 rows take 42 ms in units of 64, 38 ms in units
of 128; 512 rows take 117 ms in these, 133 ms in units of 256."""
INPUTS_PER_CHUNK = 2048
"""Inputs after which other rows and other outputs have their turn, where there are more than `PANEL` rows: with so many
inputs at a time rows and weights fit the second cache together. Measured on 2 cores, 512 rows of 8,192 inputs, 2,048
outputs: 8.7 ms, with chunks of 4,096 inputs 9.8, and 14.0 with fewer rows in a unit instead."""
NEAR = 16 * STEP
"""Inputs by which weights are asked for ahead, where they are used once: a whole panel would be too long before."""


def _own_arguments(num_rows: int, num_inputs: int) -> tuple[int, ...]:
    return (
        tiles.shapes(PANEL).data_ptr(),
        tiles.shapes(num_rows % PANEL or PANEL).data_ptr(),
        num_inputs if num_rows <= PANEL else min(num_inputs, INPUTS_PER_CHUNK),
    )


@functools.cache
def kernel(epilogue: Epilogue, has_bias: bool) -> Kernel:
    code = new_code("tiled_product")
    operands = Operands(code)
    shapes_of_others = Tiles.save(code)
    with operands.shares(code, ROWS_PER_UNIT) as share:
        _Unit(code, operands, epilogue, share, has_bias=has_bias).multiply()
    Tiles.restore(code, shapes_of_others)
    return Kernel(code, num_arguments=NUM_ARGUMENTS + 3)


METHOD = Method(rows_per_unit=ROWS_PER_UNIT, kernel=kernel, own_arguments=_own_arguments, pack=pack_by_steps)

LINES = PANEL * STEP // LINE
"""Of the cache, that a step of a panel fills."""
SUMS = 2 * PANEL * PANEL
"""Behind so many results come the sums of blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """What is multiplied at once."""

    row: Value
    """The first of up to 32."""
    panel: Value
    first_input: Value
    stop_input: Value
    sums: Value
    """Where among the results its sums over earlier chunks are."""
    first_line: Value
    """Of those of a step of weights that are asked for ahead meanwhile."""
    num_lines: Value


def _place(number: int) -> int:
    """Where a tile of results begins in a block's."""
    half, side = divmod(number, 2)
    return (half * PANEL + side) * LANES


class _Unit:
    """The code of a unit: some panels, each with some blocks of 32 rows, all for a chunk of inputs, then for the next.

    What becomes of a block's results is computed while the next block is multiplied: tiles are multiplied by a part of
    the core that vectors do not use. The weights of the next panel are asked for at the same time.
    """

    def __init__(
        self,
        code: Code,
        operands: Operands,
        epilogue: Epilogue,
        share: Share,
        *,
        has_bias: bool,
    ) -> None:
        self.code, self.operands, self.epilogue, self.has_bias = code, operands, epilogue, has_bias
        self.first_panel, self.stop_panel = share.first_panel, share.stop_panel
        self.first_row, self.stop_row = share.first_row, share.stop_row
        self.registers = Tiles(code)
        self.rows, self.weights, self.num_inputs = operands.rows, operands.weights, operands.num_inputs
        self.full_shape, self.last_shape, self.inputs_per_chunk = (
            code.arguments[NUM_ARGUMENTS + number] for number in (1, 2, 3)
        )
        self.results = code.scratch(SUMS + PANELS_PER_UNIT * ROWS_PER_UNIT * PANEL)
        """Of the block that is multiplied, and of the one before it; behind them sums of all blocks over the chunks
        there were."""
        nothing = code.integer(0)
        self.side = code.variable(nothing)
        """Which half of them comes next: 0, or where the second begins."""
        self.done_row, self.done_panel, self.num_done = (code.variable(nothing) for _ in range(3))
        """The block whose results wait: its first row, its panel, its rows."""

    def multiply(self) -> None:
        code = self.code
        num_rows = self.stop_row - self.first_row
        num_blocks = (num_rows + (PANEL - 1)) // PANEL
        lines_per_block = (LINES + num_blocks - 1) // num_blocks
        self._shape(num_rows)
        # The last block may have fewer rows than those before it; changing the shape of tiles takes its time.
        changes = (num_rows > PANEL).both(num_rows % PANEL > 0)
        chunks = code.loop((self.num_inputs + (self.inputs_per_chunk - 1)) // self.inputs_per_chunk)
        panels, blocks = code.loop(self.stop_panel, self.first_panel), code.loop(self.stop_row, self.first_row, PANEL)
        with chunks as chunk, panels as panel, blocks as row:
            left = self.stop_row - row
            with code.when(changes):
                self._shape(left)
            block = _Block(
                row=row,
                panel=panel,
                first_input=chunk * self.inputs_per_chunk,
                stop_input=code.smaller((chunk + 1) * self.inputs_per_chunk, self.num_inputs),
                sums=SUMS + ((panel - self.first_panel) * num_blocks + (row - self.first_row) // PANEL) * PANEL * PANEL,
                first_line=(row - self.first_row) // PANEL * lines_per_block,
                num_lines=lines_per_block,
            )
            for halves in (1, 2):
                with code.when(left > LANES if halves == 2 else left < LANES + 1):
                    self._multiply_tiles(block, halves)
            with code.when(block.stop_input.equals(self.num_inputs)):
                self.done_row.set(row)
                self.done_panel.set(panel)
                self.num_done.set(code.smaller(left, code.integer(PANEL)))
                self.side.set(PANEL * PANEL - self.side.get())
        self._finish(code.integer(0), self.num_done.get())

    def _shape(self, num_rows: Value) -> None:
        """As high as there are rows, for a block that is not full."""
        self.registers.shape(self.code.choose(num_rows >= PANEL, self.full_shape, self.last_shape))

    def _multiply_tiles(self, block: _Block, halves: int) -> None:
        """16 rows, or 32, with a chunk of a panel."""
        code, registers, num_inputs = self.code, self.registers, self.num_inputs
        num_steps, num_done = (block.stop_input - block.first_input) // STEP, self.num_done.get()
        rows_per_step = (num_steps + (PANEL - 1)) // num_steps  # so that all are done in time
        with code.when(block.first_input.equals(0)):
            for number in range(2 * halves):
                registers.zero(number)
        with code.when(block.first_input > 0):
            for number in range(2 * halves):
                registers.load(number, self.results + (block.sums + _place(number)), 4 * PANEL)
        stop_line = code.smaller(block.first_line + block.num_lines, code.integer(LINES))
        begin, end = block.panel * num_inputs, self.stop_panel * num_inputs
        is_alone = self.stop_row - self.first_row < PANEL + 1
        next_panel = code.smaller(block.panel + 1, self.stop_panel - 1) * num_inputs
        with code.loop(block.stop_input, block.first_input, STEP) as place:
            rows = self.rows + (block.row * num_inputs + place)
            weights = self.weights + (begin + place) * PANEL
            for side in range(2):
                registers.load(6 + side, weights + side * (STEP * LANES), 2 * STEP)
            for half in range(halves):
                registers.load(4 + half, rows + num_inputs * (half * LANES), num_inputs * 2)
                for side in range(2):
                    registers.multiply(2 * half + side, 4 + half, 6 + side)
            near = code.smaller(begin + place + NEAR, end - STEP)
            ahead = self.weights + code.choose(is_alone, near, next_panel + place) * PANEL
            with code.loop(stop_line, block.first_line) as line:
                ahead.prefetch(line * STEP)
            first = (place - block.first_input) // STEP * rows_per_step
            self._finish(first, code.smaller(first + rows_per_step, num_done))
        results = self.results + code.choose(block.stop_input.equals(num_inputs), self.side.get(), block.sums)
        for number in range(2 * halves):
            registers.store(number, results + _place(number), 4 * PANEL)

    def _finish(self, first: Value, stop: Value) -> None:
        """Store what becomes of the results that wait, from one of their rows up to another."""
        code = self.code
        waiting = self.results + (PANEL * PANEL - self.side.get())
        row, panel = self.done_row.get(), self.done_panel.get()
        with code.loop(stop, first) as each:
            sums = [waiting.vector(each * PANEL + place) for place in range(0, PANEL, LANES)]
            self.operands.store(code, self.epilogue, row + each, panel, sums, has_bias=self.has_bias)
