"""How the next token of a sequence is chosen; checked once, when the sequence arrives."""

from __future__ import annotations

import math
from dataclasses import dataclass

MAX_SEED = 2**64 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParameters:
    """TGI's parameters and OpenAI's; the defaults switch every step off.

    Raises: ValueError naming the parameter when a value has no meaning.
    """

    temperature: float = 1.0
    top_k: int = 0
    """0: off."""
    top_p: float = 1.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    """TGI's: by the share of prompt and output that a token has."""
    presence_penalty: float = 0.0
    """Of a token that was generated."""
    count_penalty: float = 0.0
    """For each time a token was generated."""
    do_sample: bool = False
    seed: int = 0
    """Unsigned, 64 bits."""
    choice_index: int = 0
    bias_ids: tuple[int, ...] = ()
    """Distinct token ids."""
    biases: tuple[float, ...] = ()
    """Added to the logit of each of them."""
    watermark: bool = False

    def __post_init__(self) -> None:
        for name in ("temperature", "repetition_penalty"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, got {value}")
        for name in ("top_p", "typical_p"):
            value = getattr(self, name)
            if not 0 < value <= 1:  # NaN fails this too
                raise ValueError(f"{name} must be in (0, 1], got {value}")
        for name in ("frequency_penalty", "presence_penalty", "count_penalty"):
            value = getattr(self, name)
            if not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value}")
        if len(self.bias_ids) != len(self.biases) or len(set(self.bias_ids)) != len(self.bias_ids):
            raise ValueError("bias_ids must be distinct, with one of biases for each")
        if not all(math.isfinite(bias) for bias in self.biases):
            raise ValueError("biases must be finite numbers")
        if self.top_k < 0 or self.choice_index < 0 or not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"top_k, choice_index and seed must not be negative, got {self}")

    @property
    def has_penalty(self) -> bool:
        return self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.has_output_penalty

    @property
    def has_output_penalty(self) -> bool:
        return self.presence_penalty != 0.0 or self.count_penalty != 0.0

    @property
    def has_filter(self) -> bool:
        return self.top_k > 0 or self.top_p < 1.0 or self.typical_p < 1.0

    @property
    def is_neutral(self) -> bool:
        """Whether the logits reach the choice as the model gave them."""
        processed = self.has_penalty or self.bias_ids or self.has_filter or self.watermark
        return self.temperature == 1.0 and not processed

    @property
    def reads_history(self) -> bool:
        """Whether the tokens so far have a say."""
        return self.has_penalty or self.watermark
