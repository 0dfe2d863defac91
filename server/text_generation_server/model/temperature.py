"""Attention temperature by position: what Llama 4 computes from a token's place in the forward pass.

Its layers without rotary embedding scale far queries, and take a token's place in the pass for its position. In a
packed step that place depends on what else is in the batch. So the modules' own scaling is switched off, and the step
does it.

Shape legend: T tokens, H query heads, D key width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from text_generation_server.model import bridge


@dataclass(frozen=True, slots=True)
class Temperature:
    scale: float
    floor: int
    """Positions between two steps of the scale; queries before the first one keep their size."""

    def apply(self, query_HTD: Tensor, positions_T: Tensor) -> Tensor:
        factors_T1 = 1 + self.scale * torch.log1p(torch.floor((positions_T[:, None].float() + 1) / self.floor))
        return (query_HTD * factors_T1).to(query_HTD.dtype)


def take_over(model: nn.Module) -> dict[int, Temperature]:
    """Switch off the scaling of the attention modules that do their own; returns it by the index of their cache."""
    found: dict[int, Temperature] = {}
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if getattr(module, "attn_temperature_tuning", False) and not getattr(module, "use_rope", True):
            found[getattr(module, bridge.LAYER_ATTRIBUTE)] = Temperature(module.attn_scale, module.floor_scale)
            module.attn_temperature_tuning = False
    return found
