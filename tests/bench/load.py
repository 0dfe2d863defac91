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
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import uvloop
from text_generation_launcher.benchmark.apis import Api
from text_generation_launcher.benchmark.outcome import send
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.apis import APIS
from bench.report import Report, summarise

Result = TypeVar("Result")


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
