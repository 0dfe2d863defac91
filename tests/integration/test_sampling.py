"""What is sampled depends on the request and its seed alone, not on who else is being served."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from integration.asking import answer_of, body, generate, token_ids, wait_until_idle
from integration.launched import Launched
from integration.reference import prompts

PARAMETERS: dict[str, dict[str, Any]] = {
    "plain": {"do_sample": True},
    "hot": {"temperature": 1.7},
    "cold": {"temperature": 0.3},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.6},
    "typical_p": {"typical_p": 0.4},
    "penalties": {"do_sample": True, "repetition_penalty": 1.3, "frequency_penalty": 0.8},
    "everything": {
        "temperature": 1.3,
        "top_k": 50,
        "top_p": 0.9,
        "typical_p": 0.8,
        "repetition_penalty": 1.2,
        "frequency_penalty": -0.5,
    },
}
SEEDED: list[tuple[str, dict[str, Any]]] = [
    (prompt, {**parameters, "seed": seed, "max_new_tokens": 20})
    for seed, prompt in enumerate(prompts(lengths=(3, 20, 61, 130), seed=2))
    for parameters in PARAMETERS.values()
]
"""32 requests that have nothing in common."""


async def at_once(server: Launched, requests: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    bodies = [body(prompt, **parameters) for prompt, parameters in requests]
    return await asyncio.gather(*(answer_of(server, "/generate", each) for each in bodies))


def test_a_seed_gives_the_same_tokens_alone_and_among_31_others(tiny: Launched) -> None:
    alone = [generate(tiny, prompt, **parameters) for prompt, parameters in SEEDED]
    together = asyncio.run(at_once(tiny, SEEDED))
    assert [token_ids(answer) for answer in together] == [token_ids(answer) for answer in alone]
    for one, other in zip(together, alone, strict=True):
        logprobs = [token["logprob"] for token in other["details"]["tokens"]]
        assert [token["logprob"] for token in one["details"]["tokens"]] == pytest.approx(logprobs, abs=1e-4)
    assert len({tuple(token_ids(answer)) for answer in alone}) > 28, "the requests differ, so should their answers"
    wait_until_idle(tiny)


@pytest.mark.parametrize("parameters", PARAMETERS.values(), ids=PARAMETERS.keys())
def test_seeds_make_the_difference(tiny: Launched, parameters: dict[str, Any]) -> None:
    """And what a request without one is told as its seed repeats its answer."""
    prompt = "Once upon a time"
    parameters = {**parameters, "max_new_tokens": 16}
    answers = {tuple(token_ids(generate(tiny, prompt, seed=seed, **parameters))) for seed in range(4)}
    assert len(answers) > 1
    unseeded = generate(tiny, prompt, **parameters)
    seed = unseeded["details"]["seed"]
    assert 0 <= seed < 2**64
    repeated = generate(tiny, prompt, **parameters, seed=seed)
    assert token_ids(repeated) == token_ids(unseeded)


def test_greedy_answers_name_no_seed(tiny: Launched) -> None:
    assert generate(tiny, "hi", max_new_tokens=2, seed=5)["details"]["seed"] is None


def test_the_largest_seed_is_taken_and_told(tiny: Launched) -> None:
    answer = generate(tiny, "hi", max_new_tokens=2, do_sample=True, seed=2**64 - 1)
    assert answer["details"]["seed"] == 2**64 - 1


def test_best_of_gives_two_choices_and_the_likelier_one_first(tiny: Launched) -> None:
    details = generate(tiny, "Once", max_new_tokens=8, do_sample=True, best_of=2)["details"]
    [other] = details["best_of_sequences"]
    assert token_ids({"details": other}) != token_ids({"details": details})

    def mean(tokens: list[dict[str, Any]]) -> float:
        return float(sum(token["logprob"] for token in tokens) / len(tokens))

    assert mean(details["tokens"]) >= mean(other["tokens"])
