from __future__ import annotations

import math

import pytest
import torch
from text_generation_server.cpu_kernels import compiler
from text_generation_server.cpu_kernels.language import DTYPES
from text_generation_server.cpu_kernels.row_peaks import PART, row_peaks, supports
from torch import Tensor

pytestmark = pytest.mark.skipif(
    compiler.reason_unavailable() is not None, reason=f"no kernels here: {compiler.reason_unavailable()}"
)


def check(x_SV: Tensor) -> None:
    largest_S, first_S, sums_S = row_peaks(x_SV)
    assert (largest_S.dtype, first_S.dtype, sums_S.dtype) == (torch.float32, torch.int64, torch.float64)
    wide_SV = x_SV.double()
    assert largest_S.double().equal(wide_SV.amax(-1))
    assert first_S.tolist() == [int((row == row.max()).nonzero()[0]) for row in wide_SV]
    expected_S = (wide_SV - wide_SV.amax(-1, keepdim=True)).exp().sum(-1)
    torch.testing.assert_close(sums_S, expected_S, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 48, PART - 16, PART, PART + 16, 49152])
@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.usefixtures("num_threads")
def test_it_equals_what_it_stands_for(rows: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    check((torch.randn(rows, width) * 4).to(dtype))


@pytest.mark.parametrize("places", [[0], [15], [16], [PART - 1], [PART], [3 * PART - 1]])
@pytest.mark.parametrize("ties", [[], [3 * PART - 2], [PART + 5, 2 * PART, 3 * PART - 1]])
def test_the_largest_is_found_wherever_it_is_and_the_first_of_several(places: list[int], ties: list[int]) -> None:
    x_SV = torch.randn(2, 3 * PART)
    x_SV[1, places + ties] = 9.0
    check(x_SV)


def test_rows_of_one_number_have_their_width_as_sum() -> None:
    largest_S, first_S, sums_S = row_peaks(torch.full((2, PART + 32), -3.5))
    assert (largest_S.tolist(), first_S.tolist(), sums_S.tolist()) == ([-3.5] * 2, [0] * 2, [PART + 32] * 2)


def test_numbers_may_be_hidden() -> None:
    x_SV = torch.full((2, 2 * PART), -math.inf)
    x_SV[0, [70, 4100]] = torch.tensor([1.0, 2.0])
    x_SV[1, 9] = -5.0
    largest_S, first_S, sums_S = row_peaks(x_SV)
    assert (largest_S.tolist(), first_S.tolist()) == ([2.0, -5.0], [4100, 9])
    torch.testing.assert_close(sums_S, torch.tensor([1 + math.exp(-1), 1.0]).double())


def test_rows_need_not_lie_together() -> None:
    check(torch.randn(64, 10).T)
    check(torch.randn(10, 192)[:, 64:128])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_result_alone_and_among_others(dtype: torch.dtype) -> None:
    x_SV = torch.randn(20, 2 * PART + 16).to(dtype)
    together = row_peaks(x_SV)
    for row in range(0, 20, 3):
        alone = row_peaks(x_SV[row : row + 1])
        assert all(torch.equal(one[0], each[row]) for one, each in zip(alone, together, strict=True))


def test_float32_gives_what_short_numbers_gave() -> None:
    """So a row's logprob is the same whether the rows beside it made its logits float32 or not."""
    x_SV = (torch.randn(5, 2 * PART) * 3).bfloat16()
    assert all(torch.equal(*each) for each in zip(row_peaks(x_SV), row_peaks(x_SV.float()), strict=True))


@pytest.mark.parametrize("place", [0, 17, PART + 3, 2 * PART + 5])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_a_number_shows_in_its_row_alone(dtype: torch.dtype, poison: float, place: int) -> None:
    x_SV = torch.randn(3, 2 * PART + 16).to(dtype)
    expected = row_peaks(x_SV)
    x_SV[1, place] = poison
    largest_S, first_S, sums_S = row_peaks(x_SV)
    assert not math.isfinite(largest_S[1]) or not math.isfinite(sums_S[1])
    assert 0 <= first_S[1] < x_SV.shape[1]
    for got, want in zip((largest_S, first_S, sums_S), expected, strict=True):
        assert torch.equal(got[[0, 2]], want[[0, 2]])


@pytest.mark.parametrize(
    ("width", "dtype", "supported"),
    [(16, torch.float32, True), (0, torch.float32, False), (50257, torch.float32, False), (64, torch.float64, False)],
)
def test_widths_are_multiples_of_16_and_numbers_short(width: int, dtype: torch.dtype, supported: bool) -> None:
    assert supports(width, dtype) is supported
