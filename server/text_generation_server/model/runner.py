"""The seam between the engine and a model: packed tokens and a paged cache in, logits out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from text_generation_server.engine.inputs import ForwardInputs


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What the router must know of a loaded model."""

    model_type: str
    dtype: torch.dtype
    device: torch.device
    attention: str
    vocab_size: int
    """Width of the logits."""
    eos_token_ids: tuple[int, ...]
    max_position_embeddings: int
    """0 when positions are unbounded."""
    window_size: int
    """Smallest sliding window of any layer; 0 when there is none."""
    kv_bytes_per_token: int
    """On this rank, all layers, keys and values."""
    hidden_size: int = 0
    """Of the last hidden states; 0 where the runner cannot hand them out."""

    @property
    def has_cpu_kernels(self) -> bool:
        """Whether it computes with `cpu_kernels`; if not, they are not wanted or do not run here."""
        return self.attention == "llvm"


class ModelRunner(Protocol):
    """A loaded model on one rank."""

    @property
    def info(self) -> ModelInfo: ...

    @property
    def pads_steps(self) -> bool:
        """Whether few numbers of rows are better than few rows (`engine.inputs.padded`)."""

    def allocate_kv_cache(self, num_blocks: int) -> None:
        """Make the cache for block ids 0 .. num_blocks (block 0 is padding), zero-filled. Replaces an earlier one."""

    def release_kv_cache(self) -> None:
        """Give the cache's memory back; ``allocate_kv_cache`` makes the next one."""

    def zero_blocks(self, block_ids: Iterable[int]) -> None:
        """Clear blocks that a failed request wrote, before they are handed out again."""

    def forward(self, inputs: ForwardInputs) -> Tensor:
        """Run one step, writing its keys and values into the cache.

        Returns: logits [L, V] for the rows named by ``inputs.logits_indices_L``, in the dtype in which they were
        computed; the same on every rank. Who asked may overwrite them.
        """

    def forward_with_states(self, inputs: ForwardInputs) -> tuple[Tensor, Tensor]:
        """The same, and the last hidden states [T, H] of all tokens, which the logits are made from."""
