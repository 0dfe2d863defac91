"""Texts of many requests -> batches of an encoder, each request getting its turn."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from array import array
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from text_generation_router.errors import NO_SHARD, GenerationFailed, Overloaded, RouterError, ShuttingDown
from text_generation_router.metrics import Metrics
from text_generation_router.scheduling.backlog import Backlog
from text_generation_router.shards.group import LOST, EmbeddingFailed, ShardGroup, ShardUnreachable

logger = logging.getLogger(__name__)

MAX_BATCHES_IN_FLIGHT = 2
"""One is computed, one waits for it: the shard never waits for the router."""
TURN = 16
"""Texts that a request puts into a batch before it is another's turn."""
WATCH_EVERY_S = 1.0
RECOVERY_PAUSE_S = 0.2
LEAST_TOKENS = 512
"""Of a batch at most, however short memory is: a text alone may have as many."""
MAX_CRASHES = 2
"""Of the shard over one text: from then on it goes alone."""
NOT_FINITE = "Server error: the model's vector of a text was not finite"
METHOD = "embed"
"""The label of TGI's metrics."""


@dataclass(slots=True, eq=False)
class Job:
    """The texts of one request."""

    texts: Sequence[Sequence[int]]
    done: asyncio.Future[None]
    vectors: list[bytes] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    """In which they are computed: those of one length are computed together, without padding."""
    num_taken: int = 0
    num_missing: int = 0
    crashes: Counter[int] = field(default_factory=Counter)
    """How often the shard was lost over each of the texts."""

    def __post_init__(self) -> None:
        self.vectors = [b""] * len(self.texts)
        self.order = sorted(range(len(self.texts)), key=lambda index: -len(self.texts[index]))
        self.num_missing = len(self.texts)


Place = tuple[Job, int]
"""A text by its job and its index there."""


def fill_batch(jobs: deque[Job], max_tokens: int) -> list[Place]:
    """Take texts in turns until they have ``max_tokens``, at least one; jobs that have none left are taken out."""
    batch: list[Place] = []
    left = max_tokens
    while jobs:
        job = jobs.popleft()
        if job.done.done():  # its client is gone
            continue
        for _ in range(TURN):
            if job.num_taken == len(job.texts):
                break
            index = job.order[job.num_taken]
            size = len(job.texts[index])
            if batch and size > left:
                jobs.appendleft(job)
                return batch
            batch.append((job, index))
            job.num_taken += 1
            left -= size
        if job.num_taken < len(job.texts):
            jobs.append(job)
    return batch


