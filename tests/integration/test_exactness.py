"""Greedy tokens through HTTP, router, gRPC and shards equal `transformers` `generate()`, token for token."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from integration.asking import answer_of, body, metrics, token_ids, wait_until_idle
from integration.launched import ONE_THREAD, Launched, serving
from integration.reference import NUM_NEW_TOKENS, Reference, prompts
from tiny_models import PROMISED

Job = tuple[str, int]
"""A prompt and how many tokens to generate."""

SIXTEEN = tuple(zip(prompts(), NUM_NEW_TOKENS, strict=True))
VARIANTS: dict[str, tuple[str, ...]] = {
    "as it comes": (),
    "prompts in chunks of 16 tokens": ("--max-batch-prefill-tokens", "16"),
    "no module swapped": (),
    "two shards": ("--num-shard", "2"),
}
UNSPLIT = frozenset({"gpt2", "stablelm", "cohere"})
"""Promised types that two shards cannot share: what they say is in test_refusals.py."""


async def all_of(server: Launched, jobs: Sequence[Job], within_s: float) -> list[list[int]]:
    """Requests at random moments, so that prompts join a batch that is under way."""
    rng = random.Random(1)

    async def ask(prompt: str, max_new_tokens: int, after_s: float) -> list[int]:
        await asyncio.sleep(after_s)
        return token_ids(await answer_of(server, "/generate", body(prompt, max_new_tokens=max_new_tokens)))

    return await asyncio.gather(*(ask(*job, rng.uniform(0, within_s)) for job in jobs))


def assert_exact(server: Launched, folder: Path, jobs: Sequence[Job] = SIXTEEN, *, within_s: float = 0.05) -> None:
    reference = Reference(folder)
    expected = [reference.greedy(*job) for job in jobs]
    assert asyncio.run(all_of(server, jobs, within_s)) == expected
    wait_until_idle(server)


def check(folder: Path, variant: str) -> None:
    environ = ONE_THREAD | ({"TGI_SWAPS": "0"} if variant == "no module swapped" else {})
    with serving("--model-id", str(folder), *VARIANTS[variant], environ=environ) as server:
        assert_exact(server, folder)
        assert_exact(server, folder)
        assert metrics(server)["tgi_prefix_cache_hit_tokens"] > 0, "the second time nothing was reused"


def test_sixteen_at_once_of_a_llama(tiny: Launched, tiny_llama: Path) -> None:
    assert_exact(tiny, tiny_llama)


@pytest.mark.parametrize(
    ("model_type", "variant"),
    [
        pytest.param(
            "mistral",
            "prompts in chunks of 16 tokens",
            id="a window shorter than the prompt, in chunks",
            marks=pytest.mark.slow,
        ),
        pytest.param("llama", "two shards", id="a llama on two shards"),
    ],
)
def test_sixteen_at_once(tiny_model: Callable[[str], Path], model_type: str, variant: str) -> None:
    check(tiny_model(model_type), variant)


def test_answers_that_outgrow_the_cache_together(tiny_llama: Path) -> None:
    """Short prompts are let in, their long answers do not fit side by side: some are pre-empted and computed again."""
    jobs = [(prompt, 110) for prompt in prompts(lengths=(8,) * 16, seed=9)]
    limits = ("--max-total-tokens", "128", "--max-batch-total-tokens", "256")
    with serving("--model-id", str(tiny_llama), *limits) as server:
        assert_exact(server, tiny_llama, jobs, within_s=0.01)
        assert metrics(server)["tgi_batch_next_size_sum"] > len(jobs), "nobody was admitted twice"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "variant"),
    [
        pytest.param(model_type, variant, id=f"{model_type}, {variant}")
        for model_type in PROMISED
        for variant in VARIANTS
        if not (variant == "two shards" and model_type in UNSPLIT)
    ],
)
def test_every_promised_type_in_every_way(tiny_model: Callable[[str], Path], model_type: str, variant: str) -> None:
    check(tiny_model(model_type), variant)
