"""What became of a streamed request: its events, parsed once it is over."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise

from text_generation_launcher.benchmark.apis import Api, Usage
from text_generation_launcher.benchmark.http_client import Exchange, exchange_events


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


async def send(
    url: str, api: Api, prompt: str, output_tokens: int, limit_s: float = 900, api_key: str | None = None
) -> Outcome:
    """Ask for so many tokens, and wait for the last one."""
    return judge(api, *await exchange_events(url, api.path, api.body(prompt, output_tokens), limit_s, api_key))


def judge(api: Api, exchange: Exchange, start: float, end: float) -> Outcome:
    """What became of a request that is over."""
    outcome = Outcome(start=start, end=end, kind=End.OK)
    if exchange.error is not None or exchange.reader.status is None:
        outcome.kind, outcome.detail = End.CONN_ERROR, exchange.error or "closed without an answer"
        return outcome
    if exchange.reader.status != 200:
        outcome.kind = End.HTTP_ERROR
        outcome.detail = f"{exchange.reader.status} {exchange.reader.body[:200].decode(errors='replace')}"
        return outcome
    is_whole = False
    for at, payload in exchange.events:
        if payload == b"[DONE]":
            is_whole = True
            continue
        piece = api.read(json.loads(payload))
        if piece.error is not None:
            outcome.kind, outcome.detail = End.SSE_ERROR, piece.error
            return outcome
        if piece.has_token:
            outcome.token_times.append(at)
        outcome.usage = piece.usage or outcome.usage
    if not outcome.token_times or not (is_whole or outcome.usage):
        outcome.kind, outcome.detail = End.CONN_ERROR, "the stream ended early"
    return outcome
