"""Triton's compiler accepts the kernels for GPUs that are not here."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux"),
]

PROGRAM = Path(__file__).parents[2] / "compile_kernels.py"
SHARED_BYTES = {80: 163 * 2**10, 86: 99 * 2**10, 89: 99 * 2**10, 90: 227 * 2**10, 100: 227 * 2**10}
"""That a kernel may use on each compute capability. Source: CUDA C++ Programming Guide, technical specifications."""


def compiled(tmp_path: Path, capability: int, *arguments: str) -> set[str]:
    """Compile, check what the kernels need, and return their names."""
    environ = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    environ.pop("TRITON_INTERPRET", None)
    run = subprocess.run(
        [sys.executable, str(PROGRAM), "--capability", str(capability), *arguments],
        env=environ, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    for kernel in kernels:
        assert kernel["shared_bytes"] <= SHARED_BYTES[capability], kernel
    return {kernel["kernel"] for kernel in kernels}


ALL = {"_parts", "_merge", "_prefill", "_write", "_rotate", "_norm", "_silu_mul"}


@pytest.mark.slow
def test_kernels_of_a_llama_compile_for_a_hopper_gpu(tmp_path: Path) -> None:
    assert compiled(tmp_path, 90) == ALL


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100])
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--dtype", "bfloat16"], id="bfloat16"),
        pytest.param(["--dtype", "float16", "--heads", "8,8", "--width", "64"], id="float16"),
        pytest.param(["--dtype", "float32"], id="float32"),
        pytest.param(["--width", "256"], id="wide heads"),
        pytest.param(["--dtype", "float32", "--width", "256"], id="wide heads in float32"),
        pytest.param(["--width", "80"], id="a width that is no power of two"),
        pytest.param(["--heads", "71,1", "--width", "192,128"], id="one key head for many, two widths"),
        pytest.param(["--cache", "float8_e5m2"], id="a cache of eight bits"),
    ],
)
def test_kernels_compile(capability: int, arguments: list[str], tmp_path: Path) -> None:
    assert compiled(tmp_path, capability, *arguments) >= ALL - {"_rotate"}


@pytest.mark.slow
@pytest.mark.parametrize("capability", [89, 90, 100])
def test_the_other_format_of_eight_bits_compiles_where_it_is_not_refused(capability: int, tmp_path: Path) -> None:
    assert compiled(tmp_path, capability, "--cache", "float8_e4m3fn") == ALL
