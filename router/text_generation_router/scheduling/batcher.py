"""The loop: plan steps, send them to the shards one ahead, hand out what comes back."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from text_generation_proto.grammars import GrammarError

from text_generation_router.detokenizer import Detokenizer
from text_generation_router.errors import (
    NO_SHARD,
    GenerationFailed,
    InternalError,
    Overloaded,
    RouterError,
    ShuttingDown,
)
from text_generation_router.metrics import Metrics
from text_generation_router.scheduling.answers import Answer, start_answer
from text_generation_router.scheduling.backlog import Backlog
from text_generation_router.scheduling.costs import StepWork
from text_generation_router.scheduling.door import Door
from text_generation_router.scheduling.messages import step_request
from text_generation_router.scheduling.requests import QueuedRequest
from text_generation_router.scheduling.steps import RunningSequence, StepPlan, StepScheduler
from text_generation_router.shards.convert import Generation, StepResult
from text_generation_router.shards.group import GroupFailure, ShardGroup, ShardUnreachable

logger = logging.getLogger(__name__)

MAX_STEPS_IN_FLIGHT = 2
"""One executes, one is queued: the shards never wait for the router, and a finished sequence costs one row."""

_RECOVERY_PAUSE_S = 0.2
OUT_OF_MEMORY_WINDOW_S = 60.0


@dataclass(frozen=True, slots=True)
class _SentStep:
    sent_at: float
    plan: StepPlan
    work: StepWork
    follows: bool
    """Whether the shards had another step to do when it was sent: then they should not idle before it."""

    @property
    def method(self) -> str:
        """The label of TGI's metrics: a step with prompt chunks is a prefill."""
        return "prefill" if self.work.num_prompt_tokens else "decode"


