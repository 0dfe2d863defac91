"""What grammars cost: the mask of a token, and the streams beside grammars that are meant to do harm.

    python tests/bench/guidance_bench.py --model DIR [--streams 4 --repetitions 3]

First the masks alone, in this process, over the grammars of the test suite with the model's own vocabulary: what a
shard does for each guided token. Then a server with running streams: quiet seconds, then as many short requests without
a grammar as there are hostile ones, one after another, and then these. Each has to end in 422 or in an answer; how long
that took is in the table.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.compare import heading
from bench.interference import gaps_inside
from bench.load import prompts_of
from bench.servers import KINDS, Places, end_cleanly_on_sigterm, running
from hostile_grammars import HOSTILE
from integration.test_grammar import NUM_SCHEMAS, patterns, schema_number
from text_generation_launcher.benchmark.apis import Api
from text_generation_launcher.benchmark.http_client import ask
from text_generation_launcher.benchmark.measurements import percentile
from text_generation_launcher.benchmark.outcome import End, send
from text_generation_proto.grammars import Grammar, GrammarKind
from text_generation_server.generation.guidance import Guidance

MOST_TOKENS = 60
"""Steps through each grammar, at random."""


def mask_times_s(tokenizer: Path, vocab_size: int, eos: int) -> list[float]:
    """Of `advance` and `allowed` for each token of random walks through the grammars of the tests."""
    guidance = Guidance(tokenizer, vocab_size, [eos])
    grammars = [Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema_number(number))) for number in range(NUM_SCHEMAS)]
    grammars += [Grammar(GrammarKind.REGEX, pattern) for pattern in patterns()]
    times: list[float] = []
    choice = random.Random(0)
    for grammar in grammars:
        guide = guidance.guide(grammar, [])
        token: list[int] = []
        for _ in range(MOST_TOKENS):
            started = time.perf_counter()
            guide.advance(token)
            allowed = guide.allowed()
            times.append(time.perf_counter() - started)
            ids = allowed.nonzero()[0]
            token = [int(choice.choice(ids))]
            if token[0] == eos:
                break
    return times


@dataclass(frozen=True, slots=True)
class Repetition:
    quiet_s: list[float]
    plain_s: list[float]
    beside_s: list[float]
    hostile: dict[str, tuple[int, float]]
    """Status, and seconds until it was there."""


async def one_by_one(url: str, grammars: Mapping[str, dict[str, Any] | None]) -> dict[str, tuple[int, float]]:
    found: dict[str, tuple[int, float]] = {}
    for number, (name, grammar) in enumerate(grammars.items()):
        parameters = {"max_new_tokens": 8, "grammar": grammar, "seed": number, "do_sample": True}
        started = time.perf_counter()
        answer = await ask(url, "/generate", {"inputs": "x", "parameters": parameters}, limit_s=60)
        found[name] = (answer.status, time.perf_counter() - started)
    return found


async def repeat(url: str, api: Api, prompts: object, streams: int, tokens: int, quiet_s: float) -> Repetition:
    tasks = [asyncio.create_task(send(url, api, next(prompts), tokens)) for _ in range(streams)]  # type: ignore[call-overload]
    await asyncio.sleep(quiet_s)
    quiet_until = time.perf_counter()
    await one_by_one(url, dict.fromkeys(HOSTILE))
    begin = time.perf_counter()
    hostile = await one_by_one(url, HOSTILE)
    end = time.perf_counter()
    outcomes = await asyncio.gather(*tasks)
    assert all(outcome.kind is End.OK for outcome in outcomes), [outcome.detail for outcome in outcomes]
    running_from = max(outcome.token_times[0] for outcome in outcomes)
    assert end < min(outcome.token_times[-1] for outcome in outcomes), "--output-tokens has to be larger"
    return Repetition(
        [gap for outcome in outcomes for gap in gaps_inside(outcome.token_times, running_from, quiet_until)],
        [gap for outcome in outcomes for gap in gaps_inside(outcome.token_times, quiet_until, begin)],
        [gap for outcome in outcomes for gap in gaps_inside(outcome.token_times, begin, end)],
        hostile,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder that make_model.py wrote")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=1500, help="of each stream: more than are seen")
    parser.add_argument("--quiet-s", type=float, default=6)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--port", type=int, default=18_230)
    arguments = parser.parse_args()
    end_cleanly_on_sigterm()
    model = arguments.model.absolute()
    config = json.loads((model / "config.json").read_text())
    times = mask_times_s(model / "tokenizer.json", config["vocab_size"], config["eos_token_id"])
    print(
        f"Masks: {len(times)} tokens, vocabulary {config['vocab_size']:,}: p50 {percentile(times, 50) * 1e6:.0f} us, "
        f"p99 {percentile(times, 99) * 1e6:.0f} us, worst {max(times) * 1e6:.0f} us"
    )
    kind, places = KINDS["ours"], Places(model=model, peers=Path("peers"))
    prompts = prompts_of(model / "tokenizer.json", arguments.prompt_tokens, seed=3)
    repetitions: list[Repetition] = []
    for _ in range(arguments.repetitions):  # a server each: verdicts on grammars are remembered
        with running(kind.argv(places, arguments.port), arguments.port, kind.environment(places)) as server:
            setting = (arguments.streams, arguments.output_tokens, arguments.quiet_s)
            uvloop.run(send(server.url, kind.api, next(prompts), 16))
            repetitions.append(uvloop.run(repeat(server.url, kind.api, prompts, *setting)))
    print("\n".join(heading(model, f"{arguments.streams} streams beside {len(HOSTILE)} grammars", len(repetitions))))
    for name, gaps in (("quiet", "quiet_s"), ("beside plain requests", "plain_s"), ("beside them", "beside_s")):
        values = [[percentile(getattr(each, gaps), q) * 1e3 for each in repetitions] for q in (50, 99)]
        mean = statistics.median(statistics.fmean(getattr(each, gaps)) * 1e3 for each in repetitions)
        p50, p99 = (statistics.median(each) for each in values)
        print(f"{name}: inter-token latency mean {mean:.1f} ms, p50 {p50:.1f}, p99 {p99:.1f}")
    for name in HOSTILE:
        statuses = {each.hostile[name][0] for each in repetitions}
        print(f"{name}: {statuses}, {max(each.hostile[name][1] for each in repetitions):.2f} s at most")


if __name__ == "__main__":
    main()
