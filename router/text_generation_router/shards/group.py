"""All shards as one: every rank gets the same steps, a step is done when every rank has acknowledged it.

A rank that is gone or hangs takes the group with it: its peers wait for it in a collective. Where a launcher restarts
the group, it is told, and the group goes on with the next incarnation.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

import grpc
import grpc.aio
from text_generation_proto.grammars import Grammar, GrammarError, to_proto
from text_generation_proto.logs import UNKNOWN, send_event
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
_WATCH_EVERY_S = 0.25
_WATCH_TIMEOUT_S = 0.5
"""With the interval less than the second that is promised for finding a shard that hangs, once its time is over."""
STALL_LIMIT_PER_TOKEN_S = 0.01
"""A shard reports progress after every layer. One that reports none for the stall timeout, and so much longer for each
token of its step, hangs: a layer takes far less, and a first step that compiles kernels takes less as well."""

DEFAULT_STALL_TIMEOUT_S = 60.0

LOST = "a shard was lost"
HANGS = "a shard hangs"


class ShardUnreachable(Exception):
    """A shard does not answer; the text is gRPC's, for the log."""


class EmbeddingFailed(Exception):
    """A shard could not compute the vectors of a batch; the text is fit for clients."""

    def __init__(self, message: str, *, out_of_memory: bool = False) -> None:
        super().__init__(message)
        self.out_of_memory = out_of_memory


class Identity(NamedTuple):
    """Which start of which launch a shard is of."""

    incarnation: int
    launcher_nonce: str


@dataclass(frozen=True, slots=True)
class GroupFailure:
    """Why nothing comes any more."""

    message: str
    """Fit for clients."""
    is_lost: bool
    """A rank is gone or hangs, and the group with it; otherwise a step was refused, and a reset helps."""
    step_id: int | None = None
    """The step that was refused."""
    out_of_memory: bool = False
    """It was refused for want of memory."""


@dataclass(frozen=True, slots=True)
class _SentStep:
    sent_at: float
    num_tokens: int


