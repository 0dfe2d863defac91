"""The door to vectors: permit -> check -> tokenise -> compute; of an encoder, or of a model that generates."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from text_generation_router.admission import Admission, Permit, in_time
from text_generation_router.embedding.batches import EncoderBatcher
from text_generation_router.embedding.requests import TextsRequest, Vectors, finish, tokenise
from text_generation_router.errors import RouterError, first_of
from text_generation_router.generate_request import (
    NOBODY,
    Caller,
    GenerateParameters,
    GenerateRequest,
    MoreParameters,
)
from text_generation_router.inference import Inference
from text_generation_router.metrics import Metrics
from text_generation_router.shards.convert import EmbeddingInfo
from text_generation_router.tokenizer import RouterTokenizer

TEXTS_AT_ONCE = 64
"""Of one request, in the queue of a model that generates: others stand there too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    vectors: Vectors
    validation_s: float
    inference_s: float
    """From the queue's door to the last vector."""


class Embedder(Protocol):
    async def embed(self, request: TextsRequest, caller: Caller = NOBODY) -> Embedded:
        """One permit, whatever the number of texts.

        Raises: ShuttingDown, Overloaded (before anything is checked), ValidationError, GenerationFailed.
        """


class EncoderEmbedder:
    """Of a model that does nothing else."""

    def __init__(
        self,
        batcher: EncoderBatcher,
        tokenizer: RouterTokenizer,
        info: EmbeddingInfo,
        metrics: Metrics,
        admission: Admission,
        *,
        vocab_size: int,
    ) -> None:
        self._admission = admission
        self._batcher = batcher
        self._tokenizer = tokenizer
        self._info = info
        self._metrics = metrics
        self._vocab_size = vocab_size

    def drain(self) -> None:
        """Take nothing new. What runs may finish."""
        self._admission.drain()

    def give_up(self) -> None:
        """No shard will be started again: what waits for one fails."""
        self._batcher.give_up()

    def ready(self) -> bool:
        """Whether a request sent now would be served."""
        return not self._admission.draining and self._batcher.ready()

    async def embed(self, request: TextsRequest, caller: Caller = NOBODY) -> Embedded:
        (permit,) = self._admission.reserve(1, caller)
        try:
            async with in_time(caller):
                return await self._embed(request)
        finally:
            permit.release()

    async def _embed(self, request: TextsRequest) -> Embedded:
        started_at = time.perf_counter()
        texts = await tokenise(
            request,
            self._tokenizer,
            self._info,
            max_tokens=self._info.max_input_tokens,
            vocab_size=self._vocab_size,
        )
        tokenised_at = time.perf_counter()
        for text in texts:
            self._metrics.request_input_length.observe(len(text))
        vectors = await finish(await self._batcher.embed(texts), request, self._info)
        return _embedded(vectors, texts, started_at, tokenised_at)


class SequenceEmbedder:
    """Of a model that generates: the mean of a prompt's last hidden states, computed among all that it generates."""

    def __init__(self, inference: Inference, tokenizer: RouterTokenizer, info: EmbeddingInfo) -> None:
        self._inference = inference
        self._tokenizer = tokenizer
        self._info = info

    async def embed(self, request: TextsRequest, caller: Caller = NOBODY) -> Embedded:
        (permit,) = self._inference.admission.reserve(1, caller)
        try:
            started_at = time.perf_counter()
            limits = self._inference.limits
            texts = await tokenise(
                request,
                self._tokenizer,
                self._info,
                max_tokens=limits.max_input_tokens,
                vocab_size=limits.vocab_size,
            )
            tokenised_at = time.perf_counter()
            tasks: list[asyncio.Task[bytes]] = []
            try:
                async with asyncio.TaskGroup() as group:
                    places = asyncio.Semaphore(TEXTS_AT_ONCE)
                    tasks += [group.create_task(self._one(ids, caller, places)) for ids in texts]
            except* RouterError as errors:
                raise first_of(errors) from None
            vectors = await finish([task.result() for task in tasks], request, self._info)
            return _embedded(vectors, texts, started_at, tokenised_at)
        finally:
            permit.release()

    async def _one(self, ids: list[int], caller: Caller, places: asyncio.Semaphore) -> bytes:
        request = GenerateRequest(
            "", GenerateParameters(max_new_tokens=1), more=MoreParameters(embeds=True), input_ids=tuple(ids)
        )
        # The request's permit stands for all of its texts.
        async with places, await self._inference.start(request, caller, Permit(None, is_part=True)) as generation:
            while await generation.next_events():
                pass
            return generation.embedding


def _embedded(vectors: list[bytes], texts: Sequence[Sequence[int]], started_at: float, tokenised_at: float) -> Embedded:
    return Embedded(
        vectors=Vectors(vectors, sum(map(len, texts))),
        validation_s=tokenised_at - started_at,
        inference_s=time.perf_counter() - tokenised_at,
    )
