"""Attention layers of the Llama pattern: one product for q, k and v, rotation of q and k together.

Shape legend: T tokens, H query heads, K key/value heads, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from text_generation_server.attention.interface import Rotation
from text_generation_server.cpu_kernels import rotary
from text_generation_server.model import bridge
from text_generation_server.model.swaps.linears import fuse


class FusedAttention(nn.Module):
    """``o(attend(rotate(q), rotate(k), v))`` for query, key and value of one fused product.

    With per-head norms of q and k (Qwen3) both are normalised at once and scaled by their own weights.
    """

    def __init__(self, qkv: nn.Linear, out: nn.Module, original: Any, heads: tuple[int, int, int]) -> None:
        super().__init__()
        self.qkv: nn.Module = qkv
        self.out: nn.Module = out
        self.query_heads, self.kv_heads, self.head_dim = heads
        self.arguments = {
            "scaling": original.scaling,
            "sliding_window": getattr(original, "sliding_window", None),
            "softcap": getattr(original, "attn_logit_softcapping", None),
            "s_aux": getattr(original, "sinks", None),
        }
        self.norm_eps = 0.0
        self.norm_weight: nn.Parameter | None = None
        if hasattr(original, "q_norm"):
            scales = [original.q_norm.weight.detach().expand(self.query_heads, -1)]
            scales.append(original.k_norm.weight.detach().expand(self.kv_heads, -1))
            self.norm_weight = nn.Parameter(torch.cat(scales), requires_grad=False)
            self.norm_eps = float(original.q_norm.eps)
        setattr(self, bridge.LAYER_ATTRIBUTE, getattr(original, bridge.LAYER_ATTRIBUTE))
        self.dtype = qkv.weight.dtype
        self.has_kernel = False
        self.kernel_norm_weight: Tensor | None = None
        self.has_gpu_kernels = False

    def compute_with_kernels(self) -> bool:
        """Rotate with a kernel of ours, which is told the head width now; returns whether there is one."""
        self.has_kernel = rotary.supports(self.head_dim, self.dtype)
        if self.has_kernel and self.norm_weight is not None:
            self.kernel_norm_weight = self.norm_weight.float()
        return self.has_kernel

    def compute_with_gpu_kernels(self) -> bool:
        """Leave norms of heads and the rotation to the back end, which does them in one kernel with the write to the
        cache; returns True."""
        self.has_gpu_kernels = True
        return True

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        assert position_embeddings is not None
        return self.out(self.inner(hidden_states, position_embeddings)), None

    def inner(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """What goes into ``out``."""
        rotating = self.query_heads + self.kv_heads
        heads = self.qkv(hidden_states[0]).view(-1, rotating + self.kv_heads, self.head_dim)
        pair, value = heads[:, :rotating], heads[:, rotating:]
        arguments = self.arguments
        if self.has_gpu_kernels:
            cos_TD, sin_TD = (each[0] for each in position_embeddings)
            rotation = Rotation(cos_TD, sin_TD, self.norm_weight, self.norm_eps)
            arguments = arguments | {"rotation": rotation}
        elif self.has_kernel:
            cos_TD, sin_TD = (each[0].to(heads.dtype).contiguous() for each in position_embeddings)
            rotary.rotate(
                heads, cos_TD, sin_TD, num_rotated=rotating, norm_HD=self.kernel_norm_weight, eps=self.norm_eps
            )
        else:
            if self.norm_weight is not None:
                wide = pair.to(self.norm_weight.dtype)
                pair = (F.rms_norm(wide, (self.head_dim,), None, self.norm_eps) * self.norm_weight).to(pair.dtype)
            pair = rotate(pair, *position_embeddings)
        attended = bridge.attend(
            self,
            pair[:, : self.query_heads].transpose(0, 1),
            pair[:, self.query_heads :].transpose(0, 1),
            value.transpose(0, 1),
            arguments,
        )
        return attended.view(1, -1, self.query_heads * self.head_dim)


def rotate(heads_THD: Tensor, cos_1TD: Tensor, sin_1TD: Tensor) -> Tensor:
    """Rotary embedding of half-split heads in three operations.

    ``x * cos + cat(-right, left) * sin`` is ``x * cos + roll(x) * signed_sin``, where half a turn exchanges the halves
    and the left half of ``signed_sin`` is negated; sine and cosine are the same for all layers of a step.
    """
    cos_T1D, signed_sin_T1D = _signed.of(cos_1TD, sin_1TD)
    swapped = heads_THD.roll(heads_THD.shape[2] // 2, 2)
    return torch.addcmul(swapped.mul_(signed_sin_T1D), heads_THD, cos_T1D)


class _SignedSine:
    """Remembers the last step's sine with its sign: the model hands every layer the same two tensors."""

    def __init__(self) -> None:
        self._cos: Tensor | None = None
        self._ready: tuple[Tensor, Tensor] | None = None

    def of(self, cos_1TD: Tensor, sin_1TD: Tensor) -> tuple[Tensor, Tensor]:
        if self._cos is not cos_1TD or self._ready is None:
            half = sin_1TD.shape[-1] // 2
            signed = torch.cat((-sin_1TD[0, :, None, :half], sin_1TD[0, :, None, half:]), -1)
            self._cos, self._ready = cos_1TD, (cos_1TD[0, :, None], signed)
        return self._ready


_signed = _SignedSine()


def replace(module: nn.Module) -> nn.Module | None:
    """By structure: q, k, v and o projections, a scaling, per-head norms or none. What it does is checked after."""
    children = dict(module.named_children())
    projections = {"q_proj", "k_proj", "v_proj", "o_proj"}
    extras = set(children) - projections
    if not projections <= set(children) or not (extras <= {"q_norm", "k_norm"}) or len(extras) == 1:
        return None
    head_dim = getattr(module, "head_dim", None)
    if not isinstance(head_dim, int) or head_dim % 2 or not isinstance(getattr(module, "scaling", None), float):
        return None
    if extras and not all(_is_head_norm(children[name], head_dim) for name in extras):
        return None
    fused = fuse([children[name] for name in ("q_proj", "k_proj", "v_proj")])
    if fused is None or not hasattr(module, bridge.LAYER_ATTRIBUTE):
        return None
    query_width, key_width = (int(getattr(children[name], "out_features", 0)) for name in ("q_proj", "k_proj"))
    if query_width % head_dim or key_width % head_dim or fused.out_features != query_width + 2 * key_width:
        return None
    return FusedAttention(fused, children["o_proj"], module, (query_width // head_dim, key_width // head_dim, head_dim))


def _is_head_norm(norm: nn.Module, head_dim: int) -> bool:
    from text_generation_server.model.swaps.norms import FastRMSNorm

    return isinstance(norm, FastRMSNorm) and norm.shape == (head_dim,)
