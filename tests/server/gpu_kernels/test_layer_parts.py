"""Triton kernels of the parts of a layer, in Triton's interpreter, against what they replace.

Memory that is not written holds not-a-number. In bfloat16 the interpreter rounds towards zero where a GPU rounds to the
nearest: so the tolerance is a whole step of that format.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from paged_attention import uninitialised_is_nan
from text_generation_server.attention.interface import Rotation
from torch import Tensor

pytest.importorskip("triton")
from text_generation_server.gpu_kernels import arithmetic, cache_write, rms_norm, rotary, silu_mul

pytestmark = pytest.mark.skipif(not arithmetic.INTERPRETED, reason="kernels run on a GPU here: pytest -m gpu")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
STEP = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Of a number format, relative."""


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    torch.manual_seed(0)
    with uninitialised_is_nan():
        yield


def assert_near(ours: Tensor, expected: Tensor) -> None:
    """But for one step of the format."""
    step = STEP[ours.dtype]
    torch.testing.assert_close(ours.float(), expected.float(), rtol=step, atol=step)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 64), (3, 5, 96), (7, 100)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1:]).to(dtype)
    assert_near(rms_norm.rms_norm(x, weight, 1e-5), F.rms_norm(x.float(), shape[-1:], weight.float(), 1e-5).to(dtype))


def test_a_weight_may_have_more_digits_than_the_rows() -> None:
    x, weight = torch.randn(4, 64).to(torch.float16), 1 + torch.randn(64) / 1000
    assert_near(rms_norm.rms_norm(x, weight, 1e-5), F.rms_norm(x.float(), (64,), weight, 1e-5).half())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_and_its_norm(dtype: torch.dtype) -> None:
    x, addend, weight = (torch.randn(shape).to(dtype) for shape in [(1, 5, 96), (1, 5, 96), (96,)])
    kept = x.clone(), addend.clone()
    total, normed = rms_norm.add_rms_norm(x, addend, weight, 1e-5)
    assert_near(total, x + addend)
    assert_near(normed, F.rms_norm(total.float(), (96,), weight.float(), 1e-5).to(dtype))
    assert torch.equal(x, kept[0]) and torch.equal(addend, kept[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2, 2 * 24), (5, 2 * 1100)])
def test_silu_and_product(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate_up = (torch.randn(shape) * 4).to(dtype)
    gate, up = gate_up.float().chunk(2, -1)
    assert_near(silu_mul.silu_mul(gate_up), (F.silu(gate) * up).to(dtype))


def test_silu_of_large_numbers_is_finite() -> None:
    gate_up = torch.tensor([[-1000.0, 1000.0, 2.0, 2.0]])
    with np.errstate(over="ignore"):  # as a GPU does
        assert torch.equal(silu_mul.silu_mul(gate_up), torch.tensor([[-0.0, 2000.0]]))


def heads(count: int, tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    """[count, tokens, width] with the strides that a fused projection's output has."""
    return torch.randn(tokens, count + 3, width).to(dtype)[:, 1 : count + 1].transpose(0, 1)


def empty_cache(kv_heads: int, slots: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.full((kv_heads, slots, width), -8.0).to(dtype)


SLOTS = torch.tensor([5, 31, 0, 17])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize(("query_heads", "kv_heads", "width"), [(6, 2, 32), (5, 5, 24), (1, 1, 64)])
def test_rotation_and_cache(query_heads: int, kv_heads: int, width: int, has_norm: bool, dtype: torch.dtype) -> None:
    tokens = 6  # two more than there are slots: padding
    query, key, value = (heads(count, tokens, width, dtype) for count in (query_heads, kv_heads, kv_heads))
    angles = torch.rand(tokens, width) * 6
    norm = torch.randn(query_heads + kv_heads, width).to(dtype) if has_norm else None
    rotation = Rotation(angles.cos().to(dtype), angles.sin().to(dtype), norm, 1e-5)
    keys, values = (empty_cache(kv_heads, 32, width, dtype) for _ in range(2))
    rotated = rotary.rotate_and_write(query, key, value, rotation, keys, values, SLOTS)
    expected_query, expected_key = rotation.plainly(query, key)
    assert_near(rotated, expected_query)
    expected_keys, expected_values = (empty_cache(kv_heads, 32, width, dtype) for _ in range(2))
    expected_keys[:, SLOTS], expected_values[:, SLOTS] = expected_key[:, :4], value[:, :4]
    assert_near(keys, expected_keys)
    assert torch.equal(values, expected_values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("key_width", "value_width"), [(16, 16), (24, 40), (80, 80)])
def test_cache_write(key_width: int, value_width: int, dtype: torch.dtype) -> None:
    key, value = heads(3, 6, key_width, dtype), heads(3, 6, value_width, dtype)
    keys, values = empty_cache(3, 32, key_width, dtype), empty_cache(3, 32, value_width, dtype)
    expected = keys.clone(), values.clone()
    cache_write.write(key, value, keys, values, SLOTS)
    expected[0][:, SLOTS], expected[1][:, SLOTS] = key[:, :4], value[:, :4]
    assert torch.equal(keys, expected[0])
    assert torch.equal(values, expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bits_are_cut_off_at_their_largest_number(kv_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """Not-a-number stays so on a GPU only: the interpreter's conversion makes a number of it."""
    largest = torch.finfo(kv_dtype).max
    numbers = torch.tensor([0.0, 1.0, -2.0, largest, 1e5, -1e5, 0.25, -0.125]).to(dtype).view(1, 1, -1)
    expected = torch.tensor([0.0, 1.0, -2.0, largest, largest, -largest, 0.25, -0.125])
    still = Rotation(torch.ones(1, 8, dtype=dtype), torch.zeros(1, 8, dtype=dtype))
    keys, values, rotated_keys, rotated_values = (empty_cache(1, 2, 8, kv_dtype) for _ in range(4))
    slot = torch.tensor([1])
    cache_write.write(numbers, numbers, keys, values, slot)
    rotary.rotate_and_write(numbers, numbers, numbers, still, rotated_keys, rotated_values, slot)
    for cached in (keys, values, rotated_keys, rotated_values):
        assert torch.equal(cached[0, 1].float(), expected)


def test_infinity_is_cut_off_too() -> None:
    numbers = torch.tensor([math.inf, -math.inf]).view(1, 1, 2)
    keys, values = (empty_cache(1, 1, 2, torch.float8_e4m3fn) for _ in range(2))
    cache_write.write(numbers, numbers, keys, values, torch.tensor([0]))
    assert keys.float().flatten().tolist() == values.float().flatten().tolist() == [448.0, -448.0]
