"""The kernels on a GPU, in bfloat16, on fresh random inputs: at most 1e-2 of error, and every element written."""

from __future__ import annotations

import itertools
import random
import time

import pytest
import torch
import torch.nn.functional as F
from paged_attention import attended, uninitialised_is_nan
from text_generation_server.attention.interface import LayerSpec, Rotation
from torch import Tensor

pytest.importorskip("triton")
from text_generation_server.attention.triton_paged import TritonPaged
from text_generation_server.gpu_kernels.rms_norm import add_rms_norm, rms_norm
from text_generation_server.gpu_kernels.rotary import rotate_and_write
from text_generation_server.gpu_kernels.silu_mul import silu_mul

pytestmark = pytest.mark.gpu

TOLERANCE = 1e-2
GPU = "cuda"
SEED = time.time_ns() % 2**31
"""Another one in each run; pytest shows it where a test fails."""


def assert_near(ours: Tensor, expected: Tensor) -> None:
    ours, expected = ours.float().cpu(), expected.float().cpu()
    assert ours.isfinite().all(), "an element was not written"
    assert (ours - expected).norm() <= TOLERANCE * expected.norm()


def random_rows(seed: int) -> list[tuple[int, int]]:
    rng = random.Random(seed)
    decode = [(rng.randint(1, 3000), 1) for _ in range(rng.randint(1, 6))]
    return decode + [(rng.choice([0, rng.randint(1, 600)]), rng.randint(2, 400)) for _ in range(rng.randint(0, 3))]


SHAPES = [
    pytest.param(group, width, sight, id=f"{group}:1 x {width}, window and chunk {sight}")
    for group, width, sight in itertools.product([1, 3, 4, 8], [64, 80, 96, 128, 256], [(0, 0), (300, 0), (0, 500)])
]


@pytest.mark.parametrize(("group", "width", "sight"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention(dtype: torch.dtype, group: int, width: int, sight: tuple[int, int]) -> None:
    layer = LayerSpec(
        query_heads=2 * group, kv_heads=2, key_dim=width, value_dim=width, window=sight[0], chunk=sight[1]
    )
    rows = random_rows(SEED + width)
    for options in ({}, {"softcap": 30.0}, {"sinks": True}):
        out, expected = attended(
            TritonPaged, layer, rows, block_size=16, scaling=width**-0.5, poisoned=True, dtype=dtype,
            device=GPU, seed=SEED, **options,
        )  # fmt: skip
        assert_near(out, expected)


@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_attention_over_a_cache_of_eight_bits(kv_dtype: torch.dtype) -> None:
    if kv_dtype == torch.float8_e4m3fn and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no such numbers")
    layer = LayerSpec(query_heads=8, kv_heads=2, key_dim=128, value_dim=128)
    out, expected = attended(
        TritonPaged, layer, random_rows(SEED), block_size=16, scaling=128**-0.5, poisoned=True,
        dtype=torch.bfloat16, kv_dtype=kv_dtype, device=GPU, seed=SEED,
    )  # fmt: skip
    assert_near(out, expected)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device=GPU, dtype=torch.bfloat16)


@pytest.mark.parametrize("width", [576, 4096, 8192])
def test_norms(width: int) -> None:
    torch.manual_seed(SEED)
    x, addend, weight = randn(1, 37, width), randn(1, 37, width), randn(width)
    with uninitialised_is_nan():
        normed, (total, normed_sum) = rms_norm(x, weight, 1e-5), add_rms_norm(x, addend, weight, 1e-5)
    assert_near(normed, F.rms_norm(x.float(), (width,), weight.float(), 1e-5))
    assert_near(total, x.float() + addend.float())
    assert_near(normed_sum, F.rms_norm(x.float() + addend.float(), (width,), weight.float(), 1e-5))


@pytest.mark.parametrize("width", [96, 14336])
def test_silu_and_product(width: int) -> None:
    torch.manual_seed(SEED)
    gate_up = randn(1, 37, 2 * width)
    gate, up = gate_up.float().chunk(2, -1)
    with uninitialised_is_nan():
        out = silu_mul(gate_up)
    assert_near(out, F.silu(gate) * up)


@pytest.mark.parametrize("has_norm", [False, True])
def test_rotation_and_cache(has_norm: bool) -> None:
    torch.manual_seed(SEED)
    heads_HTD = randn(29, 48, 128).transpose(0, 1)
    query, key, value = torch.split(heads_HTD, [32, 8, 8])
    angles = torch.rand(29, 128, device=GPU) * 6
    norm = randn(40, 128) if has_norm else None
    rotation = Rotation(angles.cos().bfloat16(), angles.sin().bfloat16(), norm, 1e-5)
    keys, values = (torch.full((8, 64, 128), torch.nan, device=GPU, dtype=torch.bfloat16) for _ in range(2))
    slots = torch.randperm(64, device=GPU)[:29]
    with uninitialised_is_nan():
        rotated = rotate_and_write(query, key, value, rotation, keys, values, slots)
    expected_query, expected_key = rotation.plainly(query, key)
    assert_near(rotated, expected_query)
    assert_near(keys[:, slots], expected_key)
    assert torch.equal(values[:, slots], value)
    untouched = torch.ones(64, dtype=torch.bool, device=GPU).index_fill(0, slots, False)
    assert keys[:, untouched].isnan().all() and values[:, untouched].isnan().all()
