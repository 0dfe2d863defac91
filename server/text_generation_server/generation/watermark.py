"""The watermark of generated text: every token prefers a part of the vocabulary that the token before it chooses.

Kirchenbauer et al., "A Watermark for Large Language Models" (ICML 2023), the soft red list. A detector knows how the
generator is seeded: torch's on a CPU, with ``HASH_KEY`` times the id of the token before; the first ids of its
permutation of the vocabulary are green. It is the same on every device, so that one detector serves for all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

HASH_KEY = 15_485_863
"""A large prime; the same in all implementations that are derived from the authors' own."""
_REMEMBERED = 64
"""Lists of green tokens: to make one takes half a millisecond at 49k tokens."""


@dataclass(frozen=True, slots=True)
class Watermark:
    """``--watermark-gamma`` and ``--watermark-delta``."""

    gamma: float = 0.5
    """Share of the vocabulary that is green."""
    delta: float = 2.0
    """Added to the logit of a green token."""


DEFAULT_WATERMARK = Watermark()


@lru_cache(maxsize=_REMEMBERED)
def green_ids(previous_id: int, vocab_size: int, gamma: float) -> Tensor:
    """The tokens that are preferred behind another; int64 on the CPU."""
    generator = torch.Generator().manual_seed(HASH_KEY * previous_id)
    return torch.randperm(vocab_size, generator=generator)[: int(gamma * vocab_size)]
