from __future__ import annotations

import math

import pytest
import torch
from text_generation_server.cpu_kernels import compiler
from text_generation_server.cpu_kernels.language import DTYPES
from text_generation_server.cpu_kernels.rotary import rotate, supports
from torch import Tensor

pytestmark = pytest.mark.skipif(
    compiler.reason_unavailable() is not None, reason=f"no kernels here: {compiler.reason_unavailable()}"
)

EPS = 1e-6
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""The last is what rounding once may cost, and a little more."""


def angles(num_tokens: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine, [T, D], which differ in all places: halves may have angles of their own."""
    angle_TD = torch.rand(num_tokens, head_dim) * 2 * math.pi
    return angle_TD.cos().to(dtype), angle_TD.sin().to(dtype)


def obvious(heads_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor, norm_HD: Tensor | None) -> Tensor:
    x = heads_THD.double()
    if norm_HD is not None:
        x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * norm_HD.double()
    left, right = x.chunk(2, -1)
    return x * cos_TD.double()[:, None] + torch.cat((-right, left), -1) * sin_TD.double()[:, None]


@pytest.mark.parametrize("normed", [False, True], ids=["as they are", "normalised"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_heads", "num_rotated", "head_dim"),
    [
        pytest.param(1, 1, 32, id="one head"),
        pytest.param(3, 3, 64, id="all heads"),
        pytest.param(15, 12, 64, id="all but the values"),
        pytest.param(4, 3, 128, id="wide heads"),
        pytest.param(40, 36, 256, id="more than a unit holds"),
    ],
)
@pytest.mark.parametrize("num_tokens", [1, 2, 33, 100])
def test_it_equals_the_rotation_written_out(
    num_tokens: int, num_heads: int, num_rotated: int, head_dim: int, dtype: torch.dtype, normed: bool
) -> None:
    torch.manual_seed(0)
    heads_THD = torch.randn(num_tokens, num_heads, head_dim).to(dtype)
    cos_TD, sin_TD = angles(num_tokens, head_dim, dtype)
    norm_HD = torch.randn(num_rotated, head_dim) if normed else None
    rotated = heads_THD.clone()
    rotate(rotated, cos_TD, sin_TD, num_rotated=num_rotated, norm_HD=norm_HD, eps=EPS)
    expected = obvious(heads_THD[:, :num_rotated], cos_TD, sin_TD, norm_HD)
    tolerance = TOLERANCES[dtype]  # of what is added, too: it may cancel
    torch.testing.assert_close(rotated[:, :num_rotated].double(), expected, rtol=tolerance, atol=tolerance / 2)
    assert torch.equal(rotated[:, num_rotated:], heads_THD[:, num_rotated:])


def test_no_tokens_are_no_work() -> None:
    rotate(torch.empty(0, 4, 32), torch.empty(0, 32), torch.empty(0, 32), num_rotated=3, norm_HD=None, eps=EPS)


@pytest.mark.parametrize("normed", [False, True], ids=["as they are", "normalised"])
def test_a_token_has_the_same_result_alone_and_among_others(normed: bool) -> None:
    torch.manual_seed(0)
    heads_THD, (cos_TD, sin_TD) = torch.randn(60, 5, 64).bfloat16(), angles(60, 64, torch.bfloat16)
    norm_HD = torch.randn(4, 64) if normed else None
    together = heads_THD.clone()
    rotate(together, cos_TD, sin_TD, num_rotated=4, norm_HD=norm_HD, eps=EPS)
    for token in range(0, 60, 7):
        only = slice(token, token + 1)
        alone = heads_THD[only].clone()
        rotate(alone, cos_TD[only], sin_TD[only], num_rotated=4, norm_HD=norm_HD, eps=EPS)
        assert torch.equal(alone, together[only])


def test_not_a_number_stays_in_its_head() -> None:
    torch.manual_seed(0)
    heads_THD, (cos_TD, sin_TD) = torch.randn(4, 3, 32), angles(4, 32, torch.float32)
    expected, poisoned = heads_THD.clone(), heads_THD.clone()
    poisoned[2, 1, 5] = math.nan
    for each in (expected, poisoned):
        rotate(each, cos_TD, sin_TD, num_rotated=3, norm_HD=torch.ones(3, 32), eps=EPS)
    assert poisoned[2, 1].isnan().all()
    expected[2, 1] = poisoned[2, 1] = 0
    assert torch.equal(poisoned, expected)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "supported"),
    [
        (32, torch.float32, True),
        (64, torch.bfloat16, True),
        (96, torch.float16, True),
        (16, torch.float32, False),
        (80, torch.float32, False),
        (64, torch.float64, False),
    ],
)
def test_halves_of_heads_are_multiples_of_16(head_dim: int, dtype: torch.dtype, supported: bool) -> None:
    assert supports(head_dim, dtype) is supported
