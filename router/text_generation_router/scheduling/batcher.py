"""The loop: plan steps, send them to the shards one ahead, hand out what comes back."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from dataclasses import dataclass

import grpc.aio
from text_generation_proto.v1 import generate_pb2 as pb

from text_generation_router.detokenizer import Detokenizer
from text_generation_router.errors import GenerationFailed, ShuttingDown
from text_generation_router.metrics import Metrics
from text_generation_router.scheduling.answers import Answer, start_answer
from text_generation_router.scheduling.requests import QueuedRequest
from text_generation_router.scheduling.steps import RunningSequence, StepPlan, StepScheduler
from text_generation_router.shards.convert import step_request
from text_generation_router.shards.group import ShardGroup

logger = logging.getLogger(__name__)

MAX_STEPS_IN_FLIGHT = 2
"""One executes, one is queued: the shards never wait for the router, and a finished sequence costs one row."""

_RECOVERY_PAUSE_S = 0.2


@dataclass(frozen=True, slots=True)
class _SentStep:
    sent_at: float
    is_prefill: bool


class Batcher:
    """Owns the scheduler and the shard group; everything happens on the event loop, in one task."""

    def __init__(
        self,
        shards: ShardGroup,
        scheduler: StepScheduler,
        detokenizer: Detokenizer,
        metrics: Metrics,
    ) -> None:
        self._shards = shards
        self._scheduler = scheduler
        self._detokenizer = detokenizer
        self._metrics = metrics
        self._answers: dict[QueuedRequest, Answer] = {}
        self._sent: dict[int, _SentStep] = {}
        self._results: deque[pb.StepResult] = deque()
        self._failure: str | None = None
        self._wake = asyncio.Event()
        shards.on_result = self._on_result
        shards.on_failure = self._on_failure
        metrics.batch_max_total_tokens.set(scheduler.blocks.num_blocks * scheduler.blocks.block_size)
        metrics.kv_cache_blocks_total.set(scheduler.blocks.num_blocks)

    @property
    def num_requests(self) -> int:
        """Requests that wait or run."""
        return len(self._answers)

    @property
    def num_free_blocks(self) -> int:
        return self._scheduler.blocks.num_free

    def ready(self) -> bool:
        """Whether the shards make progress; answers at once."""
        return self._shards.ready()

    def enqueue(self, queued: QueuedRequest) -> None:
        """Take a request in. Its events come by ``queued.stream``."""
        self._answers[queued] = start_answer(queued, self._detokenizer, self._shards.info.eos_token_ids)
        self._scheduler.waiting.append(queued)
        self._metrics.queue_size.set(len(self._scheduler.waiting))
        self._wake.set()

    def cancel(self, queued: QueuedRequest) -> None:
        """Forget a request whose client went away; its blocks are free at once. Harmless for one that has ended."""
        if self._answers.pop(queued, None) is not None:
            queued.stream.cancelled = True
            self._scheduler.cancel(queued)
            self._show_state()
            self._wake.set()

    async def run(self) -> None:
        """Serve until cancelled. Fails what is left of the requests when it ends."""
        try:
            await self._recover()
            while True:
                while self._results:
                    self._apply(self._results.popleft())
                if self._failure is not None:
                    await self._recover()
                await self._dispatch()
                if not self._results and self._failure is None:
                    await self._wake.wait()
                self._wake.clear()
        finally:
            self._fail_all()

    async def _dispatch(self) -> None:
        while self._failure is None and self._shards.num_in_flight < MAX_STEPS_IN_FLIGHT:
            plan = self._scheduler.plan(num_in_flight=self._shards.num_in_flight)
            if plan is None:
                return
            now = time.perf_counter()
            for sequence in plan.new_sequences:
                if sequence.queued.started_at is None:
                    sequence.queued.started_at = now
            self._count_dispatch(plan)

            def make_step(epoch: int, step_id: int, plan: StepPlan = plan, now: float = now) -> pb.StepRequest:
                self._sent[step_id] = _SentStep(now, is_prefill=bool(plan.chunks))
                can_report = self._shards.info.prefill_logprobs
                return step_request(plan, epoch=epoch, step_id=step_id, prefill_logprobs=can_report)

            await self._shards.send(make_step)

    def _on_result(self, result: pb.StepResult) -> None:
        self._results.append(result)
        self._wake.set()

    def _on_failure(self, message: str) -> None:
        self._failure = message
        self._wake.set()

    def _apply(self, result: pb.StepResult) -> None:
        """Hand out the tokens of a step; those of sequences that have ended meanwhile are discarded."""
        running = self._scheduler.running
        for generation in result.generations:
            sequence = running.get(generation.sequence_id)
            if sequence is not None:
                self._take_generation(sequence, generation)
        for failure in result.failures:
            sequence = running.get(failure.sequence_id)
            if sequence is not None:
                self._end(sequence, GenerationFailed(f"Server error: {failure.message}"))
        self._count_result(result)
        self._show_state()

    def _take_generation(self, sequence: RunningSequence, generation: pb.Generation) -> None:
        queued = sequence.queued
        answer = self._answers[queued]
        if generation.HasField("prefill"):
            answer.prefill_logprobs += generation.prefill.logprobs
        token_ids = generation.token_ids
        if not token_ids:
            return
        if not queued.output_ids and answer.prefill_logprobs:
            queued.stream.put(answer.prefill_event())
        logprobs, tops = generation.logprobs, generation.top_tokens
        for offset, token_id in enumerate(token_ids):
            if generation.first_output_index + offset != len(queued.output_ids):
                continue  # known already: the shard repeats itself after a replay
            top = list(zip(tops[offset].ids, tops[offset].logprobs, strict=True)) if tops else None
            before = answer.last_token_at
            event = answer.add_token(token_id, _finite(logprobs[offset]) if logprobs else None, top)
            if before:
                self._metrics.inter_token_latency_duration.observe(answer.last_token_at - before)
            else:
                self._metrics.time_to_first_token_duration.observe(answer.last_token_at - queued.enqueued_at)
            queued.stream.put(event)
            if event.finished is not None:
                self._end(sequence, None)
                return

    def _end(self, sequence: RunningSequence, error: GenerationFailed | None) -> None:
        self._scheduler.finish(sequence)
        del self._answers[sequence.queued]
        if error is None:
            sequence.queued.stream.close()
        else:
            sequence.queued.stream.fail(error)

    async def _recover(self) -> None:
        """Begin an epoch with empty shards; what ran in the old one has failed, what waits goes on waiting."""
        message, self._failure = self._failure or "the server is starting", None
        for sent in self._sent.values():
            self._metrics.batch_inference_failure.inc(method="prefill" if sent.is_prefill else "decode")
        self._results.clear()
        self._sent.clear()
        for queued in self._scheduler.abandon_epoch():
            self._answers.pop(queued, None)
            queued.stream.fail(GenerationFailed(f"Server error: {message}"))
        self._show_state()
        while True:
            try:
                await self._shards.reset()
            except grpc.aio.AioRpcError as error:
                logger.warning("The shards do not answer: %s", error.details())
                await asyncio.sleep(_RECOVERY_PAUSE_S)
            else:
                return

    def _fail_all(self) -> None:
        self._scheduler.abandon_epoch()
        self._scheduler.waiting.clear()
        for queued in self._answers:
            queued.stream.fail(ShuttingDown())
        self._answers.clear()

    def _count_dispatch(self, plan: StepPlan) -> None:
        metrics = self._metrics
        if plan.chunks:
            metrics.batch_inference_count.inc(method="prefill")
            if plan.new_sequences:
                metrics.batch_next_size.observe(len(plan.new_sequences))
                if len(self._scheduler.running) > len(plan.new_sequences):
                    metrics.batch_concat.inc(reason="chunking")
        elif plan.decodes:
            metrics.batch_inference_count.inc(method="decode")

    def _count_result(self, result: pb.StepResult) -> None:
        sent = self._sent.pop(result.step_id, None)
        timings = result.timings
        if sent is None or not (timings.num_prefill_tokens or timings.num_decode_rows):
            return
        metrics = self._metrics
        method = "prefill" if sent.is_prefill else "decode"
        metrics.batch_inference_success.inc(method=method)
        metrics.batch_inference_duration.observe(time.perf_counter() - sent.sent_at, method=method)
        metrics.batch_forward_duration.observe(timings.forward_ns * 1e-9, method=method)
        metrics.batch_decode_duration.observe(timings.sample_ns * 1e-9, method=method)
        metrics.step_idle_duration.observe(timings.idle_ns * 1e-9)

    def _show_state(self) -> None:
        metrics, scheduler = self._metrics, self._scheduler
        metrics.queue_size.set(len(scheduler.waiting))
        metrics.batch_current_size.set(len(scheduler.running))
        metrics.batch_current_max_tokens.set(scheduler.num_running_tokens)
        metrics.kv_cache_usage.set(scheduler.blocks.num_used / scheduler.blocks.num_blocks)


def _finite(logprob: float) -> float | None:
    return logprob if math.isfinite(logprob) else None