class ShardGroup:
    """The rank group of one launch.

    Results come by ``on_result`` in step order, once all ranks have acknowledged the step. ``on_failure`` says that
    a rank refused a step, hangs, or cannot be reached any more, after which nothing comes until ``reset``.
    """

    def __init__(
        self,
        clients: list[ShardClient],
        info: ShardInfo,
        identity: Identity,
        *,
        stall_timeout_s: float = DEFAULT_STALL_TIMEOUT_S,
        restarts: bool = False,
    ) -> None:
        """``restarts``: somebody starts the group anew when a rank is lost."""
        self.info = info
        self.restarts = restarts
        self.epoch = 0
        self.on_result: Callable[[StepResult], None] = lambda result: None
        self.on_failure: Callable[[GroupFailure], None] = lambda failure: None
        self._clients = clients
        self._identity = identity
        self._stall_timeout_s = stall_timeout_s
        self._is_lost = False
        """Whether it takes another incarnation to go on."""
        self._silent_since: float | None = None
        """Since when neither resets nor questions are answered."""
        self._warmed: WarmupLimits | None = None
        """What another incarnation has to make room for."""
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
        progress = [0.0] * len(self._clients)
        """When each rank last made some, as far as it is known."""
        while True:
            await self._in_flight.wait()
            await asyncio.sleep(_WATCH_EVERY_S)
            oldest = next(iter(self._sent.values()), None)
            if oldest is None:
                self._in_flight.clear()
                continue
            limit_s = self._limit_s(oldest.num_tokens)
            # A step runs when the one before it has ended.
            begun_at = max(oldest.sent_at, self._acknowledged_at)
            if self._failed or time.monotonic() - begun_at < limit_s / 2:
                continue
            epoch = self.epoch
            ages_s = await asyncio.gather(*(client.progress_age_s(_WATCH_TIMEOUT_S) for client in self._clients))
            now = time.monotonic()
            for rank, age_s in enumerate(ages_s):
                # One that is idle has ended the step; where all are, it never began. No answer says nothing yet.
                if age_s or (age_s is not None and any(ages_s)):
                    progress[rank] = now - age_s
            oldest_progress = min(max(begun_at, last) for last in progress)
            if now - oldest_progress > limit_s and epoch == self.epoch and oldest in self._sent.values():
                self._lose(HANGS, f"no progress for {limit_s:.0f} s in a step of {oldest.num_tokens} tokens: {ages_s}")

    async def warmup(self, limits: WarmupLimits) -> KVCacheSize:
        """Size the KV cache on all ranks; the smallest answer counts. Raises: ConfigError with the shard's reason."""
        request = warmup_request(limits)
        try:
            responses = await asyncio.gather(*(client.warmup(request, _UNARY_TIMEOUT_S) for client in self._clients))
        except grpc.aio.AioRpcError as error:
            raise ConfigError(f"Unable to warmup the Python model shards: {error.details()}") from error
        size = min((kv_cache_size(response) for response in responses), key=lambda size: size.num_blocks)
        # Another incarnation may find more memory free, or less: what requests were admitted by has to stay true.
        self._warmed = replace(limits, max_batch_total_tokens=size.num_blocks * self.info.block_size)
        return size

    async def compile_grammar(self, grammar: Grammar) -> None:
        """Have the rank that samples compile a grammar, ahead of the sequences that are to obey it.

        Raises: GrammarError; TimeoutError where it has no time for it; ShardUnreachable.
        """
        request = pb.CompileGrammarRequest(grammar=to_proto(grammar))
        try:
            await self._clients[0].compile_grammar(request, min(_UNARY_TIMEOUT_S, self._stall_timeout_s))
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
                raise GrammarError(error.details() or "") from error
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise TimeoutError from error
            if self.restarts:
                return  # who asked has to wait for the shards anyway, and it is compiled again when they are back
            raise ShardUnreachable(error.details() or str(error.code())) from error

    async def makes_progress(self) -> bool:
        """Whether rank 0 answers, and what it does goes on; asks it."""
        age_s = await self._clients[0].progress_age_s(_HEALTH_TIMEOUT_S)
        return age_s is not None and age_s < self._stall_timeout_s

    async def embed(self, texts: Sequence[Sequence[int]]) -> bytes:
        """Float32 [texts, dimensions], little endian, of an encoder.

        Raises: ShardUnreachable, also for one that hangs; EmbeddingFailed.
        """
        lengths = [len(text) for text in texts]
        request = pb.EmbedRequest(token_ids=chain.from_iterable(texts), lengths=lengths)
        incarnation = self.incarnation
        try:
            return await self._clients[0].embed(request, self._limit_s(sum(lengths)))
        except grpc.aio.AioRpcError as error:
            if error.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.RESOURCE_EXHAUSTED):
                out_of_memory = error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                raise EmbeddingFailed(error.details() or "", out_of_memory=out_of_memory) from error
            self._tell_launcher(f"{LOST}: {error.details()}", incarnation)
            raise ShardUnreachable(error.details() or str(error.code())) from error

    async def reset(self) -> None:
        """Begin a new epoch: shards drop all sequences, open streams are replaced. After a rank was lost, and where
        the group is restarted, in the next incarnation.

        Raises: ShardUnreachable, also while it does not answer yet.
        """
        self._failed = True
        self._step_id = 0
        self._sent.clear()
        self._acknowledged.clear()
        self._results.clear()
        await asyncio.gather(*(client.close_steps() for client in self._clients))
        if self._is_lost and self.restarts:
            await self.rejoin(self.incarnation)
            self._is_lost = False
        try:
            # A router before this one, or a benchmark, has begun epochs of its own.
            states = await asyncio.gather(*(client.health(_RESET_TIMEOUT_S) for client in self._clients))
            if self.restarts and any(state.incarnation != self.incarnation for state in states):
                # It refused a step, ended, and is started already: without its KV cache.
                self._is_lost = True
                raise ShardUnreachable("the shards were started again")
            self.epoch = max(self.epoch, *(state.epoch for state in states)) + 1
            await asyncio.gather(*(client.clear_cache(self.epoch, _RESET_TIMEOUT_S) for client in self._clients))
        except grpc.aio.AioRpcError as error:
            self._note_silence(self.incarnation)
            raise ShardUnreachable(error.details() or str(error.code())) from error
        self._silent_since = None
        for client in self._clients:
            await client.open_steps(self._take, lambda details: self._lose(LOST, details))
        self._failed = self._is_lost = False

    def _note_silence(self, incarnation: int) -> None:
        """No step is under way whose age could be watched. ``incarnation``: of the shards that do not answer;
        `UNKNOWN` of those that are to come, which may still be loading."""
        now = time.monotonic()
        self._silent_since = self._silent_since or now
        if now - self._silent_since > self._stall_timeout_s:
            self._silent_since = None
            self._is_lost = True
            self._tell_launcher(HANGS, incarnation)

    @property
    def incarnation(self) -> int:
        """How often the group was started, as far as it is known."""
        return self._identity.incarnation

    async def rejoin(self, after: int) -> None:
        """Go on with an incarnation later than that.

        Raises: ShardUnreachable until all ranks of it answer, and have room for what was planned.
        """
        if self.incarnation > after:
            return
        try:
            messages = await asyncio.gather(*(client.info(_RESET_TIMEOUT_S) for client in self._clients))
        except grpc.aio.AioRpcError as error:
            self._note_silence(UNKNOWN)
            raise ShardUnreachable(error.details() or str(error.code())) from error
        self._silent_since = None
        identity, *others = (_identity(message) for message in messages)
        if (
            any(other != identity for other in others)
            or identity.launcher_nonce != self._identity.launcher_nonce
            or identity.incarnation <= after
        ):
            raise ShardUnreachable("the shards are not restarted yet")
        self._identity = identity
        if self._warmed is None:
            return
        try:
            size = await self.warmup(self._warmed)
        except ConfigError as error:
            self._tell_launcher(str(error), self.incarnation)
            raise ShardUnreachable(str(error)) from error
        logger.info("The shards are back: KV-cache blocks %s (%s)", size.num_blocks, size.derivation)

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
            self._lose(LOST, str(error))
        return step.step_id

    async def close(self) -> None:
        self._failed = True
        await asyncio.gather(*(client.close() for client in self._clients))

    def _take(self, result: pb.StepResult) -> None:
        if self._failed or result.epoch != self.epoch:
            return
        if result.HasField("failure"):
            refusal = result.failure
            failure = GroupFailure(refusal.message, False, result.step_id, refusal.out_of_memory)
            self._fail(failure, "it refused a step")
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

    def _lose(self, message: str, details: str) -> None:
        if not self._failed:
            self._is_lost = True
            self._fail(GroupFailure(message, True), details)
            self._tell_launcher(f"{message}: {details}", self.incarnation)

    def _fail(self, failure: GroupFailure, details: str) -> None:
        if not self._failed:
            self._failed = True
            logger.error("A shard failed: %s (%s)", failure.message, details)
            self.on_failure(failure)

    def _tell_launcher(self, reason: str, incarnation: int) -> None:
        """It knows of shards that have ended, but not of those that hang."""
        send_event("shards_lost", f"shards are lost: {reason}", incarnation=incarnation)

    def _limit_s(self, num_tokens: int) -> float:
        return self._stall_timeout_s + STALL_LIMIT_PER_TOKEN_S * num_tokens


async def connect(
    master_uds_path: str,
    launcher_nonce: str,
    timeout_s: float,
    *,
    stall_timeout_s: float = DEFAULT_STALL_TIMEOUT_S,
    restarts: bool = False,
) -> ShardGroup:
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
    return ShardGroup(
        clients, shard_info(message), _identity(message), stall_timeout_s=stall_timeout_s, restarts=restarts
    )


def _identity(message: pb.InfoResponse) -> Identity:
    return Identity(message.incarnation, message.launcher_nonce)


async def _info(client: ShardClient, timeout_s: float) -> pb.InfoResponse:
    try:
        return await client.info(timeout_s)
    except grpc.aio.AioRpcError as error:
        raise ConfigError(f"Unable to connect to the Python model shards: {client.url}: {error.details()}") from error
