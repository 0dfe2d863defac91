"""The router alone: real HTTP in front, a shard that answers at once behind, and the processor time of its process.

    python tests/bench/router_bench.py --model DIR [--streams 256 --output-tokens 256 --rounds 3]

The router has one core to itself; the null shard and this client share another. A router that waits for either of
them is not the limit, so beside the streamed tokens per second the report has the tokens per second of router
processor time: what one core does when it is kept busy.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import cast

import psutil
import uvloop
from text_generation_launcher.benchmark.http_client import http_request

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.apis import APIS
from bench.load import closed_loop, prompts_of
from bench.servers import HOST, end_cleanly_on_sigterm, running

NATIVE = APIS["native"]
MARK = b'"index":'
"""Once in every event of a native stream; in a text its quotes would be escaped."""


@dataclass(slots=True)
class Counter(asyncio.Protocol):
    """Counts the tokens of one stream without parsing it: the client must not be what is measured."""

    request: bytes
    done: "asyncio.Future[int]"
    tokens: int = 0
    tail: bytes = b""
    transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        joined = self.tail + data
        self.tokens += joined.count(MARK)
        self.tail = joined[-(len(MARK) - 1) :]

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(self.tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterReport:
    streams: int
    output_tokens: int
    requests: int
    wall_s: float
    tokens_per_s: float
    router_cpu_s: float
    router_busy: float
    """Share of its core that the router used; near 1 it was the limit."""
    tokens_per_router_cpu_s: float
    router_us_per_token: float
    client_cpu_s: float
    router_rss_mb: float


async def drive(port: int, prompts: list[str], streams: int, output_tokens: int) -> int:
    loop = asyncio.get_running_loop()

    async def one(prompt: str) -> int:
        request = http_request(f"http://{HOST}:{port}", NATIVE.path, NATIVE.body(prompt, output_tokens))
        counter = Counter(request, loop.create_future())
        await loop.create_connection(lambda: counter, HOST, port)
        tokens = await counter.done
        if tokens != output_tokens:
            raise RuntimeError(f"asked for {output_tokens} tokens, counted {tokens}: {counter.tail!r}")
        return tokens

    return sum(await closed_loop(prompts, streams, one))


def cpu_seconds(router: psutil.Process) -> float:
    """Of all its threads and children, in user and kernel mode."""
    times = [process.cpu_times() for process in (router, *router.children(recursive=True))]
    return float(sum(time.user + time.system for time in times))


def measure(router: psutil.Process, port: int, prompts: list[str], streams: int, output_tokens: int) -> RouterReport:
    router_before, client_before, start = cpu_seconds(router), time.process_time(), time.perf_counter()
    tokens = uvloop.run(drive(port, prompts, streams, output_tokens))
    wall_s = time.perf_counter() - start
    router_cpu_s = cpu_seconds(router) - router_before
    return RouterReport(
        streams=streams,
        output_tokens=output_tokens,
        requests=len(prompts),
        wall_s=round(wall_s, 3),
        tokens_per_s=round(tokens / wall_s),
        router_cpu_s=round(router_cpu_s, 3),
        router_busy=round(router_cpu_s / wall_s, 3),
        tokens_per_router_cpu_s=round(tokens / router_cpu_s),
        router_us_per_token=round(router_cpu_s / tokens * 1e6, 2),
        client_cpu_s=round(time.process_time() - client_before, 3),
        router_rss_mb=round(router.memory_info().rss / 1e6),
    )


@contextmanager
def null_shard_and_router(model: Path, port: int, streams: int) -> Iterator[psutil.Process]:
    """Both as processes of their own, pinned: the router to the first core, all else to the others."""
    router_core, *other_cores = sorted(os.sched_getaffinity(0))
    if not other_cores:
        raise SystemExit("this benchmark needs two cores")
    os.sched_setaffinity(0, other_cores)  # children inherit it
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        socket = f"{folder}/shard"
        shard_program = str(Path(__file__).with_name("null_shard.py"))
        shard = psutil.Popen([sys.executable, shard_program, "--model", str(model), "--uds-path", socket])
        argv = ["taskset", "-c", str(router_core), sys.executable, "-m", "text_generation_router"]
        argv += ["--hostname", HOST, "--port", str(port), "--master-shard-uds-path", f"{socket}-0"]
        argv += ["--max-concurrent-requests", str(2 * streams)]
        try:
            with running(argv, port) as server:
                yield psutil.Process(server.process.pid)
        finally:
            shard.terminate()
            shard.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder with tokenizer.json and config.json")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--output-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=18_100)
    parser.add_argument("--output", type=Path, help="JSON file for the reports")
    arguments = parser.parse_args()
    end_cleanly_on_sigterm()
    prompts = prompts_of(arguments.model / "tokenizer.json", arguments.prompt_tokens, seed=0)
    reports = []
    with null_shard_and_router(arguments.model, arguments.port, arguments.streams) as router:
        for round_number in range(arguments.rounds + 1):
            chosen = list(islice(prompts, 2 * arguments.streams))
            report = measure(router, arguments.port, chosen, arguments.streams, arguments.output_tokens)
            print(json.dumps(asdict(report)) + (" (warm-up, not counted)" if round_number == 0 else ""))
            reports.append(report)
    counted = reports[1:]
    if arguments.output:
        arguments.output.write_text(json.dumps([asdict(report) for report in counted], indent=2) + "\n")
    median = sorted(counted, key=lambda report: report.tokens_per_router_cpu_s)[len(counted) // 2]
    print(f"{median.tokens_per_s} streamed tokens/s, {median.tokens_per_router_cpu_s} per second of router processor")


if __name__ == "__main__":
    main()