class EncoderBatcher:
    """Owns the connection to an encoder; everything happens on the event loop."""

    def __init__(
        self,
        shards: ShardGroup,
        *,
        metrics: Metrics,
        max_tokens: int,
        vector_bytes: int,
        max_queue_size: int | None = None,
    ) -> None:
        """``max_tokens`` of a batch. ``max_queue_size``: requests that may wait; None: as many as are let in."""
        self.backlog = Backlog(lambda: len(self._not_begun()), max_queue_size)
        self._num_jobs = 0
        """That wait or are computed."""
        self._shards = shards
        self._max_tokens = max_tokens
        self._vector_bytes = vector_bytes
        self._metrics = metrics
        self._jobs: deque[Job] = deque()
        self._num_in_flight = 0
        self._wake = asyncio.Event()
        self._answers = True
        self._again: deque[list[Place]] = deque()
        """Batches, and halves of batches, that failed or over which the shard was lost: each is computed alone."""
        self._is_alone = False
        """Whether one of them is computed now."""
        self._is_lost = False
        self._given_up = False
        self._closed = False

    def give_up(self) -> None:
        """No shard will be started again: fail what waits for one, and what comes."""
        self._given_up = True
        for job in {*self._jobs, *(job for batch in self._again for job, _ in batch)}:
            _fail(job, GenerationFailed(NO_SHARD))

    def ready(self) -> bool:
        """Whether the shard answers and makes progress."""
        return self._answers

    def _not_begun(self) -> list[Job]:
        """In the order in which they came."""
        return [job for job in self._jobs if job.num_taken == 0 and not job.done.done()]

    async def embed(self, texts: Sequence[Sequence[int]]) -> list[bytes]:
        """Vectors in the order of the texts. Raises: GenerationFailed, ShuttingDown, Overloaded."""
        if self._closed:
            raise ShuttingDown
        if self._given_up:
            raise GenerationFailed(NO_SHARD)
        job = Job(texts, asyncio.get_running_loop().create_future())
        self._jobs.append(job)
        self._metrics.queue_size.set(len(self._jobs))
        self._wake.set()
        self._num_jobs += 1
        self.backlog.arrive()
        try:
            await job.done  # who is cancelled here cancels it, and what is left of the job with it
        finally:
            self._num_jobs -= 1
            if job.num_taken:
                self.backlog.leave(num_left=self._num_jobs)
        return job.vectors

    async def run(self) -> None:
        """Serve until cancelled."""
        sent: set[Place] = set()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._watch(), name="watching the shard")
                while True:
                    while batch := self._next_batch():
                        self._metrics.queue_size.set(len(self._jobs))
                        self._num_in_flight += 1
                        sent.update(batch)
                        tasks.create_task(self._compute(batch, sent))
                    for job in self.backlog.surplus(self._not_begun):
                        _fail(job, Overloaded(self.backlog.turn_away()))
                    await self._wake.wait()
                    self._wake.clear()
        finally:
            self._closed = True
            for job in {*self._jobs, *(job for batch in (sent, *self._again) for job, _ in batch)}:
                _fail(job, ShuttingDown())

    async def _watch(self) -> None:
        """Find a shard that hangs or is gone, whether anybody asks it for something or not; and one that is back."""
        while True:
            await asyncio.sleep(WATCH_EVERY_S)
            self._answers = await self._shards.makes_progress()

    async def _compute(self, batch: list[Place], sent: set[Place]) -> None:
        texts = [job.texts[index] for job, index in batch]
        metrics, started_at = self._metrics, time.perf_counter()
        metrics.batch_inference_count.inc(method=METHOD)
        incarnation = self._shards.incarnation
        try:
            raw = await self._shards.embed(texts)
        except (EmbeddingFailed, ShardUnreachable) as error:
            metrics.batch_inference_failure.inc(method=METHOD)
            self._answers = isinstance(error, EmbeddingFailed)
            if not self._answers and self._shards.restarts and not self._given_up:
                await self._lose(batch, incarnation)
                return
            if isinstance(error, EmbeddingFailed):
                if error.out_of_memory:
                    self._make_batches_smaller(batch)
                if len(batch) > 1:  # it may be too large, or one of them is at fault
                    middle = len(batch) // 2
                    self._again += [batch[:middle], batch[middle:]]
                    return
            message = f"Server error: {error}" if self._answers else NO_SHARD
            for job in {job for job, _ in batch}:
                _fail(job, GenerationFailed(message))
        except asyncio.CancelledError:
            for job in {job for job, _ in batch}:
                _fail(job, ShuttingDown())
            raise
        else:
            metrics.batch_inference_success.inc(method=METHOD)
            metrics.batch_inference_duration.observe(time.perf_counter() - started_at, method=METHOD)
            self._answers = True
            width = self._vector_bytes
            for place, (job, index) in enumerate(batch):
                del job.crashes[index]
                vector = raw[place * width : (place + 1) * width]
                if not math.isfinite(sum(array("f", vector))):
                    _fail(job, GenerationFailed(NOT_FINITE))
                job.vectors[index] = vector
                job.num_missing -= 1
                if not job.num_missing and not job.done.done():
                    job.done.set_result(None)
        finally:
            sent.difference_update(batch)
            self._num_in_flight -= 1
            self._wake.set()

    def _make_batches_smaller(self, batch: list[Place]) -> None:
        """If this one was about as large as they get: else memory is short for another reason."""
        self._metrics.out_of_memory_count.inc()
        size = max(self._max_tokens // 2, LEAST_TOKENS)
        # One that is larger than any now was on its way when the one before it failed.
        if size < sum(len(job.texts[index]) for job, index in batch) <= self._max_tokens:
            self._max_tokens = size
            logger.warning("Out of memory: batches have at most %s tokens from now on", size)

    def _next_batch(self) -> list[Place]:
        """What is to be sent now, if anything."""
        while self._again and all(job.done.done() for job, _ in self._again[0]):
            self._again.popleft()  # its clients are gone
        self._is_alone = self._num_in_flight > 0 and self._is_alone
        if self._is_lost or self._is_alone or self._num_in_flight >= MAX_BATCHES_IN_FLIGHT:
            return []
        if self._again:
            if self._num_in_flight:
                return []
            self._is_alone = True
            return self._again.popleft()
        return fill_batch(self._jobs, self._max_tokens)

    async def _lose(self, batch: list[Place], incarnation: int) -> None:
        """The shard was lost over a batch, and will be started again: have it computed then, by itself.

        One of its texts may be what makes the shard fail. The second time they go one by one, and the one that is
        alone when it happens again has failed.
        """
        first, index = batch[0]
        if len(batch) == 1 and first.crashes[index] >= MAX_CRASHES:
            _fail(first, GenerationFailed(f"Server error: {LOST}"))
        else:
            for job, index in batch:
                job.crashes[index] += 1
            suspected = any(job.crashes[index] >= MAX_CRASHES for job, index in batch)
            self._again += [[place] for place in batch] if suspected else [batch]
        self._is_lost = True
        while self._is_lost:
            try:
                await self._shards.rejoin(incarnation)
                self._is_lost = False
            except ShardUnreachable:
                if self._given_up:
                    break
                await asyncio.sleep(RECOVERY_PAUSE_S)


def _fail(job: Job, error: RouterError) -> None:
    if not job.done.done():
        job.done.set_exception(error)
