"""Compile every Triton kernel for a GPU that is not there, as the server would launch it; a program for a test.

Triton's compiler needs no GPU, and finds what its interpreter does not: sizes that are no power of two, types that
change in a loop, memory that a processor does not have. Prints a JSON line for each kernel that was compiled.

    python tests/compile_kernels.py --capability 90 --dtype bfloat16 --heads 32,8 --width 128 --cache float8_e4m3fn
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch
from text_generation_server.attention.interface import LayerSpec, Rotation
from text_generation_server.attention.triton_paged import TritonPaged
from text_generation_server.engine.inputs import ForwardInputs
from text_generation_server.engine.kv_cache import KVCache
from text_generation_server.gpu_kernels import arithmetic
from text_generation_server.gpu_kernels.rms_norm import add_rms_norm, rms_norm
from text_generation_server.gpu_kernels.silu_mul import silu_mul
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

CPU = torch.device("cpu")


class AbsentGPU:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(capability: int) -> None:
    """From now on a launch compiles, reports and launches nothing."""
    driver.set_active(AbsentGPU(capability))
    run = JITFunction.run
    reported: set[str] = set()

    def report(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        if kernel.hash not in reported:
            reported.add(kernel.hash)
            shared = int(kernel.metadata.shared)
            line = {"kernel": self.fn.__name__, "capability": capability, "shared_bytes": shared}
            sys.stdout.write(json.dumps(line) + "\n")
        return kernel

    JITFunction.run = report
    arithmetic.reason_unavailable = lambda device: None


def attend(layer: LayerSpec, dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    """A decode row and a prompt, with the rotation and without it."""
    contexts, queries = [300, 20], [1, 20]
    tables = [list(range(1, 20)), list(range(20, 22))]
    inputs = ForwardInputs(
        input_ids_T=torch.zeros(21, dtype=torch.int64),
        position_ids_T=torch.zeros(21, dtype=torch.int64),
        slots_T=torch.arange(21),
        num_decode_rows=1,
        query_lens=queries,
        context_lens=contexts,
        block_tables=tables,
        logits_indices_L=torch.zeros(0, dtype=torch.int64),
    )
    backend = TritonPaged(layers=[layer], block_size=16, dtype=dtype, device=CPU, kv_dtype=kv_dtype)
    cache = KVCache([layer], num_blocks=22, block_size=16, dtype=kv_dtype, device=CPU).layers[0]
    query, key, value = (
        torch.zeros(heads, 21, width, dtype=dtype)
        for heads, width in (
            (layer.query_heads, layer.key_dim), (layer.kv_heads, layer.key_dim), (layer.kv_heads, layer.value_dim)
        )
    )  # fmt: skip
    cos = torch.zeros(21, layer.key_dim, dtype=dtype)
    norm = torch.zeros(layer.query_heads + layer.kv_heads, layer.key_dim, dtype=dtype)
    rotations = [None, Rotation(cos, cos), Rotation(cos, cos, norm)] if layer.key_dim == layer.value_dim else [None]
    sinks = torch.zeros(layer.query_heads, dtype=dtype) if layer.has_sinks else None
    for rotation in rotations:
        backend.attend(
            backend.prepare(inputs), layer, cache, query, key, value,
            scaling=0.1, softcap=layer.softcap, sinks_H=sinks, rotation=rotation,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--cache", default=None)
    parser.add_argument("--heads", default="32,8")
    parser.add_argument("--width", default="128")
    arguments = parser.parse_args()
    compile_only(arguments.capability)
    dtype = getattr(torch, arguments.dtype)
    kv_dtype = getattr(torch, arguments.cache or arguments.dtype)
    query_heads, kv_heads = (int(count) for count in arguments.heads.split(","))
    widths = [int(width) for width in arguments.width.split(",")]
    layer = LayerSpec(query_heads=query_heads, kv_heads=kv_heads, key_dim=widths[0], value_dim=widths[-1])
    attend(layer, dtype, kv_dtype)
    for changes in ({"window": 100}, {"chunk": 100}, {"softcap": 30.0, "has_sinks": True}):
        if arguments.cache is None:
            specification = {name: getattr(layer, name) for name in LayerSpec.__dataclass_fields__} | changes
            attend(LayerSpec(**specification), dtype, kv_dtype)
    hidden, weight = torch.zeros(4, 4096, dtype=dtype), torch.zeros(4096, dtype=dtype)
    rms_norm(hidden, weight, 1e-5)
    add_rms_norm(hidden, hidden, weight, 1e-5)
    silu_mul(hidden)


if __name__ == "__main__":
    main()
