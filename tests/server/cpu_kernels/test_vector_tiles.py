"""Products of tiles, against products in float64: of vectors, and of AMX where it is."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from text_generation_server.cpu_kernels import compiler, tiles
from text_generation_server.cpu_kernels.compiler import Kernel
from text_generation_server.cpu_kernels.language import LANES, Code, Pointer
from text_generation_server.cpu_kernels.prefill_attention import Registers
from text_generation_server.cpu_kernels.tiles import NUMBERS, ROWS, STEP, Tiles
from text_generation_server.cpu_kernels.vector_tiles import VectorTiles
from torch import Tensor

pytestmark = pytest.mark.skipif(
    compiler.reason_unavailable() is not None, reason=f"no kernels here: {compiler.reason_unavailable()}"
)

WIDTH = 3 * STEP + 8
"""Of the memory that rows lie in."""
REGISTERS = [
    pytest.param(
        Tiles,
        id="tiles",
        marks=pytest.mark.skipif(not tiles.are_available(), reason="the processor has no tiles (AMX)"),
    ),
    pytest.param(functools.partial(VectorTiles, dtype=torch.bfloat16), id="vectors of pairs"),
    pytest.param(functools.partial(VectorTiles, dtype=torch.float32), id="vectors of float32"),
]


def copied(code: Code, registers: Registers, source: Pointer, count: int, row_numbers: int = STEP) -> Pointer:
    """``count`` tiles of what lies one beside the other."""
    place = code.scratch(count * NUMBERS * registers.dtype.itemsize // 4).of(registers.dtype)
    for tile in range(count):
        with code.loop(ROWS) as row:
            bits = source.bits(row * row_numbers + tile * (STEP if row_numbers > STEP else NUMBERS))
            registers.put_pairs(place + (row * STEP + tile * NUMBERS), bits)
    return place


def products(
    new_registers: Callable[[Code], Registers], rows: Tensor, pairs: Tensor, sums: Tensor, *, steps: int, known: bool
) -> Tensor:
    """``sums`` and, of each result, the products; ``known``: the number of steps, when the kernel is written."""
    code = compiler.new_code("tested")
    registers = new_registers(code)
    with registers.shaped(code.arguments[4]):
        right = copied(code, registers, code.tensor(2, torch.bfloat16), steps)
        left = [code.tensor(1, torch.bfloat16) + result * (ROWS * WIDTH) for result in range(len(rows))]
        if not registers.reads_in_place:
            left = [copied(code, registers, place, steps, row_numbers=WIDTH) for place in left]
        out = code.tensor(3, torch.float32)
        registers.add_products(
            [out + result * (ROWS * LANES) for result in range(len(rows))],
            left,
            right,
            steps=steps if known else code.arguments[5],
            row_numbers=WIDTH if registers.reads_in_place else STEP,
            step_numbers=STEP if registers.reads_in_place else NUMBERS,
            is_new=known,
        )
    kernel = Kernel(code, num_arguments=5)
    shapes = tiles.shapes(2 * LANES)
    kernel(*(each.data_ptr() for each in (rows, pairs, sums, shapes)), steps, units=1)
    return sums


@pytest.mark.parametrize("new_registers", REGISTERS)
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("known", [True, False], ids=["new sums of known steps", "sums go on"])
def test_products(new_registers: Callable[[Code], Registers], steps: int, count: int, known: bool) -> None:
    torch.manual_seed(0)
    rows = torch.full((count, ROWS, WIDTH), math.nan).bfloat16()  # nothing beside a row takes part
    rows[..., : steps * STEP] = torch.randn(count, ROWS, steps * STEP).bfloat16()
    pairs = torch.randn(steps, STEP // 2, LANES, 2).bfloat16()
    sums = torch.randn(count, ROWS, LANES)
    numbers = pairs.double().transpose(2, 3).reshape(steps * STEP, LANES)
    expected = (0 if known else sums.double()) + rows[..., : steps * STEP].double() @ numbers
    actual = products(new_registers, rows, pairs, sums, steps=steps, known=known)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-4)


def test_rows_of_float32_may_lie_side_by_side() -> None:
    torch.manual_seed(0)
    rows, pairs = torch.randn(2, 2 * ROWS, LANES), torch.randn(2, 2 * ROWS, LANES)
    """Two steps of what is summed over: [2, 32, 16]."""
    sums = torch.zeros(ROWS, LANES)
    code = compiler.new_code("tested")
    left, right, out = (code.tensor(argument, torch.float32) for argument in (1, 2, 3))
    VectorTiles(code, dtype=torch.float32).add_products(
        [out], [left], right, steps=2, row_numbers=1, step_numbers=NUMBERS, is_new=True
    )
    Kernel(code, num_arguments=3)(rows.data_ptr(), pairs.data_ptr(), sums.data_ptr(), units=1)
    expected = rows.flatten(0, 1).double().T @ pairs.flatten(0, 1).double()
    torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("new_registers", REGISTERS)
def test_numbers_become_pairs(new_registers: Callable[[Code], Registers]) -> None:
    torch.manual_seed(0)
    numbers = torch.randn(2, LANES)
    code = compiler.new_code("tested")
    registers = new_registers(code)
    source, target = code.tensor(1, torch.float32), code.tensor(2, registers.dtype)
    registers.put_numbers(target, source.vector(0), source.vector(LANES))
    out = torch.zeros(STEP, dtype=registers.dtype)
    Kernel(code, num_arguments=2)(numbers.data_ptr(), out.data_ptr(), units=1)
    expected = numbers if registers.dtype == torch.float32 else numbers.bfloat16().T
    assert torch.equal(out, expected.flatten())
