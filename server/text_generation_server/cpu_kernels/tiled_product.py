"""Products of bfloat16 rows with weights that are packed once, and what follows them while results are at hand.

The weights lie in the order in which they are read: panels of 32 outputs, in these steps of 32 inputs, in these two
tiles of 16 outputs, in these pairs of inputs. That is what AMX multiplies with: without it the products are oneDNN's.
Any number of rows is multiplied as it is, and a number not seen before costs nothing.

Shape legend: M rows, K inputs, N outputs.
"""

from __future__ import annotations

import enum
import functools

import torch
from torch import Tensor

from text_generation_server.cpu_kernels import tiles
from text_generation_server.cpu_kernels.compiler import Kernel, new_code
from text_generation_server.cpu_kernels.language import LANES, Code, Value
from text_generation_server.cpu_kernels.tiles import STEP, Tiles

PANEL = 2 * LANES
"""Outputs of a unit of work, and rows that are multiplied at once: two tiles by two."""
PANELS_BYTES = 2**19
"""Of panels that stay in the second cache while 32 rows after 32 rows are multiplied with them."""
ROWS_PER_UNIT = 128
"""Rows that a thread multiplies with panels that it has once read. Measured for all products of a model of 135M
parameters on 2 cores: 128 rows take 31 ms in units of 64, 27 ms in units of 128; more does not help."""
UNITS_PER_THREAD = 4
"""At least, where there are as many panels: who is done takes another."""


class Epilogue(enum.Enum):
    NONE = "x"
    ADD = "x + other"
    GATED = "silu(gate) * up"
    """Outputs alternate: 16 of the gate, 16 of what it is multiplied with."""


def supports(num_outputs: int, num_inputs: int, dtype: torch.dtype) -> bool:
    fits = num_outputs % PANEL == 0 and num_inputs % STEP == 0
    return fits and dtype == torch.bfloat16 and tiles.are_available()


