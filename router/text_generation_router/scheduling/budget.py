"""Token arithmetic of one step and of all running sequences."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """What a step and the running batch may hold."""

    max_batch_prefill_tokens: int
    """Prompt tokens plus decode rows of one step."""
    max_batch_size: int | None = None
    """Running sequences; None is no limit beside the KV cache."""


def chunk_sizes(remaining: list[int], budget: int) -> list[int]:
    """How many prompt tokens each sequence computes in this step, in order, oldest first.

    Each takes what it still needs while the budget lasts; the last one may get a part. Zeros follow.
    """
    sizes = []
    for tokens in remaining:
        size = min(tokens, max(budget, 0))
        sizes.append(size)
        budget -= size
    return sizes
