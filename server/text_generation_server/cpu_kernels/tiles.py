"""AMX: eight registers that hold 16 rows of 64 bytes each, and one instruction that multiplies two of them.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from typing import Any

import torch
from llvmlite import ir
from torch import Tensor

from text_generation_server.cpu_kernels.compiler import processor_has
from text_generation_server.cpu_kernels.language import LANES, Code, Pointer, Value

ROWS = LANES
STEP = 32
"""Numbers of a row: what one multiplication sums over."""
NUMBERS = ROWS * STEP
SHAPES_BYTES = 64


def are_available() -> bool:
    """Whether this process may multiply bfloat16 numbers so."""
    return processor_has("amx-bf16") and _may_be_used()


class Tiles:
    """Results in tiles 0 to 3, what they are products of in 4 to 7."""

    dtype = torch.bfloat16
    """Of rows and pairs."""
    reads_in_place = True
    """Rows may lie where others have put them."""

    def __init__(self, code: Code) -> None:
        self.code = code

    @staticmethod
    def save(code: Code) -> Pointer:
        """The tile shapes that others have set on this thread, oneDNN for one: it does not set them again."""
        place = code.scratch(SHAPES_BYTES // 4)
        code.call("llvm.x86.sttilecfg", _kind("p"), place.address)
        return place

    @staticmethod
    def restore(code: Code, place: Pointer) -> None:
        code.call("llvm.x86.ldtilecfg", _kind("p"), place.address)

    def shape(self, address: Value) -> None:
        """Set the shapes of all tiles, `shapes`; which clears them."""
        place = self.code.pointer(address, torch.float32)
        self.code.call("llvm.x86.ldtilecfg", _kind("p"), place.address)

    def zero(self, tile: int) -> None:
        self.code.call("llvm.x86.tilezero", _kind("t"), _tile(tile))

    def load(self, tile: int, place: Pointer, row_bytes: Value | int) -> None:
        self.code.call(
            "llvm.x86.tileloadd64", _kind("tpi"), _tile(tile), place.address, self.code.integer(row_bytes).ir
        )

    def store(self, tile: int, place: Pointer, row_bytes: int) -> None:
        row = self.code.integer(row_bytes).ir
        self.code.call("llvm.x86.tilestored64", _kind("tpi"), _tile(tile), place.address, row)

    def multiply(self, result: int, rows: int, pairs: int) -> None:
        """Add to ``result`` [16, 16] in float32 the product of ``rows`` [16, 32] and ``pairs`` [32, 16]: its rows hold
        pairs of what is summed over, [16, 16, 2]."""
        tiles = (_tile(number) for number in (result, rows, pairs))
        self.code.call("llvm.x86.tdpbf16ps", _kind("ttt"), *tiles)

    # -- the words that processors without AMX know as well: `vector_tiles.VectorTiles` -----------------------------

    @contextlib.contextmanager
    def shaped(self, address: Value) -> Iterator[None]:
        """Tiles have the `shapes` inside, and those of others behind."""
        of_others = self.save(self.code)
        self.shape(address)
        yield
        self.restore(self.code, of_others)

    def put_pairs(self, place: Pointer, bits: Value) -> None:
        """Make 16 pairs of bfloat16 numbers a row of a tile."""
        place.put_bits(0, bits)

    def put_numbers(self, place: Pointer, lower: Value, upper: Value) -> None:
        """Make float32 numbers a row of pairs, rounded; not-a-number as `Code.to_half` has it."""
        place.put_bits(0, self.code.upper_halves(self.code.to_half(lower), self.code.to_half(upper)))

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
        """For up to 4 results, the sum over steps of 16 rows of 32 numbers times a tile of pairs.

        ``sums``: float32 [16, 16] each; what is there already is added to unless it ``is_new``. ``rows``: those of the
        first step, ``row_numbers`` from one to the next, ``step_numbers`` to the next step's. ``pairs``: tiles of
        [16 pairs, 16 lanes, 2], one behind another.
        """
        for result, target in enumerate(sums):
            if is_new:
                self.zero(result)
            else:
                self.load(result, target, 4 * LANES)
        with contextlib.ExitStack() as loop:
            each = range(steps) if isinstance(steps, int) else [loop.enter_context(self.code.loop(steps))]
            for step in each:
                self.load(6, pairs + step * NUMBERS, 2 * STEP)
                for result, place in enumerate(rows):
                    self.load(4 + result % 2, place + step * step_numbers, 2 * row_numbers)
                    self.multiply(result, 4 + result % 2, 6)
        for result, target in enumerate(sums):
            self.store(result, target, 4 * LANES)


def _kind(arguments: str) -> Any:
    kinds = {"p": ir.PointerType(), "t": ir.IntType(8), "i": ir.IntType(64)}
    return ir.FunctionType(ir.VoidType(), [kinds[each] for each in arguments])


def _tile(number: int) -> Any:
    return ir.Constant(ir.IntType(8), number)


@functools.cache
def shapes(num_rows: int) -> Tensor:
    """The 64 bytes that describe tiles for up to 32 rows: results of the first 16 in tiles 0 and 1, of the others in 2
    and 3; rows in 4 and 5; pairs in 6 and 7."""
    described = torch.zeros(SHAPES_BYTES, dtype=torch.uint8)
    described[0] = 1  # the only palette there is
    low, high = min(num_rows, ROWS), max(num_rows - ROWS, 0)
    for tile, height in enumerate((low, low, high, high, low, high, ROWS, ROWS)):
        if height:  # a tile has bytes in a row only if it has rows
            described[16 + 2 * tile] = 64
            described[48 + tile] = height
    return described


@functools.cache
def _may_be_used() -> bool:
    """Linux keeps the state of tiles only for a process that has asked for it."""
    system_call = ctypes.CDLL(None, use_errno=True).syscall
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return bool(system_call(arch_prctl, request_permission, tile_data) == 0)
