from __future__ import annotations

import math

import pytest
import torch
from text_generation_server.cpu_kernels import compiler
from text_generation_server.cpu_kernels.language import DTYPES
from text_generation_server.cpu_kernels.rms_norm import rms_norm, supports
from torch import Tensor

pytestmark = pytest.mark.skipif(
    compiler.reason_unavailable() is not None, reason=f"no kernels here: {compiler.reason_unavailable()}"
)

EPS = 1e-5
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""The last is what rounding once may cost, and a little more."""


def obvious(x: Tensor, weight_N: Tensor, eps: float = EPS) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight_N.double()


def check(x: Tensor, weight_N: Tensor, eps: float = EPS) -> None:
    out = rms_norm(x, weight_N, eps)
    assert (out.shape, out.dtype) == (x.shape, x.dtype)
    torch.testing.assert_close(out.double(), obvious(x, weight_N, eps), rtol=TOLERANCES[x.dtype], atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 48, 576, 4096, 16384])
@pytest.mark.parametrize("rows", [1, 2, 15, 129])
def test_it_equals_the_norm_written_out(rows: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    check(torch.randn(rows, width).to(dtype), torch.randn(width))


@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 3, 64), (5, 1, 7, 64), (0, 64), (2, 0, 64)])
def test_rows_lie_in_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    check(torch.randn(shape), torch.randn(64))


def test_rows_need_not_lie_together() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 10)
    check(x.T, torch.randn(64))
    check(torch.randn(10, 192)[:, 64:128], torch.randn(64))


@pytest.mark.parametrize("eps", [1e-6, 1e-5, 0.5])
def test_the_smallest_rows_are_kept_small_by_eps(eps: float) -> None:
    check(torch.full((3, 64), 1e-4), torch.ones(64), eps)
    assert not rms_norm(torch.zeros(3, 64), torch.ones(64), eps).any()


def test_squares_may_be_larger_than_the_largest_float16() -> None:
    check(torch.full((2, 64), 60000.0).half(), torch.ones(64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_result_alone_and_among_others(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight_N = torch.randn(100, 576).to(dtype), torch.randn(576)
    together = rms_norm(x, weight_N, EPS)
    assert all(torch.equal(rms_norm(x[row], weight_N, EPS), together[row]) for row in range(0, 100, 9))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_a_number_stays_in_its_row(dtype: torch.dtype, poison: float) -> None:
    torch.manual_seed(0)
    x, weight_N = torch.randn(5, 64).to(dtype), torch.randn(64)
    expected = rms_norm(x, weight_N, EPS)
    x[2, 7] = poison
    out = rms_norm(x, weight_N, EPS)
    assert out[2, 7].isnan()
    others = [0, 1, 3, 4]
    assert torch.equal(out[others], expected[others])
    if math.isnan(poison):
        assert out[2].isnan().all()


@pytest.mark.parametrize(
    ("width", "dtype", "supported"),
    [
        (16, torch.float32, True),
        (576, torch.bfloat16, True),
        (576, torch.float16, True),
        (24, torch.float32, False),
        (576, torch.float64, False),
    ],
)
def test_widths_are_multiples_of_16_and_numbers_short(width: int, dtype: torch.dtype, supported: bool) -> None:
    assert supports(width, dtype) is supported
