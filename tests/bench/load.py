"""Load client: a closed loop of streamed greedy requests; throughput, time to first token, inter-token latency.

    python tests/bench/load.py --url http://127.0.0.1:3000 --api native --model DIR --concurrency 1,8,32

Every request has its own prompt of exactly `--prompt-tokens` tokens and must be answered with exactly
`--output-tokens`; anything else makes the run fail, because servers that do different work cannot be compared.
"""

import argparse
import asyncio
import json
import random
import sys
import sysconfig
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import uvloop
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.apis import APIS, Api
from bench.report import End, Outcome, Report, summarise
from bench.sse import ProtocolError, SseReader

HOST = "127.0.0.1"
Result = TypeVar("Result")


@dataclass(slots=True)
class Exchange(asyncio.Protocol):
    """One request on one connection. Keeps events as they came; they are parsed when it is over."""

    request: bytes
    done: "asyncio.Future[None]"
    reader: SseReader = field(default_factory=SseReader)
    events: list[tuple[float, bytes]] = field(default_factory=list)
    error: str | None = None
    transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one without inheriting it
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        try:
            self.events += [(now, payload) for payload in self.reader.feed(data)]
        except (ProtocolError, ValueError) as error:
            self._finish(f"{type(error).__name__}: {error}")
        if self.reader.ended:
            self._finish(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._finish(None if exc is None else f"{type(exc).__name__}: {exc}")

    def _finish(self, error: str | None) -> None:
        if not self.done.done():
            self.error = error
            self.done.set_result(None)


def judge(api: Api, exchange: Exchange, start: float, end: float) -> Outcome:
    """What became of a request: its events, parsed."""
    outcome = Outcome(start=start, end=end, kind=End.OK)
    if exchange.error is not None or exchange.reader.status is None:
        outcome.kind, outcome.detail = End.CONN_ERROR, exchange.error or "closed without an answer"
        return outcome
    if exchange.reader.status != 200:
        outcome.kind = End.HTTP_ERROR
        outcome.detail = f"{exchange.reader.status} {exchange.reader.body[:200].decode(errors='replace')}"
        return outcome
    for at, payload in exchange.events:
        if payload == b"[DONE]":
            continue
        piece = api.read(json.loads(payload))
        if piece.error is not None:
            outcome.kind, outcome.detail = End.SSE_ERROR, piece.error
            return outcome
        if piece.has_token:
            outcome.token_times.append(at)
        outcome.usage = piece.usage or outcome.usage
    if outcome.usage is None or not outcome.token_times:
        outcome.kind, outcome.detail = End.CONN_ERROR, "the stream ended early"
    return outcome


async def send(url: str, api: Api, prompt: str, output_tokens: int, limit_s: float = 900) -> Outcome:
    return judge(api, *await exchange_events(url, api.path, api.body(prompt, output_tokens), limit_s))


async def exchange_events(url: str, path: str, body: dict[str, Any], limit_s: float) -> tuple[Exchange, float, float]:
    """Send one request, wait until it is over; the exchange, its start and its end."""
    address = urlsplit(url)
    loop = asyncio.get_running_loop()
    exchange = Exchange(http_request(address.netloc, path, body), loop.create_future())
    start = time.perf_counter()
    try:
        async with asyncio.timeout(limit_s):
            await loop.create_connection(lambda: exchange, address.hostname or HOST, address.port or 80)
            await exchange.done
    except (OSError, TimeoutError) as error:
        exchange.error = f"{type(error).__name__}: {error}"
    finally:
        if exchange.transport is not None:
            exchange.transport.abort()
    return exchange, start, time.perf_counter()


def http_request(host: str, path: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\nconnection: close\r\n"
    return f"{head}content-length: {len(content)}\r\n\r\n".encode() + content


async def closed_loop(
    prompts: Iterable[str], concurrency: int, one: Callable[[str], Awaitable[Result]]
) -> list[Result]:
    """Answer all prompts with `concurrency` clients, each of which asks again as soon as it is answered."""
    waiting = iter(prompts)
    results: list[Result] = []

    async def client() -> None:
        results.extend([await one(prompt) for prompt in waiting])

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(client())
    return results


def prompts_of(tokenizer_json: Path, num_tokens: int, seed: int) -> Iterator[str]:
    """Endless distinct prompts of exactly `num_tokens` tokens, cut from the standard library's sources."""
    tokenizer = Tokenizer.from_file(str(tokenizer_json))
    choice = random.Random(seed)
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    seen: set[str] = set()
    while True:
        ids = tokenizer.encode(choice.choice(sources).read_text(encoding="utf-8"), add_special_tokens=False).ids
        for _ in range(min(4, len(ids) // num_tokens)):
            start = choice.randrange(len(ids) - num_tokens + 1)
            prompt = tokenizer.decode(ids[start : start + num_tokens])
            # Text cut out of its place may join up into other tokens: only those that survive count.
            if prompt not in seen and len(tokenizer.encode(prompt).ids) == num_tokens:
                seen.add(prompt)
                yield prompt


def num_requests(concurrency: int) -> int:
    """Enough of them that start and end of the loop, when not all clients are busy, weigh little."""
    return max(8, 3 * concurrency)


async def measure(
    url: str, api: Api, prompts: Iterator[str], concurrency: int, prompt_tokens: int, output_tokens: int
) -> Report:
    chosen = [next(prompts) for _ in range(num_requests(concurrency))]
    cpu_before = time.process_time()
    outcomes = await closed_loop(chosen, concurrency, lambda prompt: send(url, api, prompt, output_tokens))
    cpu_s = time.process_time() - cpu_before
    return summarise(outcomes, concurrency, prompt_tokens, output_tokens, cpu_s)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:3000")
    parser.add_argument("--api", choices=sorted(APIS), default="native")
    parser.add_argument("--model", type=Path, required=True, help="folder whose tokenizer.json counts the prompts")
    parser.add_argument("--concurrency", type=numbers, default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    tokens = arguments.prompt_tokens, arguments.output_tokens
    prompts = prompts_of(arguments.model / "tokenizer.json", arguments.prompt_tokens, arguments.seed)
    for concurrency in arguments.concurrency:
        report = uvloop.run(measure(arguments.url, APIS[arguments.api], prompts, concurrency, *tokens))
        print(json.dumps(asdict(report), indent=2))


if __name__ == "__main__":
    main()
