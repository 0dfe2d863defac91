"""Pure: what one batch took, and the statistics of many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One batch from its prompts to its last token. Times are seconds.

    A shard computes a batch in steps, so there is one time a step. A server answers streams, so there is one for
    each stream: what its reader waits.
    """

    batch_size: int
    prefill_s: tuple[float, ...]
    """Shard: the prefill. Server: the time to the first token, of every stream."""
    token_s: tuple[float, ...]
    """Shard: every decode step. Server: the time before every token but the first, of every stream."""
    decode_s: tuple[float, ...]
    """From the first to the last token. Server: of every stream that had the whole length."""
    prompt_tokens: int
    """Of all prompts together."""
    decode_tokens: int
    """Of all sequences together, without the first of each, which the prefill yields."""
    prefill_wall_s: float
    """Until every sequence had its first token."""
    decode_wall_s: float
    """From the first of them to the last token of all."""
    num_short: int = 0
    """Streams that the server ended before the length that was asked for."""

    @property
    def prefill_rate(self) -> float | None:
        """Tokens a second that the prefill yields, one for each sequence; as TGI counts it."""
        return _rate(self.batch_size, self.prefill_wall_s)

    @property
    def prompt_rate(self) -> float | None:
        """Prompt tokens a second."""
        return _rate(self.prompt_tokens, self.prefill_wall_s)

    @property
    def decode_rate(self) -> float | None:
        """Tokens a second behind the first ones; None where there are none."""
        return _rate(self.decode_tokens, self.decode_wall_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    average: float
    lowest: float
    highest: float
    p50: float
    p90: float
    p99: float


@dataclass(slots=True)
class BatchResult:
    """All that was measured at one batch size, warm-ups left out."""

    batch_size: int
    runs: list[Run] = field(default_factory=list)

    @property
    def prefill_s(self) -> list[float]:
        return [value for run in self.runs for value in run.prefill_s]

    @property
    def token_s(self) -> list[float]:
        return [value for run in self.runs for value in run.token_s]

    @property
    def decode_s(self) -> list[float]:
        return [value for run in self.runs for value in run.decode_s]

    @property
    def prefill_rates(self) -> list[float]:
        return [rate for run in self.runs if (rate := run.prefill_rate) is not None]

    @property
    def prompt_rates(self) -> list[float]:
        return [rate for run in self.runs if (rate := run.prompt_rate) is not None]

    @property
    def decode_rates(self) -> list[float]:
        return [rate for run in self.runs if (rate := run.decode_rate) is not None]


def summarise(values: Sequence[float]) -> Summary | None:
    """None of nothing."""
    if not values:
        return None
    return Summary(
        average=sum(values) / len(values),
        lowest=min(values),
        highest=max(values),
        p50=percentile(values, 50),
        p90=percentile(values, 90),
        p99=percentile(values, 99),
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest ranks, as numpy does it; NaN of nothing."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low = int(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def _rate(tokens: int, seconds: float) -> float | None:
    return tokens / seconds if tokens and seconds > 0 else None
