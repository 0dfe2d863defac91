"""Equal beginnings are computed once, and nobody can tell by the answers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from integration.asking import answer_of, body, generate, metrics, token_ids, wait_until_idle
from integration.launched import Launched, serving
from integration.reference import Reference, prompts

# The servers are other tests' too: a seed of theirs would begin like a prompt that is in the cache.
(SHARED,) = prompts(lengths=(120,), seed=904)
TAILS = prompts(lengths=range(1, 17), seed=905)
NEW_TOKENS = 12


async def wave(server: Launched, texts: list[str]) -> list[list[int]]:
    requests = [body(text, max_new_tokens=NEW_TOKENS) for text in texts]
    return [token_ids(each) for each in await asyncio.gather(*(answer_of(server, "/generate", r) for r in requests))]


def cached_tokens(server: Launched, inputs: str, headers: dict[str, str] | None = None, **parameters: object) -> int:
    request = {"inputs": inputs, "parameters": {"max_new_tokens": 4, **parameters}}
    response = server.client.post("/generate", json=request, headers=headers or {})
    assert response.status_code == 200, response.text
    return int(response.headers["x-cached-tokens"])


def test_answers_behind_one_beginning_are_exact_the_first_time_and_the_second(tiny: Launched, tiny_llama: Path) -> None:
    texts = [SHARED + tail for tail in TAILS]
    reference = Reference(tiny_llama)
    expected = [reference.greedy(text, NEW_TOKENS) for text in texts]
    assert asyncio.run(wave(tiny, texts)) == expected
    before = metrics(tiny)
    assert asyncio.run(wave(tiny, texts)) == expected
    after = wait_until_idle(tiny)
    hits, queried = (
        after[f"tgi_prefix_cache_{name}_tokens"] - before[f"tgi_prefix_cache_{name}_tokens"]
        for name in ("hit", "queried")
    )
    assert queried == sum(map(len, texts))
    assert hits >= len(texts) * (len(SHARED) // 16 * 16)
    assert after["tgi_prefix_cache_blocks"] > 0


def test_a_burst_behind_one_beginning_computes_it_at_most_twice(tiny_llama: Path) -> None:
    """They come together, beside a running stream and longer than a step, so that none finds anything at its start."""
    (beginning,) = prompts(lengths=(400,), seed=911)
    texts = ["A stream.", *(beginning + tail for tail in TAILS)]
    reference = Reference(tiny_llama)
    expected = [reference.greedy(text, NEW_TOKENS) for text in texts]
    with serving("--model-id", str(tiny_llama), "--max-batch-prefill-tokens", "32") as server:
        assert asyncio.run(wave(server, texts)) == expected
        computed = (after := wait_until_idle(server))["tgi_prefix_cache_queried_tokens"]
        computed -= after["tgi_prefix_cache_hit_tokens"]
        assert computed <= 2 * len(beginning) + sum(16 + len(tail) for tail in TAILS) + len(texts[0])


def test_the_next_turn_of_a_conversation_reuses_the_answer_too(reciting: Launched) -> None:
    question = "Recite, and go on and on: A"
    answer = generate(reciting, question, max_new_tokens=60)["generated_text"]
    assert len(question + answer) == 87
    # The last token of an answer has no keys yet: 86 are five blocks of 16 and six more.
    assert cached_tokens(reciting, question + answer + " And then?") == 80


def test_callers_with_other_keys_share_nothing(tiny: Launched) -> None:
    (text,) = prompts(lengths=(70,), seed=907)
    mine, other = {"authorization": "Bearer mine"}, {"authorization": "Bearer other"}
    assert [cached_tokens(tiny, text, mine) for _ in range(2)] == [0, 64]
    assert [cached_tokens(tiny, text, other) for _ in range(2)] == [0, 64]
    assert cached_tokens(tiny, text) == 0


def test_a_prompt_whose_details_are_wanted_is_computed(tiny: Launched) -> None:
    (text,) = prompts(lengths=(70,), seed=908)
    assert [cached_tokens(tiny, text, decoder_input_details=True) for _ in range(2)] == [0, 0]


@pytest.mark.slow
def test_it_can_be_switched_off(tiny_llama: Path) -> None:
    with serving("--model-id", str(tiny_llama), "--prefix-caching", "0") as server:
        assert [cached_tokens(server, SHARED) for _ in range(2)] == [0, 0]
        assert metrics(server)["tgi_prefix_cache_blocks"] == 0


@pytest.mark.parametrize("budget", [pytest.param("16", marks=pytest.mark.slow), "512"])
def test_a_small_cache_is_used_up_and_stays_exact(tiny_llama: Path, budget: str) -> None:
    """512 tokens of cache for beginnings of 2,000: old ones give way, and requests displace one another as well."""
    beginnings = prompts(lengths=(50,) * 10, seed=9)
    texts = [first + tail for first in beginnings for tail in prompts(lengths=(1, 9, 30, 60), seed=10)]
    reference = Reference(tiny_llama)
    expected = [reference.greedy(text, NEW_TOKENS) for text in texts]
    limits = ("--max-total-tokens", "160", "--max-batch-total-tokens", "512", "--max-batch-prefill-tokens")
    with serving("--model-id", str(tiny_llama), *limits, budget) as server:
        for _ in range(2):
            assert asyncio.run(wave(server, texts)) == expected
        after = wait_until_idle(server)
        assert after["tgi_prefix_cache_hit_tokens"] > 0
        assert after["tgi_prefix_cache_evictions"] > 0
