"""`embedding.pooling` against each definition written out for one text at a time."""

from __future__ import annotations

import math

import pytest
import torch
from text_generation_server.embedding.pooling import pool
from text_generation_server.embedding.recipe import Pooling
from torch import Tensor

LENGTHS = [3, 1, 5]


def states() -> Tensor:
    states_BTH = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    for row, length in enumerate(LENGTHS):
        states_BTH[row, length:] = 1e4  # what padding computes is anybody's guess
    return states_BTH


def one(states_TH: Tensor, pooling: Pooling) -> Tensor:
    length = states_TH.shape[0]
    weights = torch.arange(1.0, length + 1)
    return {
        Pooling.CLS: states_TH[0],
        Pooling.LAST: states_TH[-1],
        Pooling.MAX: states_TH.max(0).values,
        Pooling.MEAN: states_TH.mean(0),
        Pooling.MEAN_SQRT: states_TH.sum(0) / math.sqrt(length),
        Pooling.WEIGHTED_MEAN: (states_TH * weights[:, None]).sum(0) / weights.sum(),
    }[pooling]


@pytest.mark.parametrize("pooling", Pooling)
def test_each(pooling: Pooling) -> None:
    vectors = pool(states(), torch.tensor(LENGTHS), (pooling,))
    expected = torch.stack([one(states()[row, :length], pooling) for row, length in enumerate(LENGTHS)])
    torch.testing.assert_close(vectors, expected, rtol=1e-5, atol=1e-3)


def test_several_stand_side_by_side_in_float32() -> None:
    vectors = pool(states().bfloat16(), torch.tensor(LENGTHS), (Pooling.CLS, Pooling.MEAN))
    assert vectors.dtype == torch.float32
    assert vectors.shape == (3, 8)
    torch.testing.assert_close(vectors[:, :4], states()[:, 0], rtol=0.01, atol=0.01)
