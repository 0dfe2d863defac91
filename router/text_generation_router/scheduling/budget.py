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
    max_inter_token_latency_s: float | None = None
    """What a step with pieces of prompts may take, where running streams wait for it; None: see ``StepTime``."""
