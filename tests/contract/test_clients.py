"""What TGI's users have in their scripts: Hugging Face's client, pointed at the router."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import scripted
from huggingface_hub import InferenceClient
from huggingface_hub.errors import OverloadedError, ValidationError

Result = TypeVar("Result")


async def with_client(work: Callable[[InferenceClient], Result], **options: Any) -> Result:
    async with scripted.running(over_socket=True, **options) as router:
        client = InferenceClient(str(router.client.base_url).rstrip("/"), timeout=10)
        return await asyncio.to_thread(work, client)


async def test_text() -> None:
    """The client calls `POST /`, which repeats the prompt when nobody says otherwise, as in TGI."""
    assert await with_client(lambda client: client.text_generation("hi")) == "hiHello wörld"
    assert await with_client(lambda client: client.text_generation("hi", return_full_text=False)) == "Hello wörld"


async def test_details() -> None:
    answer = await with_client(
        lambda client: client.text_generation("hi", details=True, decoder_input_details=True, best_of=2, top_k=3)
    )
    assert answer.details is not None
    assert [token.text for token in answer.details.tokens] == ["Hel", "lo", " wörld"]
    assert answer.details.best_of_sequences is not None
    assert answer.details.finish_reason == "length"


async def test_stream() -> None:
    def work(client: InferenceClient) -> list[Any]:
        return list(client.text_generation("hi", stream=True, details=True, return_full_text=False))

    events = await with_client(work)
    assert [event.token.text for event in events] == ["Hel", "lo", " wörld"]
    assert events[-1].generated_text == "Hello wörld"
    assert events[-1].details.generated_tokens == 3


@pytest.mark.parametrize("stream", [False, True])
async def test_errors_are_told_apart(stream: bool) -> None:
    def work(client: InferenceClient) -> None:
        with pytest.raises(ValidationError, match="must be strictly positive"):
            list(client.text_generation("hi", temperature=-1, stream=stream))

    await with_client(work)

    def work_overloaded(client: InferenceClient) -> None:
        with pytest.raises(OverloadedError):
            list(client.text_generation("hi", stream=stream))

    await with_client(work_overloaded, max_concurrent_requests=0)