class Batcher:
    """Owns the scheduler and the shard group; everything happens on the event loop, in one task."""

    def __init__(
        self,
        shards: ShardGroup,
        scheduler: StepScheduler,
        detokenizer: Detokenizer,
        metrics: Metrics,
        *,
        max_queue_size: int | None = None,
    ) -> None:
        """``max_queue_size``: requests that may wait; None: as many as are let in."""
        self._shards = shards
        self._scheduler = scheduler
        self._detokenizer = detokenizer
        self._metrics = metrics
        self._answers: dict[QueuedRequest, Answer] = {}
        self._sent: dict[int, _SentStep] = {}
        self._results: deque[StepResult] = deque()
        self._last_result_at = 0.0
        self._failure: GroupFailure | None = None
        self._unreachable = False
        """Whether nobody knows when a shard will answer, or whether."""
        self._given_up = False
        """Whether the launcher says that none will be started again."""
        self.backlog = Backlog(lambda: self.num_waiting, max_queue_size)
        self._out_of_memory_at = -math.inf
        self._closed = False
        self._wake = asyncio.Event()
        self._alarm: asyncio.TimerHandle | None = None
        """Sets it when nobody is to be waited for any longer."""
        self.door = Door(self._wake.set)
        """For those who are about to call `enqueue`."""
        shards.on_result = self._on_result
        shards.on_failure = self._on_failure
        metrics.batch_max_total_tokens.set(scheduler.leases.num_blocks * scheduler.leases.block_size)
        metrics.kv_cache_blocks_total.set(scheduler.leases.num_blocks)
        metrics.batch_max_prefill_tokens.set(scheduler.limits.max_batch_prefill_tokens)

    @property
    def num_requests(self) -> int:
        """Requests that wait or run."""
        return len(self._answers)

    def ready(self) -> bool:
        """Whether the shards make progress; answers at once."""
        return self._shards.ready()

    def enqueue(self, queued: QueuedRequest) -> None:
        """Take a request in. Its events come by ``queued.stream``.

        Raises: ShuttingDown once the loop has ended, GenerationFailed while the shards do not answer.
        """
        if self._closed:
            raise ShuttingDown
        if self._unreachable or self._given_up:
            raise GenerationFailed(NO_SHARD)
        self._answers[queued] = start_answer(queued, self._detokenizer, self._shards.info.eos_token_ids)
        self._scheduler.waiting.append(queued)
        self.backlog.arrive()
        self._metrics.queue_size.set(len(self._scheduler.waiting))
        self._wake.set()

    def expire(self, queued: QueuedRequest, error: RouterError) -> None:
        """End a request whose time is over. Harmless for one that has ended."""
        if queued in self._answers:
            self._scheduler.cancel(queued)
            self._fail([queued], error)
            self._wake.set()

    @property
    def num_waiting(self) -> int:
        """Requests that have not begun: those that were stopped, and go on later, have had their turn."""
        return sum(queued.started_at is None for queued in self._scheduler.waiting)

    def cancel(self, queued: QueuedRequest) -> None:
        """Forget a request whose client went away; its blocks are free at once. Harmless for one that has ended."""
        if self._leave(queued):
            self._scheduler.cancel(queued)
            self._show_state()
            self._wake.set()

    def give_up(self) -> None:
        """No shard will be started again: fail what waits for one, and what comes."""
        self._given_up = True
        self._fail_all()

    async def run(self) -> None:
        """Serve until cancelled. Fails what is left of the requests when it ends."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._shards.watch(), name="watching the shards")
                await self._serve()
        finally:
            self._closed = True
            self._scheduler.abandon_epoch()
            self._scheduler.waiting.clear()
            self._fail(list(self._answers), ShuttingDown())

    async def _serve(self) -> None:
        if not self._shards.ready():
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

    async def _dispatch(self) -> None:
        while self._failure is None and self._shards.num_in_flight < MAX_STEPS_IN_FLIGHT:
            if self._waits_for_others():
                return
            # What came while the last step was sent is not applied yet: clients get the tokens of both in one turn.
            plan = self._scheduler.plan(num_in_flight=self._shards.num_in_flight + len(self._results))
            self._turn_away_surplus()
            if plan is None:
                return
            now = time.perf_counter()
            for sequence in plan.new_sequences:
                if sequence.queued.started_at is None:
                    sequence.queued.started_at = now
            self._count_dispatch(plan)
            follows = self._shards.num_in_flight > 0
            step_id = await self._shards.send(step_request(plan, prefill_logprobs=self._shards.info.prefill_logprobs))
            if plan.chunks or plan.decodes:
                self._sent[step_id] = _SentStep(now, plan, plan.work, follows)

    def _turn_away_surplus(self) -> None:
        for queued in self.backlog.surplus(self._not_begun):
            self._scheduler.cancel(queued)
            del self._answers[queued]
            queued.stream.fail(Overloaded(self.backlog.turn_away()))
            self._show_state()

    def _not_begun(self) -> list[QueuedRequest]:
        """In the order in which they came. Parts of a request that was let in as a whole stay, and send nobody away."""
        not_begun = [each for each in self._scheduler.waiting if each.started_at is None and not each.is_part]
        return sorted(not_begun, key=lambda each: each.enqueued_at)

    def _waits_for_others(self) -> bool:
        """Whether the next step is better planned a little later; the loop is woken then."""
        first = self._scheduler.waiting.first()
        if self._shards.num_in_flight:
            until = self.door.wait_while_busy(self._step_ends_at())
        elif first is not None and not self._scheduler.running:
            until = self.door.wait_while_idle(first.enqueued_at)
        else:
            return False
        wait_s = until - time.perf_counter()
        if wait_s <= 0:
            return False
        if self._alarm is not None:  # else there would be one for everybody who comes meanwhile
            self._alarm.cancel()
        self._alarm = asyncio.get_running_loop().call_later(wait_s, self._wake.set)
        return True

    def _step_ends_at(self) -> float:
        """When the result of the step that was sent last is expected; 0 if it computes nothing."""
        if not self._sent:
            return 0.0
        sent = next(reversed(self._sent.values()))
        return max(sent.sent_at, self._last_result_at) + self._scheduler.costs.step_s(sent.work)

    def _on_result(self, result: StepResult) -> None:
        self._last_result_at = time.perf_counter()
        self._results.append(result)
        self._wake.set()

    def _on_failure(self, failure: GroupFailure) -> None:
        self._failure = failure
        self._wake.set()

    def _apply(self, result: StepResult) -> None:
        """Hand out the tokens of a step; those of sequences that have ended meanwhile are discarded."""
        running = self._scheduler.running
        for sequence_id, output_index, token_id, logprob in result.tokens:
            sequence = running.get(sequence_id)
            if sequence is None:
                continue
            try:
                self._take_token(sequence, output_index, token_id, logprob, None)
            except Exception:
                self._fail_to_hand_out(sequence)
        for generation in result.generations:
            sequence = running.get(generation.sequence_id)
            if sequence is None:
                continue
            try:
                self._take_generation(sequence, generation)
            except Exception:
                self._fail_to_hand_out(sequence)
        for sequence_id, message in result.failures:
            sequence = running.get(sequence_id)
            if sequence is not None:
                self._end(sequence, GenerationFailed(f"Server error: {message}"))
        if result.tokens:
            self._metrics.request_skipped_tokens.observe(0, times=len(result.tokens))
        for generation in result.generations:
            if generation.token_ids:
                self._metrics.request_skipped_tokens.observe(len(generation.token_ids) - 1)
        self._count_result(result)
        self._show_state()

    def _take_generation(self, sequence: RunningSequence, generation: Generation) -> None:
        if generation.prefill is not None:
            self._answers[sequence.queued].add_prefill(generation.prefill)
        if generation.embedding and generation.token_ids:
            sequence.queued.embedding = generation.embedding
        logprobs, tops = generation.logprobs, generation.top_tokens
        for offset, token_id in enumerate(generation.token_ids):
            if not self._take_token(
                sequence,
                generation.first_output_index + offset,
                token_id,
                logprobs[offset] if logprobs else None,
                tops[offset] if tops else None,
            ):
                return

    def _take_token(
        self,
        sequence: RunningSequence,
        output_index: int,
        token_id: int,
        logprob: float | None,
        top: list[tuple[int, float]] | None,
    ) -> bool:
        """Hand it out; whether the sequence goes on."""
        queued = sequence.queued
        if output_index != len(queued.output_ids):
            return True  # known already: the shard repeats itself after a replay
        answer, metrics = self._answers[queued], self._metrics
        before = answer.last_token_at
        if not before and answer.prefill_logprobs:
            queued.stream.put(answer.prefill_event())
        event = answer.add_token(token_id, _finite(logprob), top)
        if before:
            metrics.inter_token_latency_duration.observe(answer.last_token_at - before)
        else:
            metrics.time_to_first_token_duration.observe(answer.last_token_at - queued.enqueued_at)
            metrics.prefix_cache_queried_tokens.inc(queued.num_prompt_tokens)
            metrics.prefix_cache_hit_tokens.inc(queued.num_cached_tokens)
        queued.stream.put(event)
        self._scheduler.took_token(sequence)
        if event.finished is None:
            return True
        self._end(sequence, None)
        return False

    def _fail_to_hand_out(self, sequence: RunningSequence) -> None:
        logger.exception("A token could not be handed out")
        self._end(sequence, InternalError())

    def _end(self, sequence: RunningSequence, error: RouterError | None) -> None:
        self._scheduler.finish(sequence, keep=error is None)
        if error is None:
            self._leave(sequence.queued)
            sequence.queued.stream.close()
        else:
            self._fail([sequence.queued], error)

    def _leave(self, queued: QueuedRequest) -> bool:
        """However it ended, it makes room for another; whether it was still here."""
        if self._answers.pop(queued, None) is None:
            return False
        self.backlog.leave(num_left=len(self._answers))
        return True

    async def _recover(self) -> None:
        """Begin an epoch with empty shards, and go on with all that ran in the old one from its token log."""
        failure, self._failure = self._failure, None
        sent = list(self._sent.values())
        for step in sent:
            self._metrics.batch_inference_failure.inc(method=step.method)
        refused = None if failure is None else self._sent.get(failure.step_id or 0)
        self._results.clear()
        self._sent.clear()
        lost = self._scheduler.abandon_epoch()
        if failure is not None:
            if failure.is_lost and not self._shards.restarts:
                self._fail(lost, GenerationFailed(f"Server error: {failure.message}"))
            else:
                self._replay(lost, failure, sent, refused)
        while True:
            try:
                await self._reset()
            except ShardUnreachable as error:
                if not self._shards.restarts:
                    if not self._unreachable:
                        logger.warning("The shards do not answer: %s", error)
                    self._unreachable = True
                    self._fail_all()
                await asyncio.sleep(_RECOVERY_PAUSE_S)
            else:
                self._unreachable = False
                return

    async def _reset(self) -> None:
        """Raises: ShardUnreachable."""
        await self._shards.reset()
        # Else the first step with each would wait until it is compiled.
        for grammar in {queued.request.grammar for queued in self._answers}:
            if grammar is not None:
                try:
                    await self._shards.compile_grammar(grammar)
                except GrammarError:
                    pass  # its request fails by itself
                except TimeoutError:
                    return  # of shards that hang a step finds out

    def _replay(
        self, lost: Sequence[QueuedRequest], failure: GroupFailure, sent: Sequence[_SentStep], refused: _SentStep | None
    ) -> None:
        """Put back what ran, ahead of all that waits; but for what must not run again.

        A step that ran out of memory costs the prompts that it took in, or what it computed alone; of several that ran
        before nobody is to blame. Any other failure makes suspects of all that the shards were computing; one that was
        computed alone, because it was suspected, is guilty.
        """
        error = GenerationFailed(f"Server error: {failure.message}")
        computed = {sequence.queued for step in sent for sequence in step.plan.sequences()}
        guilty: set[QueuedRequest] = set()
        if failure.out_of_memory:
            self._metrics.out_of_memory_count.inc()
        if failure.out_of_memory and refused is not None:
            # Those that go on after another failure are prompts as well.
            guilty = {sequence.queued for sequence, _ in refused.plan.chunks if not sequence.queued.output_ids}
            if not guilty and len(rows := {sequence.queued for sequence in refused.plan.sequences()}) == 1:
                guilty = rows
            self._make_steps_smaller(refused.plan)
        elif len(computed) == 1 and next(iter(computed)).is_suspect:
            guilty = computed
        else:
            for queued in computed:
                queued.num_crashes += 1
        self._fail([queued for queued in lost if queued in guilty], error)
        survivors = [queued for queued in lost if queued not in guilty]
        self._scheduler.put_back(survivors)
        self._metrics.request_replay_count.inc(len(survivors))
        if survivors:
            suspects = sum(queued.is_suspect for queued in survivors)
            logger.warning("%s requests go on from where they were, %s of them alone first", len(survivors), suspects)
        self._show_state()

    def _make_steps_smaller(self, refused: StepPlan) -> None:
        """If memory ran out twice within a minute: then they are too large for this machine."""
        now, before = time.monotonic(), self._out_of_memory_at
        self._out_of_memory_at = now
        if now - before >= OUT_OF_MEMORY_WINDOW_S:
            return
        if refused.chunks and self._scheduler.limits.max_batch_prefill_tokens > 1:
            tokens = self._scheduler.halve_prefill_budget()
            self._metrics.batch_max_prefill_tokens.set(tokens)
            logger.warning("Out of memory again: steps take in %s tokens of prompts from now on", tokens)
        else:
            size = self._scheduler.run_at_most(sum(1 for _ in refused.sequences()) // 2)
            logger.warning("Out of memory again: %s requests run at once from now on", size)

    def _fail_all(self) -> None:
        self._scheduler.abandon_epoch()
        self._scheduler.waiting.clear()
        self._fail(list(self._answers), GenerationFailed(NO_SHARD))

    def _fail(self, requests: Iterable[QueuedRequest], error: RouterError) -> None:
        for queued in requests:
            self._leave(queued)
            self._scheduler.forget(queued)
            queued.stream.fail(error)
        self._show_state()

    def _count_dispatch(self, plan: StepPlan) -> None:
        metrics = self._metrics
        metrics.preemption_count.inc(plan.num_preempted)
        if plan.chunks:
            metrics.batch_inference_count.inc(method="prefill")
            if plan.new_sequences:
                metrics.batch_next_size.observe(len(plan.new_sequences))
                if len(self._scheduler.running) > len(plan.new_sequences):
                    metrics.batch_concat.inc(reason=plan.concat_reason)
                self._show_state()
        elif plan.decodes:
            metrics.batch_inference_count.inc(method="decode")

    def _count_result(self, result: StepResult) -> None:
        sent = self._sent.pop(result.step_id, None)
        timings = result.timings
        if sent is None or timings is None:
            return
        metrics = self._metrics
        metrics.batch_inference_success.inc(method=sent.method)
        metrics.batch_inference_duration.observe(time.perf_counter() - sent.sent_at, method=sent.method)
        metrics.batch_forward_duration.observe(timings.forward_s, method=sent.method)
        metrics.batch_decode_duration.observe(timings.sample_s, method=sent.method)
        metrics.step_idle_duration.observe(timings.idle_s)
        self._scheduler.costs.observe(sent.work, timings.forward_s + timings.sample_s)
        if sent.follows:
            metrics.step_overhead_duration.observe(timings.overhead_s, method=sent.method)

    def _show_state(self) -> None:
        metrics, scheduler = self._metrics, self._scheduler
        metrics.queue_size.set(len(scheduler.waiting))
        metrics.batch_current_size.set(len(scheduler.running))
        metrics.batch_current_max_tokens.set(scheduler.num_running_tokens)
        metrics.kv_cache_usage.set(scheduler.leases.num_used / scheduler.leases.num_blocks)
        metrics.prefix_cache_blocks.set(scheduler.leases.num_cached)
        evictions = metrics.prefix_cache_evictions
        evictions.inc(scheduler.leases.num_evictions - evictions.value())


def _finite(logprob: float | None) -> float | None:
    return logprob if logprob is not None and math.isfinite(logprob) else None
