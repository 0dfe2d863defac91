"""From what became of each request to the numbers of a row: throughput, time to first token, inter-token latency."""

from collections import Counter
from dataclasses import dataclass

from text_generation_launcher.benchmark.apis import Usage
from text_generation_launcher.benchmark.measurements import percentile
from text_generation_launcher.benchmark.outcome import End, Outcome


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
