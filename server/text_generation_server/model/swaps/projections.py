"""Projections of the same input computed in one product, for modules whose own forward stays as it is.

The first of them to be called computes all; the others find their part waiting. So an attention layer of any shape
gets one product for q, k and v, without a line of its forward rewritten.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from text_generation_server.model.swaps.linears import fuse, plain_weights

GROUPS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("gate_proj", "up_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("w1", "w3"),
)


class Shared(nn.Module):
    """The fused layer and the parts of its last output that are still to be fetched."""

    def __init__(self, fused: nn.Linear, sizes: list[int]) -> None:
        super().__init__()
        self.fused = fused
        self.sizes = sizes
        self._input: Tensor | None = None
        self._parts: list[Tensor | None] = []

    def part(self, x: Tensor, index: int) -> Tensor:
        # The same tensor object, which we hold: so it is the same input, not a later one at a reused address.
        part = self._parts[index] if self._input is x else None
        if part is None:
            self._input = x
            self._parts = list(self.fused(x).split(self.sizes, -1))
            part = self._parts[index]
            assert part is not None
        self._parts[index] = None
        if all(waiting is None for waiting in self._parts):
            self._input = None
        return part


class Part(nn.Module):
    def __init__(self, shared: Shared, index: int) -> None:
        super().__init__()
        self.shared = shared
        self.index = index
        self.in_features = shared.fused.in_features
        self.out_features = shared.sizes[index]

    @property
    def weight(self) -> Tensor:
        """As in `PackedLinear`: for shape, dtype and device."""
        whole = self.shared.fused.weight
        return whole.new_full((), math.nan).expand(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared.part(x, self.index)


def replace_children(module: nn.Module) -> int:
    """Fuse the known groups among a module's direct children; returns how many groups."""
    fused_groups = 0
    children = dict(module.named_children())
    for names in GROUPS:
        if not all(name in children and plain_weights(children[name]) for name in names):
            continue
        fused = fuse([children[name] for name in names])
        if fused is None:
            continue
        shared = Shared(fused, [int(getattr(children[name], "out_features", 0)) for name in names])
        for index, name in enumerate(names):
            setattr(module, name, Part(shared, index))
        fused_groups += 1
    return fused_groups
