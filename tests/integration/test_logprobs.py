"""Logprobs and likely tokens equal those of `transformers` and `torch.topk`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from integration.asking import generate, stream, token_ids
from integration.launched import Launched
from integration.reference import Reference, prompts

EXACT = 1e-4
"""The promise for float32."""


@pytest.fixture(scope="module")
def reference(tiny_llama: Path) -> Reference:
    return Reference(tiny_llama)


@pytest.mark.parametrize("prompt", prompts(lengths=(1, 2, 40, 300), seed=5), ids=len)
def test_logprobs_of_the_prompt(tiny: Launched, reference: Reference, prompt: str) -> None:
    prefill = generate(tiny, prompt, max_new_tokens=3, decoder_input_details=True)["details"]["prefill"]
    ids = reference.ids(prompt)
    assert [token["id"] for token in prefill] == ids
    assert "".join(token["text"] for token in prefill) == prompt
    assert prefill[0]["logprob"] is None, "nothing stands before it that could make it likely"
    expected = reference.logprobs(prompt)[range(len(ids) - 1), ids[1:]].tolist()
    assert [token["logprob"] for token in prefill[1:]] == pytest.approx(expected, abs=EXACT)


@pytest.mark.parametrize("prompt", prompts(lengths=(1, 300), seed=9), ids=len)
def test_likely_tokens_of_an_echo(tiny: Launched, reference: Reference, prompt: str) -> None:
    """What `lm-eval` looks at: whether each token of a prompt is the likeliest in its place."""
    body = {"prompt": prompt, "echo": True, "logprobs": 2, "max_tokens": 1, "temperature": 0}
    (choice,) = tiny.client.post("/v1/completions", json=body).json()["choices"]
    first, *found = choice["logprobs"]["top_logprobs"]
    assert first is None
    expected = reference.logprobs(prompt).topk(2)
    assert len(found) == len(reference.ids(prompt))  # the answer's token is the last
    for tops, ids, values in zip(found, expected.indices.tolist(), expected.values.tolist(), strict=True):
        spelled = {reference.spelled(token_id): value for token_id, value in zip(ids, values, strict=True)}
        assert tops == pytest.approx(spelled, abs=EXACT)


def test_logprobs_of_the_answer(tiny: Launched, reference: Reference) -> None:
    [prompt] = prompts(lengths=(30,), seed=6)
    answer = generate(tiny, prompt, max_new_tokens=20)
    ids = token_ids(answer)
    behind = reference.logprobs(prompt, ids)[29:-1]
    expected = behind[range(len(ids)), ids].tolist()
    assert [token["logprob"] for token in answer["details"]["tokens"]] == pytest.approx(expected, abs=EXACT)


@pytest.mark.parametrize("streaming", [False, True])
def test_top_tokens_are_the_likeliest_in_order(tiny: Launched, reference: Reference, streaming: bool) -> None:
    [prompt] = prompts(lengths=(30,), seed=7)
    if streaming:
        events = stream(tiny, prompt, max_new_tokens=10, top_n_tokens=5)
        ids = [event["token"]["id"] for event in events]
        top_tokens = [event["top_tokens"] for event in events]
    else:
        answer = generate(tiny, prompt, max_new_tokens=10, top_n_tokens=5)
        ids, top_tokens = token_ids(answer), answer["details"]["top_tokens"]
    expected = reference.logprobs(prompt, ids)[29:-1].topk(5)
    assert [[token["id"] for token in tokens] for tokens in top_tokens] == expected.indices.tolist()
    for tokens, values in zip(top_tokens, expected.values.tolist(), strict=True):
        assert [token["logprob"] for token in tokens] == pytest.approx(values, abs=EXACT)
    assert [tokens[0]["id"] for tokens in top_tokens] == ids, "greedy takes the likeliest"


def test_what_is_sampled_has_the_logprob_of_the_filtered_distribution(tiny: Launched, reference: Reference) -> None:
    """TGI's logprobs are those of the logits that were sampled from: temperature and top-k included."""
    [prompt] = prompts(lengths=(30,), seed=8)
    [token] = generate(tiny, prompt, max_new_tokens=1, temperature=2.0, top_k=3, seed=1)["details"]["tokens"]
    kept = (reference.logprobs(prompt)[-1] / 2.0).topk(3)
    place = kept.indices.tolist().index(token["id"])
    assert token["logprob"] == pytest.approx(kept.values.log_softmax(-1)[place].item(), abs=EXACT)


@pytest.mark.parametrize("parameters", [{}, {"decoder_input_details": True}], ids=str)
def test_details_come_only_where_they_are_asked_for(reciting: Launched, parameters: dict[str, Any]) -> None:
    """A server that was started without `--enable-prefill-logprobs` has none of the prompt."""
    request = {"inputs": "a", "parameters": {"max_new_tokens": 2, **parameters}}
    answer = reciting.client.post("/generate", json=request).json()
    assert ("details" in answer) == bool(parameters)
    if parameters:
        assert answer["details"]["prefill"] == []
        assert "top_tokens" not in answer["details"]
