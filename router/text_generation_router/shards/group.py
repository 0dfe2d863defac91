"""All shards as one: every rank gets the same steps, a step is done when every rank has acknowledged it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import grpc
import grpc.aio
from text_generation_proto.grammars import Grammar, GrammarError, to_proto
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
_HEALTH_TIMEOUT_S = 5.0
_WATCH_EVERY_S = 1.0
STALL_LIMIT_S = 60.0
STALL_LIMIT_PER_TOKEN_S = 0.01
"""A shard reports progress after every layer. One that reports none for so long, in a step of so many tokens, hangs:
a layer takes far less, and a first step that compiles kernels takes less as well."""

LOST = "a shard was lost"
HANGS = "a shard hangs"


class ShardUnreachable(Exception):
    """A shard does not answer; the text is gRPC's, for the log."""


class EmbeddingFailed(Exception):
    """A shard could not compute the vectors of a batch; the text is fit for clients."""


@dataclass(frozen=True, slots=True)
class _SentStep:
    sent_at: float
    num_tokens: int


class ShardGroup:
    """The rank group of one launch.

    Results come by ``on_result`` in step order, once all ranks have acknowledged the step. ``on_failure`` says that
    a rank refused a step, hangs, or cannot be reached any more, after which nothing comes until ``reset``; its text is
    fit for clients.
    """

    def __init__(self, clients: list[ShardClient], info: ShardInfo) -> None:
        self.info = info
        self.epoch = 0
        self.on_result: Callable[[StepResult], None] = lambda result: None
        self.on_failure: Callable[[str], None] = lambda message: None
        self._clients = clients
        self._step_id = 0
        self._sent: dict[int, _SentStep] = {}
        self._acknowledged_at = 0.0
        self._in_flight = asyncio.Event()
        self._acknowledged: dict[int, int] = {}
        self._results: dict[int, pb.StepResult] = {}
        self._failed = True

    @property
    def num_in_flight(self) -> int:
        return len(self._sent)

    def ready(self) -> bool:
        """Whether the shards take steps and make progress. Answers at once, from what is known."""
        return not self._failed

    async def watch(self) -> None:
        """Find shards that hang, which end no step and break no connection. Runs until cancelled."""
        while True:
            await self._in_flight.wait()
            await asyncio.sleep(_WATCH_EVERY_S)
            oldest = next(iter(self._sent.values()), None)
            if oldest is None:
                self._in_flight.clear()
                continue
            limit_s = STALL_LIMIT_S + STALL_LIMIT_PER_TOKEN_S * oldest.num_tokens
            # A step runs when the one before it has ended.
            if time.monotonic() - max(oldest.sent_at, self._acknowledged_at) < limit_s:
                continue
            epoch = self.epoch
            ages_s = await asyncio.gather(*(client.progress_age_s(_HEALTH_TIMEOUT_S) for client in self._clients))
            hangs = any(age is None or age > limit_s for age in ages_s) or not any(ages_s)
            if hangs and epoch == self.epoch and oldest in self._sent.values():
                self._fail(HANGS, f"no progress for {limit_s:.0f} s in a step of {oldest.num_tokens} tokens: {ages_s}")

    async def warmup(self, limits: WarmupLimits) -> KVCacheSize:
        """Size the KV cache on all ranks; the smallest answer counts. Raises: ConfigError with the shard's reason."""
        request = warmup_request(limits)
        try:
            responses = await asyncio.gather(*(client.warmup(request, _UNARY_TIMEOUT_S) for client in self._clients))
        except grpc.aio.AioRpcError as error:
            raise ConfigError(f"Unable to warmup the Python model shards: {error.details()}") from error
        return min((kv_cache_size(response) for response in responses), key=lambda size: size.num_blocks)

    async def compile_grammar(self, grammar: Grammar) -> None:
        """Have the rank that samples compile a grammar, ahead of the sequences that are to obey it.

        Raises: GrammarError; TimeoutError where it has no time for it; ShardUnreachable.
        """
        request = pb.CompileGrammarRequest(grammar=to_proto(grammar))
        try:
            await self._clients[0].compile_grammar(request, _UNARY_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
                raise GrammarError(error.details() or "") from error
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise TimeoutError from error
            raise ShardUnreachable(error.details() or str(error.code())) from error

    async def makes_progress(self) -> bool:
        """Whether rank 0 answers, and what it does goes on; asks it."""
        age_s = await self._clients[0].progress_age_s(_HEALTH_TIMEOUT_S)
        return age_s is not None and age_s < STALL_LIMIT_S

    async def embed(self, texts: Sequence[Sequence[int]]) -> bytes:
        """Float32 [texts, dimensions], little endian, of an encoder.

        Raises: ShardUnreachable, also for one that hangs; EmbeddingFailed.
        """
        lengths = [len(text) for text in texts]
        request = pb.EmbedRequest(token_ids=chain.from_iterable(texts), lengths=lengths)
        limit_s = STALL_LIMIT_S + STALL_LIMIT_PER_TOKEN_S * sum(lengths)
        try:
            return await self._clients[0].embed(request, limit_s)
        except grpc.aio.AioRpcError as error:
            if error.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.RESOURCE_EXHAUSTED):
                raise EmbeddingFailed(error.details() or "") from error
            raise ShardUnreachable(error.details() or str(error.code())) from error

    async def reset(self) -> None:
        """Begin a new epoch: shards drop all sequences, open streams are replaced.

        Raises: ShardUnreachable.
        """
        self._failed = True
        self._step_id = 0
        self._sent.clear()
        self._acknowledged.clear()
        self._results.clear()
        await asyncio.gather(*(client.close_steps() for client in self._clients))
        try:
            # A router before this one, or a benchmark, has begun epochs of its own.
            epochs = await asyncio.gather(*(client.epoch(_RESET_TIMEOUT_S) for client in self._clients))
            self.epoch = max(self.epoch, *epochs) + 1
            await asyncio.gather(*(client.clear_cache(self.epoch, _RESET_TIMEOUT_S) for client in self._clients))
        except grpc.aio.AioRpcError as error:
            raise ShardUnreachable(error.details() or str(error.code())) from error
        for client in self._clients:
            await client.open_steps(self._take, self._lose)
        self._failed = False

    async def send(self, step: pb.StepRequest) -> int:
        """Number a step, send it to every rank and return the number. A rank that is gone is an ``on_failure``."""
        self._step_id += 1
        step.epoch, step.step_id = self.epoch, self._step_id
        num_tokens = sum(chunk.num_tokens for chunk in step.prefill.chunks) + len(step.decode.sequence_ids)
        self._sent[step.step_id] = _SentStep(time.monotonic(), num_tokens)
        self._in_flight.set()
        try:
            for client in self._clients:
                await client.send(step)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            self._lose(str(error))
        return step.step_id

    async def close(self) -> None:
        self._failed = True
        await asyncio.gather(*(client.close() for client in self._clients))

    def _take(self, result: pb.StepResult) -> None:
        if self._failed or result.epoch != self.epoch:
            return
        if result.HasField("failure"):
            self._fail(result.failure.message, "it refused a step")
            return
        step_id = result.step_id
        count = self._acknowledged.get(step_id, 0) + 1
        # Rank 0 alone reports tokens; of the others only the acknowledgement counts.
        kept = self._results.get(step_id)
        if kept is None or result.HasField("tokens") or result.generations or result.failures:
            self._results[step_id] = kept = result
        if count < len(self._clients):
            self._acknowledged[step_id] = count
            return
        self._acknowledged.pop(step_id, None)
        converted = step_result(self._results.pop(step_id))
        self._acknowledged_at = time.monotonic()
        self._sent.pop(step_id, None)
        self.on_result(converted)

    def _lose(self, details: str) -> None:
        self._fail(LOST, details)

    def _fail(self, message: str, details: str) -> None:
        if not self._failed:
            self._failed = True
            logger.error("A shard failed: %s (%s)", message, details)
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
