"""How weights of products are packed, and what may follow a product while results are at hand.

Weights lie in the order in which they are read: panels of 32 outputs, in these two tiles of 16 outputs and steps of 32
inputs, in these pairs of inputs. So tiles of AMX can be loaded as they lie, and so can vectors that have a pair of
inputs in each lane.

Shape legend: K inputs, N outputs.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from text_generation_server.cpu_kernels.compiler import Kernel
from text_generation_server.cpu_kernels.language import LANES, Code, Value

PANEL = 2 * LANES
"""Outputs of a panel."""
STEP = 32
"""Inputs of a step."""
LINE = 32
"""Numbers of a line of the cache."""
PANELS_PER_UNIT = 16
"""That a thread multiplies in one go, at most."""
NUM_ARGUMENTS = 11
"""Of every kernel, in the order of `Operands`; behind them come the method's own."""


class Epilogue(enum.Enum):
    NONE = "x"
    ADD = "x + other"
    GATED = "silu(gate) * up"
    """Outputs alternate: 16 of the gate, 16 of what it is multiplied with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A way to multiply."""

    rows_per_unit: int
    """That a thread multiplies with a panel that it has once read."""
    kernel: Callable[[Epilogue, bool], Kernel]
    """By what follows, and whether there is a bias."""
    own_arguments: Callable[[int, int], tuple[int, ...]]
    """Of such a kernel, for a number of rows and of inputs."""
    pack: Callable[[Tensor], Tensor]
    """`pack_by_steps` or `pack_by_tiles`."""


def pack_by_steps(weight_NK: Tensor) -> Tensor:
    """Flat: in a panel the steps, in a step both tiles."""
    return _parts(weight_NK).permute(0, 3, 1, 4, 2, 5).contiguous().flatten()


def pack_by_tiles(weight_NK: Tensor) -> Tensor:
    """Flat: in a panel both tiles, in a tile the steps."""
    return _parts(weight_NK).permute(0, 1, 3, 4, 2, 5).contiguous().flatten()


def _parts(weight_NK: Tensor) -> Tensor:
    """[panels, tiles, outputs, steps, pairs, 2]. The last panel overlaps the one before if outputs are no multiple of
    32."""
    num_outputs, num_inputs = weight_NK.shape
    if rest := num_outputs % PANEL:
        weight_NK = torch.cat((weight_NK[: num_outputs - rest], weight_NK[-PANEL:]))
    return weight_NK.reshape(-1, 2, LANES, num_inputs // STEP, STEP // 2, 2)


def gate_and_up(gate_NK: Tensor, up_NK: Tensor) -> Tensor:
    """The weight for ``Epilogue.GATED``, to be packed."""
    num_outputs, num_inputs = gate_NK.shape
    pairs = torch.stack((gate_NK.view(-1, LANES, num_inputs), up_NK.view(-1, LANES, num_inputs)), 1)
    return pairs.view(2 * num_outputs, num_inputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What a thread multiplies as one unit of work."""

    first_panel: Value
    stop_panel: Value
    first_row: Value
    stop_row: Value


class Operands:
    """What all kernels are given: see ``PackedProduct.arguments``."""

    def __init__(self, code: Code) -> None:
        self.rows, self.weights, self.out = (code.tensor(argument, torch.bfloat16) for argument in (1, 2, 3))
        self.bias, self.other = code.tensor(4, torch.float32), code.tensor(5, torch.bfloat16)
        self.num_rows, self.num_inputs, self.num_panels, self.width = (
            code.arguments[number] for number in range(6, 10)
        )
        self.panels_per_unit, self.num_units = code.arguments[10], code.arguments[11]

    @contextlib.contextmanager
    def shares(self, code: Code, rows_per_unit: int) -> Iterator[Share]:
        """What this thread takes, one share after another, until none is left."""
        num_parts = (self.num_rows + (rows_per_unit - 1)) // rows_per_unit
        with code.units(self.num_units) as unit:
            first_panel = (unit // num_parts) * self.panels_per_unit
            first_row = unit % num_parts * rows_per_unit
            yield Share(
                first_panel=first_panel,
                stop_panel=code.smaller(first_panel + self.panels_per_unit, self.num_panels),
                first_row=first_row,
                stop_row=code.smaller(first_row + rows_per_unit, self.num_rows),
            )

    def store(
        self, code: Code, epilogue: Epilogue, row: Value, panel: Value, results: list[Value], *, has_bias: bool
    ) -> None:
        """What becomes of a row's 32 results of a panel."""
        begin = panel * PANEL
        if epilogue is Epilogue.NONE:
            begin = code.smaller(begin, self.width - PANEL)
        if has_bias:
            bias = self.bias + begin
            results = [result + bias.vector(place * LANES) for place, result in enumerate(results)]
        if epilogue is Epilogue.GATED:
            gate, up = results
            results, begin = [gate / (code.exp(0 - gate) + 1) * up], panel * LANES
        begin = row * self.width + begin
        if epilogue is Epilogue.ADD:
            other = self.other + begin
            results = [result + other.vector(place * LANES) for place, result in enumerate(results)]
        out = self.out + begin
        for place, result in enumerate(results):
            out.put(place * LANES, result)
