"""The gRPC service of one shard: hands steps to the engine and its results back; no logic of its own."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

import grpc
import grpc.aio
from text_generation_proto import grammars
from text_generation_proto.grammars import GrammarError
from text_generation_proto.v1 import generate_pb2 as pb
from text_generation_proto.v1 import generate_pb2_grpc as pb_grpc

from text_generation_server.engine.engine import Engine
from text_generation_server.engine.memory import DoesNotFit
from text_generation_server.engine.steps import Step, StepResult
from text_generation_server.errors import InvalidStep, ShardError
from text_generation_server.generation.guidance import Guidance
from text_generation_server.rpc import convert

logger = logging.getLogger(__name__)

T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]

MAX_OUTSTANDING_STEPS = 2
"""Steps of one stream that are executed or queued; a peer that sends more waits in its flow control."""


class TextGenerationService(pb_grpc.TextGenerationServicer):
    """Serves one engine. All methods run on the event loop, which no step ever blocks."""

    def __init__(self, engine: Engine, info: pb.InfoResponse, guidance: Guidance | None = None) -> None:
        """``guidance``: the engine's, if it has one."""
        self._engine = engine
        self._guidance = guidance
        self._info = info
        self._started_ns = time.time_ns()

    async def Info(self, request: pb.InfoRequest, context: Context) -> pb.InfoResponse:
        return self._info

    async def Health(self, request: pb.HealthRequest, context: Context) -> pb.HealthResponse:
        health = self._engine.health()
        return pb.HealthResponse(
            incarnation=self._info.incarnation,
            epoch=health.epoch,
            last_step_id=health.last_step_id,
            last_progress_ns=health.progress_age_ns,
            num_sequences=health.num_sequences,
            started_ns=self._started_ns,
            num_blocks=health.num_blocks,
        )

    async def Warmup(self, request: pb.WarmupRequest, context: Context) -> pb.WarmupResponse:
        limits = convert.warmup_limits_from_proto(request)
        plan = await _answer(self._engine.warm_up(limits), context)
        return pb.WarmupResponse(num_blocks=plan.num_blocks, derivation=plan.derivation)

    async def CompileGrammar(self, request: pb.CompileGrammarRequest, context: Context) -> pb.CompileGrammarResponse:
        if self._guidance is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this shard knows no grammars")
        try:
            await asyncio.wrap_future(self._guidance.compile_ahead(grammars.from_proto(request.grammar)))
        except GrammarError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        return pb.CompileGrammarResponse()

    async def ClearCache(self, request: pb.ClearCacheRequest, context: Context) -> pb.ClearCacheResponse:
        await _answer(self._engine.clear(request.epoch), context)
        return pb.ClearCacheResponse()

    async def Steps(self, requests: AsyncIterator[pb.StepRequest], context: Context) -> AsyncIterator[pb.StepResult]:
        """Results in the order of the requests. A peer that leaves does not stop what is queued; ClearCache does."""
        outstanding: asyncio.Queue[asyncio.Future[StepResult] | None] = asyncio.Queue()
        places = asyncio.Semaphore(MAX_OUTSTANDING_STEPS)

        async def read() -> None:
            try:
                async for request in requests:
                    await places.acquire()
                    outstanding.put_nowait(self._submit(partial(convert.step_from_proto, request), request))
            except Exception as error:
                # A request that cannot be read, or a peer that is gone: what came before it is still answered.
                logger.warning("the step stream broke: %s", error)
            outstanding.put_nowait(None)

        reader = asyncio.create_task(read(), name="read steps")
        try:
            while (future := await outstanding.get()) is not None:
                result = await future
                places.release()
                yield convert.result_to_proto(result)
        finally:
            reader.cancel()

    async def Prefill(self, request: pb.PrefillRequest, context: Context) -> pb.StepResult:
        return convert.result_to_proto(await self._submit(partial(convert.step_from_prefill, request), request))

    async def Decode(self, request: pb.DecodeRequest, context: Context) -> pb.StepResult:
        return convert.result_to_proto(await self._submit(partial(convert.step_from_decode, request), request))

    def _submit(
        self, parse: Callable[[], Step], request: pb.StepRequest | pb.PrefillRequest | pb.DecodeRequest
    ) -> asyncio.Future[StepResult]:
        """Queue a step now; the future never raises."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[StepResult] = loop.create_future()

        def resolve(result: StepResult) -> None:
            if not future.done():
                future.set_result(result)

        def deliver(result: StepResult) -> None:
            # On the engine thread. The loop may be gone when the process is ending; nobody waits then.
            if not loop.is_closed():
                loop.call_soon_threadsafe(resolve, result)

        try:
            step = parse()
        except InvalidStep as error:
            # It takes its place in the queue like any other step: it ends its epoch, and results stay in order.
            self._engine.refuse(request.epoch, request.step_id, error, deliver)
        else:
            self._engine.submit(step, deliver)
        return future


async def _answer(future: Future[T], context: Context) -> T:
    """The engine's answer, or the status for its error. A peer that leaves takes back what has not begun yet."""
    try:
        return await asyncio.wrap_future(future)
    except (ShardError, DoesNotFit) as error:
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
