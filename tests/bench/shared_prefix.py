"""Requests that begin alike: time to first token of a first wave of them, and of a second.

    python tests/bench/shared_prefix.py --model DIR [--servers ours,vllm --peers DIR] [--repetitions 3]

16 requests at once share their first 2,048 tokens and differ in the last 32; then 16 more with the same beginning. A
server that keeps what it has computed for a prefix answers the second wave sooner, and perhaps most of the first; one
that does not has a ratio of 1. Every repetition has a prefix of its own. llama.cpp's row is without its prompt cache,
as in `compare.py`.
"""

import argparse
import asyncio
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import uvloop
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.compare import heading
from bench.load import prompts_of
from bench.report import WrongLength
from bench.servers import KINDS, Places, end_cleanly_on_sigterm, running
from text_generation_launcher.benchmark.apis import Api, Usage
from text_generation_launcher.benchmark.measurements import percentile
from text_generation_launcher.benchmark.outcome import End, Outcome, send

WAVES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    requests: int
    prefix_tokens: int
    tail_tokens: int
    output_tokens: int


def join_exactly(tokenizer: Tokenizer, prefix: str, tails: Iterator[str]) -> Iterator[str]:
    """Prefix and tail where the text of both has the tokens of the one and then those of the other."""
    first = tokenizer.encode(prefix).ids
    for tail in tails:
        if tokenizer.encode(prefix + tail).ids == first + tokenizer.encode(tail).ids:
            yield prefix + tail


def times_to_first(outcomes: list[Outcome], setting: Setting) -> list[float]:
    """Raises: WrongLength for anything but an answer of the length that was asked for."""
    expected = Usage(setting.prefix_tokens + setting.tail_tokens, setting.output_tokens)
    for outcome in outcomes:
        if outcome.kind is not End.OK or outcome.usage != expected:
            raise WrongLength(f"{outcome.kind}, {outcome.detail or outcome.usage} instead of {expected}")
    return [outcome.ttft_s for outcome in outcomes]


async def wave(url: str, api: Api, prompts: Iterator[str], setting: Setting) -> list[float]:
    chosen = [next(prompts) for _ in range(setting.requests)]
    outcomes = await asyncio.gather(*(send(url, api, prompt, setting.output_tokens) for prompt in chosen))
    return times_to_first(list(outcomes), setting)


def measure(name: str, places: Places, port: int, setting: Setting, repetitions: int) -> list[list[list[float]]]:
    """Times to first token, by repetition and wave."""
    kind = KINDS[name]
    kind.prepare(places)
    file = places.model / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    prefixes = prompts_of(file, setting.prefix_tokens, seed=1)
    tails = prompts_of(file, setting.tail_tokens, seed=2)
    with running(kind.argv(places, port), port, kind.environment(places)) as server:

        async def repeat() -> list[list[float]]:
            prompts = join_exactly(tokenizer, next(prefixes), tails)
            return [await wave(server.url, kind.api, prompts, setting) for _ in range(WAVES)]

        async def all_of_them() -> list[list[list[float]]]:
            done = [await repeat() for _ in range(repetitions + 1)]
            return done[1:]  # the first is the warm-up

        return uvloop.run(all_of_them())


def rows(name: str, repetitions: list[list[list[float]]]) -> list[str]:
    """A row for each wave, medians over the repetitions; the ratio is that of the means."""
    lines = []
    for number in range(WAVES):
        waves = [waves[number] for waves in repetitions]
        ratio = statistics.median(statistics.mean(waves[0]) / statistics.mean(waves[number]) for waves in repetitions)
        measures = [
            [percentile(times, 50) for times in waves],
            [statistics.mean(times) for times in waves],
            [max(times) for times in waves],
        ]
        cells = [f"{statistics.median(values) * 1000:.0f}" for values in measures]
        lines.append(f"| {' | '.join([name, str(number + 1), *cells, f'{ratio:.2f}'])} |")
    return lines


def report(results: dict[str, list[list[list[float]]]], setting: Setting, model: Path) -> list[str]:
    measured = (
        f"{setting.requests} requests at once, {setting.prefix_tokens:,} tokens shared, {setting.tail_tokens} of their "
        f"own, {setting.output_tokens} out"
    )
    return [
        *heading(model, measured, len(next(iter(results.values())))),
        "| server | wave | TTFT p50 ms | mean | max | first wave's mean / this one's |",
        "|---|---:|---:|---:|---:|---:|",
        *(line for name, repetitions in results.items() for line in rows(name, repetitions)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder that make_model.py wrote")
    parser.add_argument("--peers", type=Path, default=Path("peers"), help="folder that make_peers.py wrote")
    parser.add_argument("--servers", default="ours", help=f"any of {', '.join(KINDS)}")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prefix-tokens", type=int, default=2048)
    parser.add_argument("--tail-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--port", type=int, default=18_220)
    arguments = parser.parse_args()
    end_cleanly_on_sigterm()
    setting = Setting(
        requests=arguments.requests,
        prefix_tokens=arguments.prefix_tokens,
        tail_tokens=arguments.tail_tokens,
        output_tokens=arguments.output_tokens,
    )
    places = Places(model=arguments.model.absolute(), peers=arguments.peers.absolute())
    results = {
        name: measure(name, places, arguments.port, setting, arguments.repetitions)
        for name in arguments.servers.split(",")
    }
    print("\n".join(report(results, setting, places.model)))


if __name__ == "__main__":
    main()
