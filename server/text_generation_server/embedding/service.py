"""The contract of a shard that embeds: what it is, whether it lives, and vectors of texts."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from typing import Any

import grpc
import numpy as np
from text_generation_proto.v1 import generate_pb2 as pb
from text_generation_proto.v1 import generate_pb2_grpc as pb_grpc

from text_generation_server.embedding.encoder import Encoder
from text_generation_server.errors import first_line, is_out_of_memory

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

# What clients are told: the texts of the errors themselves name paths, addresses and sizes.
OUT_OF_MEMORY = "out of memory over a batch of texts; lower `--max-batch-prefill-tokens`"
BATCH_FAILED = "the model failed over a batch of texts; the shard's log says why"


class EncoderEngine:
    """Runs an encoder on the thread that loaded it, batch after batch. All methods from any thread."""

    def __init__(self, encoder: Encoder, compute: Executor) -> None:
        self._encoder = encoder
        self._compute = compute
        self._ended: Future[None] = Future()
        self._lock = threading.Lock()
        self._num_batches = 0
        """That run or wait."""
        self._progress_ns = 0

    def start(self) -> Future[None]:
        """The future ends with `stop`."""
        return self._ended

    def embed(self, texts: Sequence[Sequence[int]]) -> Future[bytes]:
        """Float32 [texts, dimensions] in the order of its bytes."""
        with self._lock:
            if self._num_batches == 0:
                self._progress_ns = time.monotonic_ns()
            self._num_batches += 1
        future = self._compute.submit(self._embed, texts)
        future.add_done_callback(self._left)
        return future

    def progress_age_ns(self) -> int:
        """Since the last sign of progress; 0 when there is nothing to do."""
        with self._lock:
            return time.monotonic_ns() - self._progress_ns if self._num_batches else 0

    def stop(self, timeout_s: float) -> bool:
        """End once the batch that runs has ended; whether that was in time."""
        self._compute.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            idle = self._num_batches == 0
        if not self._ended.done():
            self._ended.set_result(None)
        return idle or self._wait_until_idle(timeout_s)

    def _wait_until_idle(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while self._num_batches:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def _embed(self, texts: Sequence[Sequence[int]]) -> bytes:
        return self._encoder.embed(texts, self._note_progress).numpy().astype("<f4", copy=False).tobytes()

    def _note_progress(self) -> None:
        self._progress_ns = time.monotonic_ns()

    def _left(self, future: Future[bytes]) -> None:
        with self._lock:
            self._num_batches -= 1
            self._progress_ns = time.monotonic_ns()


class EncoderService(pb_grpc.TextGenerationServicer):
    """What is missing here is answered with UNIMPLEMENTED."""

    def __init__(self, engine: EncoderEngine, info: pb.InfoResponse) -> None:
        self._engine = engine
        self._info = info
        self._started_ns = time.time_ns()

    async def Info(self, request: pb.InfoRequest, context: Context) -> pb.InfoResponse:
        return self._info

    async def Health(self, request: pb.HealthRequest, context: Context) -> pb.HealthResponse:
        return pb.HealthResponse(
            incarnation=self._info.incarnation,
            last_progress_ns=self._engine.progress_age_ns(),
            started_ns=self._started_ns,
        )

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:
        problem = self._problem(request)
        if problem:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, problem)
        ids, place = request.token_ids, 0
        texts: list[list[int]] = []
        for length in request.lengths:
            texts.append(ids[place : place + length])
            place += length
        try:
            vectors = await asyncio.wrap_future(self._engine.embed(texts))
        except Exception as error:
            logger.error("a batch of %d texts failed: %s", len(texts), first_line(error))
            logger.debug("traceback", exc_info=error)
            if is_out_of_memory(error):
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, OUT_OF_MEMORY)
            await context.abort(grpc.StatusCode.INTERNAL, BATCH_FAILED)
        return pb.EmbedResponse(vectors=vectors)

    def _problem(self, request: pb.EmbedRequest) -> str:
        longest = self._info.embedding.max_input_tokens
        if not request.lengths:
            return "there are no texts"
        lengths = np.array(request.lengths, np.int64)
        if lengths.min() < 1 or lengths.max() > longest or lengths.sum() != len(request.token_ids):
            return f"lengths must be 1 to {longest} and add up to the number of tokens"
        if max(request.token_ids) >= self._info.vocab_size:
            return f"token ids must be less than {self._info.vocab_size}"
        return ""
