"""What a model layer asks of an attention back end, and what a back end reads.

Shape legend: T tokens of a step, H query heads, K key/value heads, D key width, E value width, S cache slots.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from text_generation_server.engine.inputs import ForwardInputs

if TYPE_CHECKING:
    from text_generation_server.cpu_kernels.compiler import Launch


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """How one layer attends; learned from its first call by ``model/probe.py``, constant afterwards."""

    query_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int = 0
    """A query sees itself and the ``window - 1`` tokens before it; 0 is all of them."""
    chunk: int = 0
    """A query sees only tokens of its own chunk, ``position // chunk``; 0 is off. Never together with a window."""
    softcap: float = 0.0
    """0 is off. Said here for back ends that have none; what `AttentionBackend.attend` is given counts."""
    has_sinks: bool = False
    """Likewise."""


@dataclass(slots=True)
class LayerCache:
    """Keys and values of one layer, head-major: a head's tokens are adjacent, which is how attention reads them.

    In the number format of the cache, which may be narrower than the one that is computed in.
    """

    keys_KSD: Tensor
    values_KSE: Tensor


@dataclass(frozen=True, slots=True)
class Rotation:
    """Rotary embedding of half-split heads, which a back end that knows of it does on the way into the cache."""

    cos_TD: Tensor
    sin_TD: Tensor
    norm_HD: Tensor | None = None
    """Query and key heads are RMS-normalised and scaled by these before, key heads by the last rows."""
    eps: float = 0.0

    def plainly(self, query_HTD: Tensor, key_KTD: Tensor) -> tuple[Tensor, Tensor]:
        """By torch's operators, in float32, rounded once."""
        heads = torch.cat((query_HTD, key_KTD)).float()
        if self.norm_HD is not None:
            heads = heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + self.eps)
            heads = heads * self.norm_HD.float()[:, None]
        left, right = heads.chunk(2, -1)
        rotated = heads * self.cos_TD + torch.cat((-right, left), -1) * self.sin_TD
        query, key = torch.split(rotated.to(query_HTD.dtype), [query_HTD.shape[0], key_KTD.shape[0]])
        return query, key


class Unsupported(Exception):
    """A back end cannot serve these layers here; the text is the reason, without a subject."""


class AttentionBackend(Protocol):
    """One way to attend over a paged cache. ``prepare`` runs once a step, ``attend`` once a layer and step."""

    def __init__(
        self,
        *,
        layers: list[LayerSpec],
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        """``kv_dtype``: of the cache; None: ``dtype``. Raises: Unsupported."""

    def prepare(self, inputs: ForwardInputs) -> Any:
        """Everything of a step that all layers share: gather indices, masks, lengths."""

    def attend(
        self,
        plan: Any,
        layer: LayerSpec,
        cache: LayerCache,
        query_HTD: Tensor,
        key_KTD: Tensor,
        value_KTE: Tensor,
        *,
        scaling: float,
        softcap: float = 0.0,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """Write the new keys and values to the cache, then attend; returns [T, H, E] in the query's dtype.

        Where the cache's number format has no room for a number, the largest that it has is written.

        ``softcap`` c replaces scores by ``c * tanh(scores / c)`` before the mask; ``sinks_H`` adds to each head's
        softmax a logit that has no value. Softmax is computed in float32.
        """


@runtime_checkable
class LaunchingBackend(Protocol):
    """A back end on a processor whose attention can be a part of a larger launch."""

    def launches(
        self,
        plan: Any,
        layer: LayerSpec,
        cache: LayerCache,
        query_HTD: Tensor,
        key_KTD: Tensor,
        value_KTE: Tensor,
        out_THE: Tensor,
        *,
        scaling: float,
        softcap: float = 0.0,
        sinks_H: Tensor | None = None,
    ) -> tuple[Launch, ...] | None:
        """What `AttentionBackend.attend` would run one after another, with the arguments for this step, to be run
        before the next is asked for; ``out_THE`` is contiguous. None: something of it is no kernel; nothing is done."""

    def launch_key(self, plan: Any) -> Hashable | None:
        """Says of two plans, with equal keys, that for one layer and the same memory `launches` returns the same. None:
        there are prompt chunks, whose launches are never the same."""


@runtime_checkable
class StaticBackend(Protocol):
    """A back end whose launches for decode rows depend on the number of rows alone: CUDA graphs can hold them."""

    def static_plan(self, num_rows: int, *, max_tokens: int) -> Any:
        """What `AttentionBackend.prepare` gives, for as many decode rows that are empty until `update`.

        An empty row has no context, gives zeros and writes to slot 0. ``max_tokens``: of a sequence.
        """

    def update(self, plan: Any, inputs: ForwardInputs) -> bool:
        """Put the decode rows of a step in place, in stream order; the plan's further rows are empty from then on.

        Returns: whether there is room for them, else nothing is changed.
        """
