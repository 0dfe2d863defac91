"""One shard over gRPC: unary calls, and the ordered stream of steps."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TypeAlias

import grpc
import grpc.aio
from text_generation_proto.v1 import generate_pb2 as pb
from text_generation_proto.v1.generate_pb2_grpc import TextGenerationStub

logger = logging.getLogger(__name__)

_CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # A shard that loads its model has no socket yet: look often, it costs one connect().
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 200),
    # Unix sockets need no proxy, whatever the environment says of proxies.
    ("grpc.enable_http_proxy", 0),
]

StepsCall: TypeAlias = grpc.aio.StreamStreamCall[pb.StepRequest, pb.StepResult]


class ShardClient:
    """Talks to one rank. Owns its channel, its step stream and the task that reads from it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._channel = grpc.aio.insecure_channel(url, options=_CHANNEL_OPTIONS)
        self._stub = TextGenerationStub(self._channel)  # type: ignore[no-untyped-call]
        self._steps: StepsCall | None = None
        self._reader: asyncio.Task[None] | None = None

    async def info(self, timeout_s: float) -> pb.InfoResponse:
        """Waits for the shard to listen. Raises: grpc.aio.AioRpcError when it does not in ``timeout_s``."""
        response: pb.InfoResponse = await self._stub.Info(pb.InfoRequest(), timeout=timeout_s, wait_for_ready=True)
        return response

    async def warmup(self, request: pb.WarmupRequest, timeout_s: float) -> pb.WarmupResponse:
        response: pb.WarmupResponse = await self._stub.Warmup(request, timeout=timeout_s)
        return response

    async def compile_grammar(self, request: pb.CompileGrammarRequest, timeout_s: float) -> None:
        """Raises: grpc.aio.AioRpcError."""
        await self._stub.CompileGrammar(request, timeout=timeout_s)

    async def progress_age_s(self, timeout_s: float) -> float | None:
        """Seconds since the last sign of progress of the step that runs, 0 when none runs; None without an answer."""
        try:
            response: pb.HealthResponse = await self._stub.Health(pb.HealthRequest(), timeout=timeout_s)
        except grpc.aio.AioRpcError:
            return None
        return response.last_progress_ns / 1e9

    async def embed(self, request: pb.EmbedRequest, timeout_s: float) -> bytes:
        """Raises: grpc.aio.AioRpcError."""
        response: pb.EmbedResponse = await self._stub.Embed(request, timeout=timeout_s)
        return response.vectors

    async def health(self, timeout_s: float) -> pb.HealthResponse:
        """Waits for the shard to listen. Raises: grpc.aio.AioRpcError."""
        response: pb.HealthResponse = await self._stub.Health(
            pb.HealthRequest(), timeout=timeout_s, wait_for_ready=True
        )
        return response

    async def clear_cache(self, epoch: int, timeout_s: float) -> None:
        """Raises: grpc.aio.AioRpcError."""
        await self._stub.ClearCache(pb.ClearCacheRequest(epoch=epoch), timeout=timeout_s)

    async def open_steps(self, on_result: Callable[[pb.StepResult], None], on_end: Callable[[str], None]) -> None:
        """Open the step stream; a stream that was open before is cancelled without a call to its ``on_end``."""
        await self.close_steps()
        # No waiting here: a shard that is gone must be noticed, and `clear_cache` has just shown that it is there.
        self._steps = self._stub.Steps()
        self._reader = asyncio.create_task(self._read(self._steps, on_result, on_end), name=f"steps {self.url}")

    async def _read(
        self, steps: StepsCall, on_result: Callable[[pb.StepResult], None], on_end: Callable[[str], None]
    ) -> None:
        try:
            # EOF is an object of its own, of no type.
            while isinstance(result := await steps.read(), pb.StepResult):
                on_result(result)
            on_end("the shard closed its step stream")
        except grpc.aio.AioRpcError as error:
            on_end(error.details() or str(error.code()))
        except Exception as error:  # else nobody would read any more, and nobody would know
            logger.exception("A result of %s cannot be read", self.url)
            on_end(f"{type(error).__name__}: {error}")

    async def send(self, step: pb.StepRequest) -> None:
        """Send the next step. Raises: grpc.aio.AioRpcError, asyncio.InvalidStateError when the stream has ended."""
        if self._steps is None:
            raise asyncio.InvalidStateError("the step stream is not open")
        await self._steps.write(step)

    async def close_steps(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
            self._reader = None
        if self._steps is not None:
            self._steps.cancel()
            self._steps = None

    async def close(self) -> None:
        await self.close_steps()
        await self._channel.close()
