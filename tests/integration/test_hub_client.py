"""`huggingface_hub.InferenceClient.text_generation`, unmodified, in both its forms."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import OverloadedError, ValidationError
from integration.asking import WITHIN_S
from integration.crowd import full
from integration.launched import Launched
from integration.reciting import ALPHABET, POSITIONS

Ask = Callable[..., Any]
"""``ask(server, prompt, **options)`` -> what `text_generation` returns; of a stream the list of its items."""


def ask_sync(server: Launched, prompt: str, **options: Any) -> Any:
    with InferenceClient(server.url, timeout=WITHIN_S) as client:
        answer: Any = client.text_generation(prompt, **options)
        return list(answer) if options.get("stream") else answer


def ask_async(server: Launched, prompt: str, **options: Any) -> Any:
    async def work() -> Any:
        async with AsyncInferenceClient(server.url, timeout=WITHIN_S) as client:
            answer: Any = await client.text_generation(prompt, **options)
            return [item async for item in answer] if options.get("stream") else answer

    return asyncio.run(work())


@pytest.fixture(params=[ask_sync, ask_async], ids=["InferenceClient", "AsyncInferenceClient"])
def ask(request: pytest.FixtureRequest) -> Ask:
    function: Ask = request.param
    return function


def test_text(reciting: Launched, ask: Ask) -> None:
    assert ask(reciting, "a", return_full_text=False) == ALPHABET
    assert ask(reciting, "xa", max_new_tokens=3, return_full_text=True) == "xabcd"
    assert ask(reciting, "a", stop=["ghi"], return_full_text=False) == "bcdefghi"


def test_stream(reciting: Launched, ask: Ask) -> None:
    pieces = ask(reciting, "!", max_new_tokens=20, stream=True)
    assert "".join(pieces) == "🦊é→!" * 2


def test_details(tiny: Launched, ask: Ask) -> None:
    answer = ask(tiny, "hello", max_new_tokens=5, details=True, decoder_input_details=True, top_n_tokens=2)
    assert answer.details.finish_reason == "length"
    assert [token.text for token in answer.details.prefill] == list("hello")
    assert len(answer.details.tokens) == len(answer.details.top_tokens) == 5
    [*_, last] = ask(tiny, "hello", max_new_tokens=5, details=True, stream=True, return_full_text=False)
    assert last.details.generated_tokens == 5
    assert last.details.input_length == 5
    assert [last.generated_text] == [ask(tiny, "hello", max_new_tokens=5, return_full_text=False)]


def test_sampling(tiny: Launched, ask: Ask) -> None:
    options = {"do_sample": True, "temperature": 0.9, "top_k": 30, "top_p": 0.95, "typical_p": 0.95, "details": True}
    penalties = {"repetition_penalty": 1.2, "frequency_penalty": 0.1}
    one, other = (ask(tiny, "hello", max_new_tokens=8, seed=7, **options, **penalties) for _ in range(2))
    assert one == other
    assert one.details.seed == 7
    best = ask(tiny, "hello", max_new_tokens=8, best_of=2, **options)
    assert len(best.details.best_of_sequences) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_the_clients_own(reciting: Launched, ask: Ask, stream: bool) -> None:
    with pytest.raises(ValidationError, match=rf"`inputs` tokens \+ `max_new_tokens` must be <= {POSITIONS}"):
        ask(reciting, "a", max_new_tokens=5000, stream=stream)
    with full(reciting), pytest.raises(OverloadedError, match="Model is overloaded"):
        ask(reciting, "a", stream=stream)


def test_chats(embedded: Launched) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    with InferenceClient(embedded.url, timeout=WITHIN_S) as client:
        answer = client.chat_completion(question, max_tokens=30, temperature=0)
        text = answer.choices[0].message.content
        assert text is not None
        assert "Paris" in text
        stream = client.chat_completion(question, max_tokens=30, temperature=0, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text
