"""What a long prompt does to streams that run: their inter-token latency while it is computed, and without it.

    python tests/bench/interference.py --model DIR [--servers ours,llama.cpp --peers DIR] [--repetitions 5]

Four streams run. After some quiet seconds a prompt of 3,000 tokens is sent; the window from its sending to its first
token is compared with the quiet before it. No prompt comes twice. Each server is started and stopped like in
`compare.py`.
"""

import argparse
import asyncio
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import uvloop

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.compare import heading
from bench.load import prompts_of
from bench.servers import KINDS, Places, end_cleanly_on_sigterm, running
from text_generation_launcher.benchmark.apis import Api, Usage
from text_generation_launcher.benchmark.measurements import percentile
from text_generation_launcher.benchmark.outcome import End, Outcome, send

ENOUGH_GAPS = 20
"""A p99 of fewer is none."""


class NoWindow(Exception):
    """The streams were too short, or too slow, for what was to be seen in them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    streams: int
    prompt_tokens: int
    output_tokens: int
    long_tokens: int
    long_output_tokens: int
    quiet_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Repetition:
    quiet_s: list[float]
    during_s: list[float]
    long_ttft_s: float

    @property
    def ratio(self) -> float:
        return percentile(self.during_s, 99) / percentile(self.quiet_s, 99)


def gaps_inside(token_times: list[float], begin: float, end: float) -> list[float]:
    return [after - before for before, after in pairwise(token_times) if begin <= before and after <= end]


def gaps_touching(token_times: list[float], begin: float, end: float) -> list[float]:
    """Also those at the rims of the window: the first one waits for the long prompt already."""
    return [after - before for before, after in pairwise(token_times) if begin < after and before < end]


def judge(streams: list[Outcome], long: Outcome, setting: Setting) -> Repetition:
    """Raises: NoWindow when a stream failed, or had ended before the long prompt's first token."""
    asked = Usage(setting.prompt_tokens, setting.output_tokens)
    outcomes = [(stream, asked) for stream in streams]
    outcomes.append((long, Usage(setting.long_tokens, setting.long_output_tokens)))
    for outcome, expected in outcomes:
        if outcome.kind is not End.OK or outcome.usage != expected:
            raise NoWindow(f"{outcome.kind}, {outcome.detail or outcome.usage} instead of {expected}")
    running_from = max(stream.token_times[0] for stream in streams)
    sent, answered = long.start, long.token_times[0]
    if answered > min(stream.token_times[-1] for stream in streams):
        raise NoWindow("a stream ended before the long prompt's first token: --output-tokens has to be larger")
    quiet = [gap for stream in streams for gap in gaps_inside(stream.token_times, running_from, sent)]
    during = [gap for stream in streams for gap in gaps_touching(stream.token_times, sent, answered)]
    if min(len(quiet), len(during)) < ENOUGH_GAPS:
        raise NoWindow(f"{len(quiet)} quiet gaps and {len(during)} during the prefill: --quiet-s has to be larger")
    return Repetition(quiet_s=quiet, during_s=during, long_ttft_s=long.ttft_s)


async def repeat(url: str, api: Api, short: Iterator[str], long: Iterator[str], setting: Setting) -> Repetition:
    running_streams = [
        asyncio.create_task(send(url, api, next(short), setting.output_tokens)) for _ in range(setting.streams)
    ]
    prompt = next(long)
    await asyncio.sleep(setting.quiet_s)
    answer = await send(url, api, prompt, setting.long_output_tokens)
    return judge(list(await asyncio.gather(*running_streams)), answer, setting)


def measure(name: str, places: Places, port: int, setting: Setting, repetitions: int) -> list[Repetition]:
    kind = KINDS[name]
    kind.prepare(places)
    tokenizer = places.model / "tokenizer.json"
    short = prompts_of(tokenizer, setting.prompt_tokens, seed=1)
    long = prompts_of(tokenizer, setting.long_tokens, seed=2)
    with running(kind.argv(places, port), port, kind.environment(places)) as server:

        async def all_of_them() -> list[Repetition]:
            # One more, which is not counted: every server is slower at what it does for the first time.
            await send(server.url, kind.api, next(long), setting.long_output_tokens)
            done = [await repeat(server.url, kind.api, short, long, setting) for _ in range(repetitions + 1)]
            return done[1:]

        return uvloop.run(all_of_them())


def row(name: str, repetitions: list[Repetition]) -> str:
    """Medians over the repetitions."""

    def middle(values: list[float]) -> float:
        return statistics.median(values)

    quiet = [middle([percentile(one.quiet_s, percent) for one in repetitions]) * 1000 for percent in (50, 99)]
    during = [middle([percentile(one.during_s, percent) for one in repetitions]) * 1000 for percent in (50, 99)]
    times = [f"{value:.1f}" for value in [*quiet, *during]]
    ratio = f"{middle([one.ratio for one in repetitions]):.2f}"
    return f"| {' | '.join([name, *times, ratio, f'{middle([one.long_ttft_s for one in repetitions]):.2f}'])} |"


def report(results: dict[str, list[Repetition]], setting: Setting, model: Path) -> list[str]:
    measured = f"{setting.streams} streams, a prompt of {setting.long_tokens:,} tokens"
    return [
        *heading(model, measured, len(next(iter(results.values())))),
        "| server | quiet: ITL p50 ms | p99 | during the prefill: ITL p50 ms | p99 | p99 during / quiet "
        "| the prompt's TTFT, s |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *(row(name, repetitions) for name, repetitions in results.items()),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder that make_model.py wrote")
    parser.add_argument("--peers", type=Path, default=Path("peers"), help="folder that make_peers.py wrote")
    parser.add_argument("--servers", default="ours", help=f"any of {', '.join(KINDS)}")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=768, help="of each stream: more than are seen")
    parser.add_argument("--long-tokens", type=int, default=3000)
    parser.add_argument("--quiet-s", type=float, default=4, help="from the start of the streams to the long prompt")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--port", type=int, default=18_210)
    arguments = parser.parse_args()
    end_cleanly_on_sigterm()
    setting = Setting(
        streams=arguments.streams,
        prompt_tokens=arguments.prompt_tokens,
        output_tokens=arguments.output_tokens,
        long_tokens=arguments.long_tokens,
        long_output_tokens=16,
        quiet_s=arguments.quiet_s,
    )
    places = Places(model=arguments.model.absolute(), peers=arguments.peers.absolute())
    results = {
        name: measure(name, places, arguments.port, setting, arguments.repetitions)
        for name in arguments.servers.split(",")
    }
    print("\n".join(report(results, setting, places.model)))


if __name__ == "__main__":
    main()
