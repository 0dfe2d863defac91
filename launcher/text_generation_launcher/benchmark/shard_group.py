"""The ranks of a shard group as one, over the unary calls of the contract."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from pathlib import Path
from typing import TypeVar

import grpc
import grpc.aio
from text_generation_proto.v1 import generate_pb2 as pb
from text_generation_proto.v1.generate_pb2_grpc import TextGenerationStub

from text_generation_launcher.benchmark.errors import BenchmarkError

ANSWER_TIMEOUT_S = 10.0
WARMUP_TIMEOUT_S = 600.0
STEP_TIMEOUT_S = 900.0
"""A batch of long prompts on a slow processor takes minutes."""

_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # Unix sockets need no proxy, whatever the environment says of proxies.
    ("grpc.enable_http_proxy", 0),
)

T = TypeVar("T")


class ShardGroup:
    """Sends every step to every rank; a step is over when all have acknowledged it. One epoch at a time."""

    def __init__(self, channels: list[grpc.aio.Channel], info: pb.InfoResponse) -> None:
        self.info = info
        self._channels = channels
        self._stubs = [_stub(channel) for channel in channels]
        self._epoch = 0
        self._step_id = 0

    @classmethod
    async def connect(cls, socket: Path) -> ShardGroup:
        """Find all ranks from the socket of rank 0. Raises: BenchmarkError."""
        channels = [_channel(f"unix://{socket}")]
        try:
            info: pb.InfoResponse = await _answered(
                _stub(channels[0]).Info(pb.InfoRequest(), timeout=ANSWER_TIMEOUT_S), f"the shard behind {socket}"
            )
            if info.rank != 0:
                raise BenchmarkError(
                    f"{socket} is rank {info.rank} of a group: give the socket of rank 0, `-0` at its end"
                )
            channels += [_channel(url) for url in info.urls[1:]]
        except BaseException:
            await asyncio.gather(*(channel.close() for channel in channels))
            raise
        return cls(channels, info)

    async def health(self) -> list[pb.HealthResponse]:
        """Of every rank."""
        return await self._all([stub.Health(pb.HealthRequest(), timeout=ANSWER_TIMEOUT_S) for stub in self._stubs])

    async def warm_up(self, request: pb.WarmupRequest) -> int:
        """Size the KV cache; the usable blocks of the rank that has fewest. Raises: BenchmarkError with its reason."""
        answers = await self._all([stub.Warmup(request, timeout=WARMUP_TIMEOUT_S) for stub in self._stubs])
        return min(int(answer.num_blocks) for answer in answers)

    async def begin_epoch(self) -> None:
        """Drop every sequence; steps count from 1 again."""
        self._epoch = max([self._epoch, *(health.epoch for health in await self.health())]) + 1
        self._step_id = 0
        request = pb.ClearCacheRequest(epoch=self._epoch)
        await self._all([stub.ClearCache(request, timeout=ANSWER_TIMEOUT_S) for stub in self._stubs])

    async def prefill(self, prefill: pb.Prefill) -> pb.StepResult:
        """Raises: BenchmarkError, when the step or one of its sequences fails."""
        self._step_id += 1
        request = pb.PrefillRequest(epoch=self._epoch, step_id=self._step_id, prefill=prefill)
        return _result(await self._all([stub.Prefill(request, timeout=STEP_TIMEOUT_S) for stub in self._stubs]))

    async def decode(self, decode: pb.Decode, drops: list[int]) -> pb.StepResult:
        """Raises: BenchmarkError, as above."""
        self._step_id += 1
        request = pb.DecodeRequest(epoch=self._epoch, step_id=self._step_id, decode=decode, drops=drops)
        return _result(await self._all([stub.Decode(request, timeout=STEP_TIMEOUT_S) for stub in self._stubs]))

    async def close(self) -> None:
        await asyncio.gather(*(channel.close() for channel in self._channels))

    async def _all(self, calls: list[Awaitable[T]]) -> list[T]:
        return await asyncio.gather(*(_answered(call, "a shard") for call in calls))


def _channel(url: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(url, options=_OPTIONS)


def _stub(channel: grpc.aio.Channel) -> TextGenerationStub:
    return TextGenerationStub(channel)  # type: ignore[no-untyped-call]


async def _answered(call: Awaitable[T], whose: str) -> T:
    """The answer. Raises: BenchmarkError for every status but OK."""
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise BenchmarkError(_what_is_wrong(error, whose)) from None


def _what_is_wrong(error: grpc.aio.AioRpcError, whose: str) -> str:
    match error.code():
        case grpc.StatusCode.UNAVAILABLE:
            return f"{whose} cannot be reached ({error.details()}): it has ended, or is not ours; look at its log"
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return f"{whose} does not answer in time: it hangs, or is busy with something long; look at its log"
        case grpc.StatusCode.UNIMPLEMENTED:
            return f"{whose} speaks another protocol, as TGI's own shards do: measure its server with --url instead"
        case _:
            return f"{whose} refuses: {error.details()}"


def _result(results: list[pb.StepResult]) -> pb.StepResult:
    """Rank 0's, which alone has tokens. Raises: BenchmarkError."""
    for result in results:
        if result.HasField("failure"):
            remedy = ""
            if "epoch" in result.failure.message:
                remedy = "; something else, a router perhaps, uses this shard: stop it, or measure it with --url"
            elif result.failure.out_of_memory:
                remedy = "; choose a smaller --batch-size or --sequence-length"
            raise BenchmarkError(f"a step failed on the shard: {result.failure.message}{remedy}")
        for failure in result.failures:
            raise BenchmarkError(f"a sequence failed on the shard: {failure.message}; look at its log")
    return results[0]
