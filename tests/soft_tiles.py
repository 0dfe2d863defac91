"""AMX in software: kernels that multiply in tiles, compiled for a processor without, call functions of Python instead.

Slow, and right. Every thread has registers of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from text_generation_server.cpu_kernels import compiler, tiled_product, tiles
from text_generation_server.cpu_kernels.compiler import Kernel
from text_generation_server.cpu_kernels.language import Code
from text_generation_server.cpu_kernels.panels import Epilogue, Method

TILES = 8
ROW_BYTES = 64
_ADDRESS, _TILE, _SIZE = ctypes.c_void_p, ctypes.c_uint8, ctypes.c_int64
INSTRUCTIONS: dict[str, tuple[Any, ...]] = {
    "ldtilecfg": (_ADDRESS,),
    "sttilecfg": (_ADDRESS,),
    "tilezero": (_TILE,),
    "tileloadd64": (_TILE, _ADDRESS, _SIZE),
    "tilestored64": (_TILE, _ADDRESS, _SIZE),
    "tdpbf16ps": (_TILE, _TILE, _TILE),
}
"""LLVM's names for them and their arguments."""


class SoftTiles:
    """The registers of a core, and what the instructions do to them."""

    def __init__(self) -> None:
        self.shapes = np.zeros(ROW_BYTES, np.uint8)
        self.bytes = np.zeros((TILES, 16, ROW_BYTES), np.uint8)

    def _height(self, tile: int) -> int:
        assert self.shapes[16 + 2 * tile] == ROW_BYTES, "all of our tiles have whole rows"
        return int(self.shapes[48 + tile])

    def ldtilecfg(self, address: int) -> None:
        self.shapes[:] = _memory(address, ROW_BYTES)
        self.bytes[:] = 0

    def sttilecfg(self, address: int) -> None:
        _memory(address, ROW_BYTES)[:] = self.shapes

    def tilezero(self, tile: int) -> None:
        self.bytes[tile] = 0

    def tileloadd64(self, tile: int, address: int, stride: int) -> None:
        self.bytes[tile] = 0
        for row in range(self._height(tile)):
            self.bytes[tile, row] = _memory(address + row * stride, ROW_BYTES)

    def tilestored64(self, tile: int, address: int, stride: int) -> None:
        for row in range(self._height(tile)):
            _memory(address + row * stride, ROW_BYTES)[:] = self.bytes[tile, row]

    def tdpbf16ps(self, result: int, rows: int, pairs: int) -> None:
        height = self._height(result)
        assert height == self._height(rows)
        assert self._height(pairs) == 16
        left = _numbers(self.bytes[rows])
        right = _numbers(self.bytes[pairs]).reshape(16, 16, 2).transpose(0, 2, 1).reshape(32, 16)
        sums = self.bytes[result].view(np.float32)
        with np.errstate(invalid="ignore"):
            sums[:height] = (sums + left @ right)[:height]


def _memory(address: int, count: int) -> Any:
    return np.ctypeslib.as_array((ctypes.c_uint8 * count).from_address(address))


def _numbers(halves: Any) -> Any:
    """bfloat16 numbers as float64."""
    return (halves.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)


@functools.cache
def _installed() -> list[Any]:
    """The functions under the names that `emulated` has kernels call; they live as long as the process."""
    registers: defaultdict[int, SoftTiles] = defaultdict(SoftTiles)

    def on_this_thread(name: str) -> Callable[..., None]:
        return lambda *arguments: getattr(registers[threading.get_ident()], name)(*arguments)

    held = [ctypes.CFUNCTYPE(None, *kinds)(on_this_thread(name)) for name, kinds in INSTRUCTIONS.items()]
    for name, callback in zip(INSTRUCTIONS, held, strict=True):
        where = ctypes.cast(callback, ctypes.c_void_p).value
        assert where is not None
        compiler._llvm().add_symbol(f"soft_{name}", where)
    return held


@contextlib.contextmanager
def emulated() -> Iterator[None]:
    """Kernels that are compiled meanwhile have tiles in software."""
    _installed()
    finish = Code.finish

    def with_functions(code: Code) -> str:
        text = finish(code)
        for name in INSTRUCTIONS:
            text = text.replace(f"llvm.x86.{name}", f"soft_{name}")
        return text

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Code, "finish", with_functions)
        patch.setattr(tiles, "are_available", lambda: True)
        yield


@functools.cache
def _kernel(epilogue: Epilogue, has_bias: bool) -> Kernel:
    with emulated():
        return tiled_product.kernel.__wrapped__(epilogue, has_bias)


METHOD = Method(
    rows_per_unit=tiled_product.METHOD.rows_per_unit,
    kernel=_kernel,
    own_arguments=tiled_product.METHOD.own_arguments,
    pack=tiled_product.METHOD.pack,
)
"""Products in tiles, in software."""
