"""How many greedy streams are the same in a crowd as alone, against a running server.

    python tests/bench/fidelity.py --url http://127.0.0.1:3000 --model DIR [--streams 32]

In float32 all of them must be (`--require 1`). In bfloat16 kernels round differently for another batch shape, and a
near tie of two logits then falls the other way: there the share is a number to report.
"""

import argparse
import json
import statistics
import sys
from itertools import islice
from pathlib import Path

import uvloop
from text_generation_launcher.benchmark.http_client import exchange_events

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.apis import APIS
from bench.load import closed_loop, prompts_of

NATIVE = APIS["native"]
LIMIT_S = 900


async def token_ids(url: str, prompt: str, output_tokens: int) -> tuple[str, list[int]]:
    """The prompt and what the server made of it."""
    exchange, _, _ = await exchange_events(url, NATIVE.path, NATIVE.body(prompt, output_tokens), LIMIT_S)
    if exchange.error is not None or exchange.reader.status != 200:
        raise RuntimeError(f"{exchange.error or exchange.reader.status}: {exchange.reader.body[:200]!r}")
    events = [json.loads(payload) for _, payload in exchange.events]
    failed = [event for event in events if "token" not in event]
    if failed:
        raise RuntimeError(f"the stream broke: {failed[0]}")
    return prompt, [event["token"]["id"] for event in events]


async def generate(url: str, prompts: list[str], concurrency: int, output_tokens: int) -> dict[str, list[int]]:
    return dict(await closed_loop(prompts, concurrency, lambda prompt: token_ids(url, prompt, output_tokens)))


def equal_prefix(one: list[int], other: list[int]) -> int:
    """Number of leading ids on which both agree."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:3000")
    parser.add_argument("--model", type=Path, required=True, help="folder whose tokenizer.json counts the prompts")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--require", type=float, default=0, help="fail below this share of equal streams")
    arguments = parser.parse_args()
    prompts = list(
        islice(prompts_of(arguments.model / "tokenizer.json", arguments.prompt_tokens, 0), arguments.streams)
    )
    alone = uvloop.run(generate(arguments.url, prompts, 1, arguments.output_tokens))
    crowd = uvloop.run(generate(arguments.url, prompts, arguments.streams, arguments.output_tokens))
    agreed = [equal_prefix(alone[prompt], crowd[prompt]) for prompt in prompts]
    equal = sum(alone[prompt] == crowd[prompt] for prompt in prompts)
    share = equal / len(prompts)
    print(
        f"{equal} of {len(prompts)} streams equal ({share:.1%}); "
        f"ids up to the first difference: mean {statistics.mean(agreed):.1f} of {arguments.output_tokens}"
    )
    sys.exit(0 if share >= arguments.require else 1)


if __name__ == "__main__":
    main()
