"""Whole decoder layers of the Llama pattern, whose residual sums are done inside of the products before them.

It also spares the calls around the calls: in a decode step of a small model, what lies between the operations costs as
much as they do.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from text_generation_server.model.swaps.attention import FusedAttention
from text_generation_server.model.swaps.layer_kernels import LayerKernels
from text_generation_server.model.swaps.linears import linear_plus
from text_generation_server.model.swaps.mlp import GatedMLP
from text_generation_server.model.swaps.norms import FastRMSNorm

CHILDREN = {
    "input_layernorm": FastRMSNorm,
    "self_attn": FusedAttention,
    "post_attention_layernorm": FastRMSNorm,
    "mlp": GatedMLP,
}


class FusedLayer(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``, over swapped parts."""

    input_layernorm: FastRMSNorm
    self_attn: FusedAttention
    post_attention_layernorm: FastRMSNorm
    mlp: GatedMLP

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        for name in CHILDREN:
            setattr(self, name, getattr(original, name))
        # Models read fields of their layers, such as the kind of attention that picks the mask.
        for name, value in vars(original).items():
            if not name.startswith("_") and name != "training":
                setattr(self, name, value)
        self.kernels: LayerKernels | None = None
        self.has_gpu_kernels = False

    def compute_with_kernels(self) -> bool:
        """In one launch or two, where all parts have kernels; returns whether."""
        self.kernels = LayerKernels.of(self.input_layernorm, self.self_attn, self.post_attention_layernorm, self.mlp)
        return self.kernels is not None

    def compute_with_gpu_kernels(self) -> bool:
        """One of the sums in the norm behind it, the other in the product before it, where the norms have kernels;
        returns whether."""
        norms = self.input_layernorm, self.post_attention_layernorm
        self.has_gpu_kernels = all(norm.gpu_kernels is not None for norm in norms)
        return self.has_gpu_kernels

    def forward(
        self, hidden_states: Tensor, *_: Any, position_embeddings: tuple[Tensor, Tensor] | None = None, **__: Any
    ) -> Tensor:
        assert position_embeddings is not None
        if self.kernels is not None:
            return self.kernels(hidden_states, position_embeddings)
        attended = self.self_attn.inner(self.input_layernorm(hidden_states), position_embeddings)
        if self.has_gpu_kernels:
            total, normed = self.post_attention_layernorm.after_sum(self.self_attn.out(attended), hidden_states)
            return self.mlp.add_to(normed, total)
        hidden_states = linear_plus(self.self_attn.out, attended, hidden_states)
        return self.mlp.plus(self.post_attention_layernorm(hidden_states), hidden_states)


def replace(module: nn.Module) -> nn.Module | None:
    """By its parts, all of them swapped before. In which order it uses them is checked after."""
    children = dict(module.named_children())
    if set(children) != set(CHILDREN) or not all(isinstance(children[name], CHILDREN[name]) for name in children):
        return None
    return FusedLayer(module)