def pack(weight_NK: Tensor) -> Tensor:
    """In the order described above, flat."""
    num_outputs, num_inputs = weight_NK.shape
    parts = weight_NK.reshape(num_outputs // PANEL, 2, LANES, num_inputs // STEP, STEP // 2, 2)
    return parts.permute(0, 3, 1, 4, 2, 5).contiguous().flatten()


def pack_gated(gate_NK: Tensor, up_NK: Tensor) -> Tensor:
    """For ``Epilogue.GATED``."""
    num_outputs, num_inputs = gate_NK.shape
    pairs = torch.stack((gate_NK.view(-1, LANES, num_inputs), up_NK.view(-1, LANES, num_inputs)), 1)
    return pack(pairs.view(2 * num_outputs, num_inputs))


class TiledProduct:
    """``epilogue(x @ weight.T + bias)`` for one packed weight."""

    def __init__(self, packed: Tensor, num_inputs: int, bias_N: Tensor | None, epilogue: Epilogue) -> None:
        """``packed`` is `pack`'s, or `pack_gated`'s, which has no bias."""
        assert bias_N is None or epilogue is not Epilogue.GATED
        self.packed = packed
        self.num_inputs = num_inputs
        self.width = packed.numel() // num_inputs // (2 if epilogue is Epilogue.GATED else 1)
        self.bias_N = None if bias_N is None else bias_N.float().contiguous()
        self.kernel = _kernel(epilogue, self.bias_N is not None)
        self.num_panels = packed.numel() // num_inputs // PANEL
        self.panels_per_unit = max(1, PANELS_BYTES // (2 * PANEL * num_inputs))

    def __call__(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """[..., K] -> [..., N], or half as many when gated; bfloat16. ``other`` has the result's shape."""
        x = x.contiguous()
        out = x.new_empty((*x.shape[:-1], self.width))
        other = None if other is None else other.contiguous()
        assert x.dtype == torch.bfloat16
        assert x.shape[-1] == self.num_inputs
        assert other is None or (other.shape == out.shape and other.dtype == x.dtype)
        num_rows = x.numel() // self.num_inputs
        addresses = x.data_ptr(), out.data_ptr(), 0 if other is None else other.data_ptr()
        self.kernel(*self.arguments(num_rows, *addresses), units=self.units(num_rows))
        return out

    def _panels_per_unit(self, num_rows: int) -> int:
        """Few enough for all threads to be busy to the end: a thread takes several units, one after the other."""
        units = UNITS_PER_THREAD * torch.get_num_threads()
        return max(1, min(self.panels_per_unit, self.num_panels * -(-num_rows // ROWS_PER_UNIT) // units))

    def units(self, num_rows: int) -> int:
        return -(-num_rows // ROWS_PER_UNIT) * -(-self.num_panels // self._panels_per_unit(num_rows))

    def arguments(self, num_rows: int, x: int, out: int, other: int = 0) -> tuple[int, ...]:
        """The kernel's, for rows at the address ``x``. ``other`` may be ``out``: then the product is added to it."""
        return (
            x,
            self.packed.data_ptr(),
            out,
            0 if self.bias_N is None else self.bias_N.data_ptr(),
            other,
            num_rows,
            self.num_inputs,
            self.num_panels,
            self._panels_per_unit(num_rows),
            self.units(num_rows),
            tiles.shapes(PANEL).data_ptr(),
            tiles.shapes(num_rows % PANEL or PANEL).data_ptr(),
        )


NUM_ARGUMENTS = 12


@functools.cache
def _kernel(epilogue: Epilogue, has_bias: bool) -> Kernel:
    code = new_code("tiled_product")
    num_rows, num_panels, panels_per_unit = (code.arguments[number] for number in (6, 8, 9))
    shapes_of_others = Tiles.save(code)
    num_parts = (num_rows + (ROWS_PER_UNIT - 1)) // ROWS_PER_UNIT
    with code.units(code.arguments[10]) as unit:
        product = _Product(code, epilogue, has_bias=has_bias)
        first_panel = (unit // num_parts) * panels_per_unit
        stop_panel = code.smaller(first_panel + panels_per_unit, num_panels)
        first_row = unit % num_parts * ROWS_PER_UNIT
        with code.loop(code.smaller(first_row + ROWS_PER_UNIT, num_rows), first_row, step=PANEL) as row:
            _multiply(product, row, first_panel, stop_panel)
    Tiles.restore(code, shapes_of_others)
    return Kernel(code, num_arguments=NUM_ARGUMENTS)


class _Product:
    """Where things are, and what happens to results."""

    def __init__(self, code: Code, epilogue: Epilogue, *, has_bias: bool) -> None:
        self.code, self.epilogue, self.has_bias = code, epilogue, has_bias
        self.num_inputs = code.arguments[7]
        self.rows, self.weights = code.tensor(1, torch.bfloat16), code.tensor(2, torch.bfloat16)
        self.width = code.arguments[8] * (LANES if epilogue is Epilogue.GATED else PANEL)

    def finish(self, row: Value, panel: Value, results: list[Value]) -> None:
        """Store what becomes of the results of a row and a panel."""
        code = self.code
        if self.has_bias:
            bias = code.tensor(4, torch.float32) + panel * PANEL
            results = [result + bias.vector(place * LANES) for place, result in enumerate(results)]
        if self.epilogue is Epilogue.GATED:
            gate, up = results
            results = [gate / (code.exp(0 - gate) + 1) * up]
        begin = row * self.width + panel * (len(results) * LANES)
        if self.epilogue is Epilogue.ADD:
            other = code.tensor(5, torch.bfloat16) + begin
            results = [result + other.vector(place * LANES) for place, result in enumerate(results)]
        out = code.tensor(3, torch.bfloat16) + begin
        for place, result in enumerate(results):
            out.put(place * LANES, result)


def _multiply(product: _Product, row: Value, first: Value, stop: Value) -> None:
    """32 rows, or the last ones in tiles that are as high as there are rows, with one panel after the other."""
    code = product.code
    registers, left = Tiles(code), code.arguments[6] - row
    results = code.scratch(PANEL * PANEL)
    is_full = left >= PANEL
    registers.shape(code.choose(is_full, code.arguments[11], code.arguments[12]))
    num_rows = code.choose(is_full, code.integer(PANEL), left)
    for halves in (1, 2):
        with code.when(left > LANES if halves == 2 else left < LANES + 1), code.loop(stop, first) as panel:
            _multiply_tiles(registers, product, row, panel, halves)
            for number in range(2 * halves):
                half, side = divmod(number, 2)
                registers.store(number, results + (half * PANEL + side) * LANES, 4 * PANEL)
            with code.loop(num_rows) as each:
                sums = [results.vector(each * PANEL + place) for place in range(0, PANEL, LANES)]
                product.finish(row + each, panel, sums)


def _multiply_tiles(registers: Tiles, product: _Product, row: Value, panel: Value, halves: int) -> None:
    """16 rows, or 32, with a panel. It passes by: rows are what the nearest cache had better keep."""
    code = registers.code
    for number in range(2 * halves):
        registers.zero(number)
    with code.loop(product.num_inputs // STEP) as step:
        rows = product.rows + (row * product.num_inputs + step * STEP)
        weights = product.weights + (panel * product.num_inputs + step * STEP) * PANEL
        for side in range(2):
            registers.load(6 + side, weights + side * (STEP * LANES), 2 * STEP, passing=True)
        for half in range(halves):
            registers.load(4 + half, rows + product.num_inputs * (half * LANES), product.num_inputs * 2)
            for side in range(2):
                registers.multiply(2 * half + side, 4 + half, 6 + side)
