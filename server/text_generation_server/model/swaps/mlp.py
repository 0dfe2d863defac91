"""Gated feed-forward layers with gate and up in one product."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from text_generation_server.model.swaps.linears import fuse


class FusedMLP(nn.Module):
    """``down(activation(gate(x)) * up(x))``"""

    def __init__(self, gate_up: nn.Linear, down: nn.Module, activation: nn.Module, width: int) -> None:
        super().__init__()
        self.gate_up = gate_up
        self.down = down
        self.activation = activation
        self.is_silu = isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        gate_up: Tensor = self.gate_up(x)
        gate, up = gate_up[..., : self.width], gate_up[..., self.width :]
        gate = F.silu(gate, inplace=True) if self.is_silu else self.activation(gate)
        out: Tensor = self.down(gate.mul_(up))
        return out


def replace(module: nn.Module) -> nn.Module | None:
    children = dict(module.named_children())
    activation = children.get("act_fn") or getattr(module, "act_fn", None)
    if set(children) - {"act_fn"} != {"gate_proj", "up_proj", "down_proj"} or not isinstance(activation, nn.Module):
        return None
    fused = fuse([children["gate_proj"], children["up_proj"]])
    if fused is None:
        return None
    return FusedMLP(fused, children["down_proj"], activation, fused.out_features // 2)
