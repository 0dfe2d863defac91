"""All shards as one: every rank gets the same steps, a step is done when every rank has acknowledged it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import grpc
import grpc.aio
from text_generation_proto.v1 import generate_pb2 as pb

from text_generation_router.config import ConfigError, WarmupLimits
from text_generation_router.shards.client import ShardClient
from text_generation_router.shards.convert import (
    KVCacheSize,
    ShardInfo,
    StepResult,
    kv_cache_size,
    shard_info,
    step_result,
    warmup_request,
)

logger = logging.getLogger(__name__)

_UNARY_TIMEOUT_S = 60.0
_RESET_TIMEOUT_S = 5.0
"""A shard takes a reset behind the step it is in; when that takes longer, the reset is tried again."""
STEP_LIMIT_S = 120.0
"""A step that takes longer counts as hung: the shards are not ready."""


class ShardUnreachable(Exception):
    """A shard does not answer; the text is gRPC's."""


class ShardGroup:
    """The rank group of one launch.

    Results come by ``on_result`` in step order, once all ranks have acknowledged the step. ``on_failure`` says that
    a rank refused a step, or cannot be reached any more, after which nothing comes until ``reset``.
    """

    def __init__(self, clients: list[ShardClient], info: ShardInfo) -> None:
        self.info = info
        self.epoch = 0
        self.on_result: Callable[[StepResult], None] = lambda result: None
        self.on_failure: Callable[[str], None] = lambda message: None
        self._clients = clients
        self._step_id = 0
        self._sent_at: dict[int, float] = {}
        self._acknowledged: dict[int, int] = {}
        self._results: dict[int, pb.StepResult] = {}
        self._failed = True

    @property
    def num_in_flight(self) -> int:
        return len(self._sent_at)

    def ready(self) -> bool:
        """Whether the shards take steps and finish them in time. Answers at once, from what is known."""
        if self._failed:
            return False
        oldest = next(iter(self._sent_at.values()), None)
        return oldest is None or time.monotonic() - oldest < STEP_LIMIT_S

    async def warmup(self, limits: WarmupLimits) -> KVCacheSize:
        """Size the KV cache on all ranks; the smallest answer counts. Raises: ConfigError with the shard's reason."""
        request = warmup_request(limits)
        try:
            responses = await asyncio.gather(*(client.warmup(request, _UNARY_TIMEOUT_S) for client in self._clients))
        except grpc.aio.AioRpcError as error:
            raise ConfigError(f"Unable to warmup the Python model shards: {error.details()}") from error
        return min((kv_cache_size(response) for response in responses), key=lambda size: size.num_blocks)

    async def reset(self) -> None:
        """Begin a new epoch: shards drop all sequences, open streams are replaced.

        Raises: ShardUnreachable.
        """
        self._failed = True
        self.epoch += 1
        self._step_id = 0
        self._sent_at.clear()
        self._acknowledged.clear()
        self._results.clear()
        await asyncio.gather(*(client.close_steps() for client in self._clients))
        try:
            await asyncio.gather(*(client.clear_cache(self.epoch, _RESET_TIMEOUT_S) for client in self._clients))
        except grpc.aio.AioRpcError as error:
            raise ShardUnreachable(error.details() or str(error.code())) from error
        for client in self._clients:
            await client.open_steps(self._take, self._fail)
        self._failed = False

    async def send(self, step: pb.StepRequest) -> int:
        """Number a step, send it to every rank and return the number. A rank that is gone is an ``on_failure``."""
        self._step_id += 1
        step.epoch, step.step_id = self.epoch, self._step_id
        self._sent_at[step.step_id] = time.monotonic()
        try:
            for client in self._clients:
                await client.send(step)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            self._fail(str(error))
        return step.step_id

    async def close(self) -> None:
        self._failed = True
        await asyncio.gather(*(client.close() for client in self._clients))

    def _take(self, result: pb.StepResult) -> None:
        if self._failed or result.epoch != self.epoch:
            return
        if result.HasField("failure"):
            self._fail(result.failure.message)
            return
        step_id = result.step_id
        count = self._acknowledged.get(step_id, 0) + 1
        # Rank 0 alone reports tokens; of the others only the acknowledgement counts.
        kept = self._results.get(step_id)
        if kept is None or result.generations or result.failures:
            self._results[step_id] = kept = result
        if count < len(self._clients):
            self._acknowledged[step_id] = count
            return
        self._acknowledged.pop(step_id, None)
        self._sent_at.pop(step_id, None)
        self.on_result(step_result(self._results.pop(step_id)))

    def _fail(self, message: str) -> None:
        if not self._failed:
            self._failed = True
            logger.error("A shard failed: %s", message)
            self.on_failure(message)


async def connect(master_uds_path: str, launcher_nonce: str, timeout_s: float) -> ShardGroup:
    """Connect to rank 0, learn of the other ranks from it, and check that all belong to this launch.

    Raises: ConfigError when a shard does not answer in ``timeout_s`` or belongs to another launcher.
    """
    master = ShardClient(f"unix://{master_uds_path}")
    clients = [master]
    try:
        message = await _info(master, timeout_s)
        clients += [ShardClient(url) for url in message.urls[1:]]
        messages = [message, *await asyncio.gather(*(_info(client, timeout_s) for client in clients[1:]))]
        for rank, answer in enumerate(messages):
            if launcher_nonce and answer.launcher_nonce != launcher_nonce:
                raise ConfigError(
                    f"the shard behind {clients[rank].url} belongs to another launcher: start with a "
                    "`--shard-uds-path` of its own, or without the flag"
                )
            if answer.rank != rank or answer.world_size != message.world_size or answer.world_size != len(messages):
                raise ConfigError(
                    f"the shard behind {clients[rank].url} is rank {answer.rank} of {answer.world_size}, "
                    f"expected rank {rank} of {len(messages)}"
                )
    except BaseException:
        await asyncio.gather(*(client.close() for client in clients))
        raise
    return ShardGroup(clients, shard_info(message))


async def _info(client: ShardClient, timeout_s: float) -> pb.InfoResponse:
    try:
        return await client.info(timeout_s)
    except grpc.aio.AioRpcError as error:
        raise ConfigError(f"Unable to connect to the Python model shards: {client.url}: {error.details()}") from error
