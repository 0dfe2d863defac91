"""Hidden states of texts -> one vector for each.

Shape legend: B texts, T tokens of the longest, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from text_generation_server.embedding.recipe import Pooling


def pool(states_BTH: Tensor, lengths_B: Tensor, poolings: Sequence[Pooling]) -> Tensor:
    """Float32 [B, H for each pooling]. Tokens stand at the beginning of their row; ``lengths_B`` says how many."""
    states_BTH = states_BTH.float()
    parts = [_POOLINGS[pooling](states_BTH, lengths_B) for pooling in poolings]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _sum(states_BTH: Tensor, lengths_B: Tensor) -> Tensor:
    return (states_BTH * _mask(states_BTH, lengths_B)).sum(1)


def _mask(states_BTH: Tensor, lengths_B: Tensor) -> Tensor:
    """1 where there is a token, else 0; float32 [B, T, 1]."""
    places_T = torch.arange(states_BTH.shape[1], device=states_BTH.device)
    return (places_T < lengths_B[:, None]).unsqueeze(-1).float()


def _cls(states_BTH: Tensor, lengths_B: Tensor) -> Tensor:
    return states_BTH[:, 0]


def _last(states_BTH: Tensor, lengths_B: Tensor) -> Tensor:
    return states_BTH[torch.arange(states_BTH.shape[0], device=states_BTH.device), lengths_B - 1]


def _max(states_BTH: Tensor, lengths_B: Tensor) -> Tensor:
    return states_BTH.masked_fill(_mask(states_BTH, lengths_B) == 0, float("-inf")).amax(1)


def _mean(states_BTH: Tensor, lengths_B: Tensor) -> Tensor:
    return _sum(states_BTH, lengths_B) / lengths_B[:, None]


def _mean_sqrt(states_BTH: Tensor, lengths_B: Tensor) -> Tensor:
    return _sum(states_BTH, lengths_B) / lengths_B[:, None].float().sqrt()


def _weighted_mean(states_BTH: Tensor, lengths_B: Tensor) -> Tensor:
    weights_T1 = torch.arange(1, states_BTH.shape[1] + 1, device=states_BTH.device).float()[:, None]
    weights_BT1 = weights_T1 * _mask(states_BTH, lengths_B)
    return (states_BTH * weights_BT1).sum(1) / weights_BT1.sum(1)


_POOLINGS: dict[Pooling, Callable[[Tensor, Tensor], Tensor]] = {
    Pooling.CLS: _cls,
    Pooling.LAST: _last,
    Pooling.MAX: _max,
    Pooling.MEAN: _mean,
    Pooling.MEAN_SQRT: _mean_sqrt,
    Pooling.WEIGHTED_MEAN: _weighted_mean,
}
