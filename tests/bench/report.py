"""From what became of each request to the numbers of a row: throughput, time to first token, inter-token latency."""

import sys
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.apis import Usage


class End(StrEnum):
    OK = "ok"
    HTTP_ERROR = "http_error"
    SSE_ERROR = "sse_error"
    CONN_ERROR = "conn_error"


@dataclass(slots=True, kw_only=True)
class Outcome:
    """One request. Times are seconds of `time.perf_counter`."""

    start: float
    end: float
    kind: End
    detail: str = ""
    token_times: list[float] = field(default_factory=list)
    """Arrival of each event that carries text; fewer than `usage` counts when a server packs tokens together."""
    usage: Usage | None = None

    @property
    def ttft_s(self) -> float:
        return self.token_times[0] - self.start

    @property
    def gaps_s(self) -> list[float]:
        """Time before each token but the first. Those that came in one event with another waited for nothing: 0."""
        gaps = [after - before for before, after in pairwise(self.token_times)]
        missing = self.usage.output_tokens - len(self.token_times) if self.usage else 0
        return gaps + [0.0] * missing


class WrongLength(Exception):
    """A server counted other tokens than it was asked for: nothing it did can be compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    concurrency: int
    requests: int
    prompt_tokens: int
    output_tokens: int
    errors: dict[str, int]
    """Requests that did not end `ok`, by kind and message."""
    wall_s: float
    tokens_per_s: float
    """Output tokens of good requests over the time from the first start to the last end."""
    ttft_ms: dict[str, float]
    itl_ms: dict[str, float]
    tokens_per_event: float
    client_cpu_share: float
    """Processor seconds of this client per second, 1 is a whole core."""


def percentile(values: list[float], percent: float) -> float:
    """Linear between the two nearest ranks, as numpy does it; NaN of nothing."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low = int(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def spread_ms(seconds: list[float]) -> dict[str, float]:
    return {f"p{percent}": round(percentile(seconds, percent) * 1000, 3) for percent in (50, 90, 99)}


def summarise(
    outcomes: list[Outcome], concurrency: int, prompt_tokens: int, output_tokens: int, client_cpu_s: float
) -> Report:
    """Raises WrongLength if a good answer has not exactly the tokens that were asked for."""
    good = [outcome for outcome in outcomes if outcome.kind is End.OK]
    expected = Usage(prompt_tokens, output_tokens)
    wrong = [outcome.usage for outcome in good if outcome.usage != expected]
    if wrong:
        raise WrongLength(f"{len(wrong)} of {len(outcomes)} answers: expected {expected}, got for one {wrong[0]}")
    wall_s = max(o.end for o in outcomes) - min(o.start for o in outcomes)
    events = sum(len(outcome.token_times) for outcome in good)
    return Report(
        concurrency=concurrency,
        requests=len(outcomes),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        errors=dict(Counter(f"{o.kind}: {o.detail}" for o in outcomes if o.kind is not End.OK)),
        wall_s=round(wall_s, 3),
        tokens_per_s=round(len(good) * output_tokens / wall_s, 2),
        ttft_ms=spread_ms([outcome.ttft_s for outcome in good]),
        itl_ms=spread_ms([gap for outcome in good for gap in outcome.gaps_s]),
        tokens_per_event=round(len(good) * output_tokens / max(events, 1), 3),
        client_cpu_share=round(client_cpu_s / wall_s, 3),
    )
