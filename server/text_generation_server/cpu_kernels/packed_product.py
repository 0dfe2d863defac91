"""Products of bfloat16 rows with weights that are packed once, by tiles where the processor has them, else by vectors.

Any number of rows is multiplied as it is, and a number not seen before costs nothing. A row's result depends on nothing
beside it.

Shape legend: M rows, K inputs, N outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from text_generation_server.cpu_kernels import compiler, panels, tiled_product, tiles, vector_product
from text_generation_server.cpu_kernels.language import LANES
from text_generation_server.cpu_kernels.panels import PANEL, STEP, Epilogue, Method

UNITS_PER_THREAD = 4
"""At least, where there are as many panels: who is done takes another."""


MULTIPLES = {Epilogue.NONE: 1, Epilogue.ADD: PANEL, Epilogue.GATED: LANES}
"""Of outputs. Where nothing follows the last panel may overlap the one before."""


def supports(num_outputs: int, num_inputs: int, dtype: torch.dtype, epilogue: Epilogue = Epilogue.NONE) -> bool:
    fits = num_outputs >= PANEL and num_outputs % MULTIPLES[epilogue] == 0 and num_inputs % STEP == 0
    return fits and dtype == torch.bfloat16 and compiler.reason_unavailable() is None


def method() -> Method:
    """The one for this processor."""
    return tiled_product.METHOD if tiles.are_available() else vector_product.method()


def pack(weight_NK: Tensor) -> Tensor:
    """In the order in which this processor reads it, flat."""
    return method().pack(weight_NK)


class PackedProduct:
    """``epilogue(x @ weight.T + bias)`` for one packed weight."""

    def __init__(self, packed: Tensor, width: int, num_inputs: int, bias_N: Tensor | None, epilogue: Epilogue) -> None:
        """``packed`` is `pack`'s; ``width`` is N. Of gated products it is of `panels.gate_and_up`, without a bias."""
        assert bias_N is None or epilogue is not Epilogue.GATED
        assert width % MULTIPLES[epilogue] == 0
        self.packed = packed
        self.num_inputs = num_inputs
        self.width = width
        self.bias_N = None if bias_N is None else bias_N.float().contiguous()
        self.num_panels = packed.numel() // num_inputs // PANEL
        self._method = method()
        self.kernel = self._method.kernel(epilogue, self.bias_N is not None)

    def __call__(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """[..., K] -> [..., N], bfloat16. ``other`` has the result's shape."""
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

    def _num_parts(self, num_rows: int) -> int:
        return -(-num_rows // self._method.rows_per_unit)

    def _panels_per_unit(self, num_rows: int) -> int:
        """Few enough for all threads to be busy to the end: a thread takes several units, one after the other."""
        units = UNITS_PER_THREAD * torch.get_num_threads()
        return max(1, min(panels.PANELS_PER_UNIT, self.num_panels * self._num_parts(num_rows) // units))

    def units(self, num_rows: int) -> int:
        return self._num_parts(num_rows) * -(-self.num_panels // self._panels_per_unit(num_rows))

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
            self.width,
            self._panels_per_unit(num_rows),
            self.units(num_rows),
            *self._method.own_arguments(num_rows, self.num_inputs),
        )
