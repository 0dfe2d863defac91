"""The engine thread: executes steps in the order they arrive, one on the device and one launched behind it.

The thread owns the sequences, the KV cache and the device, and it is the one that loaded the model: `compute_thread`.
Others hand it jobs through a queue on which it sleeps when there is nothing to do, and read a few counters. Epochs: a
failed step, or a reset, makes everything before it void.
"""

from __future__ import annotations

import gc
import logging
import queue
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch

from text_generation_server.engine.batch import SequenceLimits
from text_generation_server.engine.executor import Broadcast, Launched, StepExecutor
from text_generation_server.engine.largest_step import largest_step, run
from text_generation_server.engine.memory import KVPlan, WarmupLimits
from text_generation_server.engine.steps import Step, StepFailure, StepResult
from text_generation_server.errors import InvalidStep, NotEnoughMemory, ShardError, StaleEpoch, is_out_of_memory
from text_generation_server.generation.guidance import Guidance
from text_generation_server.generation.watermark import DEFAULT_WATERMARK, Watermark
from text_generation_server.model.runner import ModelRunner

logger = logging.getLogger(__name__)

T = TypeVar("T")
Deliver = Callable[[StepResult], None]
Planner = Callable[[ModelRunner, WarmupLimits], KVPlan]

# What clients are told of errors that are not ours: the texts of those name paths, addresses and sizes.
OUT_OF_MEMORY = "out of memory in a step; lower `--max-batch-prefill-tokens` or `--max-batch-total-tokens`"
STEP_FAILED = "the model failed in a step; the shard's log says why"


@dataclass(frozen=True, slots=True)
class EngineHealth:
    epoch: int
    last_step_id: int
    """The last step that ended, and well."""
    progress_age_ns: int
    """Since the last sign of progress while a step runs; 0 when idle."""
    num_sequences: int
    num_blocks: int
    """Usable ones; 0 while there is no KV cache."""


@dataclass(slots=True)
class _StepJob:
    step: Step
    deliver: Deliver
    refusal: ShardError | None = None
    started_ns: int = 0
    """When it was taken off the queue."""
    launched: Launched | None = None
    error: Exception | None = None
    """Why it could not be launched."""


def _STOP() -> None:
    """The job that ends the thread."""


def compute_thread(num_threads: int | None = None) -> Executor:
    """The one thread of a shard that computes: everything that touches the device, from joining and loading on.

    OpenMP keeps a team of workers for every thread that has ever computed, and once the teams of a process are larger
    than the machine, workers sleep between two operators instead of spinning: on 2 cores, a model loaded on another
    thread made each decode step of a 135M model take 45 ms instead of 25. CUDA's current device is a thread's, too.
    ``num_threads``: of one operator; None leaves it to OMP_NUM_THREADS.
    """

    def begin() -> None:
        if num_threads is not None:
            torch.set_num_threads(num_threads)

    return ThreadPoolExecutor(1, thread_name_prefix="compute", initializer=begin)


class Engine:
    """Runs steps on a thread of its own. ``start`` once, ``stop`` once; all other methods from any thread."""

    def __init__(
        self,
        runner: ModelRunner,
        plan: Planner,
        *,
        block_size: int,
        prefill_logprobs: bool = False,
        is_leader: bool = True,
        broadcast: Broadcast | None = None,
        run_ahead: bool | None = None,
        verify_plan: bool | None = None,
        compute: Executor | None = None,
        guidance: Guidance | None = None,
        watermark: Watermark = DEFAULT_WATERMARK,
    ) -> None:
        """``run_ahead``: launch a queued step before the results of the one before it are read; None: on CUDA.

        ``verify_plan``: run one step of the largest shape once the cache is allocated; None: on CUDA, for one rank.
        ``broadcast``: to the other ranks; None: there are none.
        ``compute``: the thread that loaded ``runner``, if it is not to be a new one.
        """
        self._runner = runner
        self._plan = plan
        self._block_size = block_size
        self._prefill_logprobs = prefill_logprobs
        self._is_leader = is_leader
        self._guidance = guidance
        self._watermark = watermark
        self._broadcast = broadcast
        self._run_ahead = runner.info.device.type == "cuda" if run_ahead is None else run_ahead
        # Ranks may plan different numbers of blocks, and in steps of different shapes they would wait for each other.
        self._verify_plan = (
            runner.info.device.type == "cuda" and broadcast is None if verify_plan is None else verify_plan
        )
        self._compute = compute or compute_thread()
        self._running: Future[None] | None = None
        self._jobs: queue.SimpleQueue[_StepJob | Callable[[], None]] = queue.SimpleQueue()

        self._executor: StepExecutor | None = None
        self._kv_plan: tuple[WarmupLimits, KVPlan] | None = None
        self._epoch = 0
        self._announced_epoch = 0  # set at once by clear(), so that steps still queued are not executed in vain
        self._failure: str | None = None
        self._launched_step_id = 0
        self._ended_step_id = 0
        self._progress_ns: int | None = None  # time of the last sign of progress; None when idle
        self._ended_ns: int | None = None

    def start(self) -> Future[None]:
        """Begin. The future has the error after which this process cannot go on, if there is one."""
        self._running = self._compute.submit(self._run)
        return self._running

    def stop(self, timeout_s: float) -> bool:
        """End once all that is queued has run; whether that was in time."""
        assert self._running is not None, "start comes first"
        self._jobs.put(_STOP)
        try:
            self._running.exception(timeout_s)
        except TimeoutError:
            return False
        return True

    def submit(self, step: Step, deliver: Deliver) -> None:
        """Queue a step. ``deliver`` gets its result on the engine thread, in the order of the steps; never raises."""
        self._jobs.put(_StepJob(step, deliver))

    def refuse(self, epoch: int, step_id: int, error: ShardError, deliver: Deliver) -> None:
        """Queue a step that could not even be read: it fails in its turn, and its epoch with it."""
        self._jobs.put(_StepJob(Step(epoch, step_id), deliver, error))

    def clear(self, epoch: int) -> Future[None]:
        """Drop every sequence and begin ``epoch``. The future raises StaleEpoch if it is not a new one."""
        if self._is_alone:  # several ranks all have to take the steps that any of them takes
            self._announced_epoch = max(self._announced_epoch, epoch)
        return self._call(lambda: self._clear(epoch))

    def warm_up(self, limits: WarmupLimits) -> Future[KVPlan]:
        """Size and allocate the KV cache. The future raises NotEnoughMemory when the limits do not fit."""
        return self._call(lambda: self._warm_up(limits))

    def note_progress(self) -> None:
        """Called by whatever advances a step: a layer, a pass."""
        if self._progress_ns is not None:
            self._progress_ns = time.monotonic_ns()

    def health(self) -> EngineHealth:
        progress_ns, executor, kv_plan = self._progress_ns, self._executor, self._kv_plan
        return EngineHealth(
            epoch=self._epoch,
            last_step_id=self._ended_step_id,
            progress_age_ns=0 if progress_ns is None else max(1, time.monotonic_ns() - progress_ns),
            num_sequences=0 if executor is None else len(executor.batch),
            num_blocks=0 if kv_plan is None else kv_plan[1].num_blocks,
        )

    @property
    def _is_alone(self) -> bool:
        return self._broadcast is None

    def _call(self, function: Callable[[], T]) -> Future[T]:
        """Queue a function. Its future can be cancelled until it runs, and it never does then."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except BaseException as error:  # its place is with the caller, not on this thread
                future.set_exception(error)

        self._jobs.put(run)
        return future

    # -- on the engine thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        pending: _StepJob | None = None  # launched, and not read yet
        with torch.inference_mode():
            while True:
                job = self._next_job(wait=pending is None)
                if isinstance(job, _StepJob):
                    self._launch(job, pending)
                    if pending is not None:
                        self._finish(pending, is_last=job.launched is None)
                    pending = job if self._run_ahead and job.launched is not None else None
                    if pending is None:
                        self._finish(job)
                    continue
                if pending is not None:
                    self._finish(pending)
                    pending = None
                if job is _STOP:
                    return
                if job is not None:
                    job()

    def _next_job(self, *, wait: bool) -> _StepJob | Callable[[], None] | None:
        """The next job; None when there is none and ``wait`` is off, because a step in flight wants to be read."""
        try:
            return self._jobs.get(block=wait)
        except queue.Empty:
            return None

    def _launch(self, job: _StepJob, previous: _StepJob | None) -> None:
        """Put a step on the device, behind ``previous`` if that one is not read yet."""
        now = job.started_ns = time.monotonic_ns()
        try:
            executor = self._accept(job.step)
            if job.refusal is not None:
                raise job.refusal
            self._progress_ns = now
            launched = executor.launch(job.step, None if previous is None else previous.launched)
        except Exception as error:
            job.error = error
            return
        if previous is None and self._ended_ns is not None:
            launched.timings.idle_ns = now - self._ended_ns
        self._launched_step_id = job.step.step_id
        job.launched = launched

    def _accept(self, step: Step) -> StepExecutor:
        if step.epoch != self._epoch or step.epoch < self._announced_epoch:
            raise StaleEpoch(f"epoch {step.epoch} is over, this shard is in {max(self._epoch, self._announced_epoch)}")
        if self._failure is not None:
            raise StaleEpoch(f"epoch {step.epoch} ended with a failed step ({self._failure}); clear the cache first")
        if self._executor is None:
            raise InvalidStep("no KV cache yet: Warmup comes before the first step")
        if step.step_id != self._launched_step_id + 1:
            raise InvalidStep(f"step {step.step_id} arrived where {self._launched_step_id + 1} was due")
        return self._executor

    def _finish(self, job: _StepJob, *, is_last: bool = True) -> None:
        """Deliver the result of a step, or why it has none; ``is_last``: no other one is on the device.

        Raises: the step's error, if no step can follow it.
        """
        error: Exception | None = None
        try:
            result = self._collect(job)
        except Exception as caught:
            error, result = caught, self._failed(job.step, caught)
        else:
            self._ended_step_id = result.step_id
        before_ns = job.started_ns if self._ended_ns is None else self._ended_ns
        self._ended_ns = time.monotonic_ns()
        self._progress_ns = None if is_last else self._ended_ns
        timings = result.timings
        timings.total_ns = self._ended_ns - job.started_ns
        timings.overhead_ns = max(0, self._ended_ns - before_ns - timings.forward_ns - timings.sample_ns)
        job.deliver(result)
        if error is not None and self._is_fatal(error):
            raise error

    def _collect(self, job: _StepJob) -> StepResult:
        if job.error is not None:
            raise job.error
        if self._failure is not None:
            raise StaleEpoch(f"the step before it failed: {self._failure}")
        assert self._executor is not None and job.launched is not None
        return self._executor.collect(job.launched)

    def _failed(self, step: Step, error: Exception) -> StepResult:
        """The result of a step that failed; unless the step was of another epoch, this epoch ends with it."""
        out_of_memory = is_out_of_memory(error)
        message = OUT_OF_MEMORY if out_of_memory else STEP_FAILED
        cause = f"{type(error).__name__}: {error}"
        if isinstance(error, ShardError):
            message = cause = str(error)
        result = StepResult(step.epoch, step.step_id, failure=StepFailure(message, out_of_memory))
        if isinstance(error, StaleEpoch):
            return result
        logger.error("step %d of epoch %d failed: %s", step.step_id, step.epoch, cause)
        logger.debug("traceback of the failed step", exc_info=error)
        self._failure = message
        if self._executor is not None:
            self._executor.clear()
        # The traceback holds the frames, and they hold tensors: in the worst case those that were too many.
        error.__traceback__ = None
        if out_of_memory:
            _release_memory()
        return result

    def _is_fatal(self, error: Exception) -> bool:
        """Whether no step can follow: the device is unusable, or the other ranks wait in a collective for this one.

        What a step is refused for is the same on all ranks, and comes before any collective.
        """
        return isinstance(error, torch.AcceleratorError) or not (self._is_alone or isinstance(error, ShardError))

    def _clear(self, epoch: int) -> None:
        if epoch <= self._epoch:
            raise StaleEpoch(f"epoch {epoch} is not new, this shard is in {self._epoch}")
        if self._executor is not None:
            self._executor.clear()
        self._epoch, self._failure = epoch, None
        self._launched_step_id = self._ended_step_id = 0
        logger.debug("epoch %d begins", epoch)

    def _warm_up(self, limits: WarmupLimits) -> KVPlan:
        if self._kv_plan is not None:
            if self._kv_plan[0] == limits:
                return self._kv_plan[1]  # a router that came back asks again
            self._executor = self._kv_plan = None
            self._runner.release_kv_cache()
            _release_memory()
        try:
            plan = self._plan(self._runner, limits)
            self._runner.allocate_kv_cache(plan.num_blocks)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise NotEnoughMemory(f"the KV cache could not be allocated: {error}") from error
        info = self._runner.info
        sequence_limits = SequenceLimits(
            vocab_size=info.vocab_size,
            max_position_embeddings=info.max_position_embeddings,
            block_size=self._block_size,
            num_blocks=plan.num_blocks,
            prefill_logprobs=self._prefill_logprobs,
            embeds=info.hidden_size > 0,
        )
        self._executor = StepExecutor(
            self._runner,
            sequence_limits,
            is_leader=self._is_leader,
            broadcast=self._broadcast,
            on_progress=self.note_progress,
            guidance=self._guidance,
            watermark=self._watermark,
        )
        if self._verify_plan:
            self._verify(self._executor, limits, sequence_limits)
        self._kv_plan = (limits, plan)
        logger.debug("KV cache of %d blocks, %s", plan.num_blocks, plan.derivation)  # the router says it aloud
        return plan

    def _verify(self, executor: StepExecutor, limits: WarmupLimits, sequence_limits: SequenceLimits) -> None:
        """Raises: NotEnoughMemory where a step of the largest shape does not fit beside the cache."""
        step = largest_step(limits, sequence_limits)
        try:
            run(executor, step)
        except Exception as error:
            self._executor = None
            if not is_out_of_memory(error):
                raise
            error.__traceback__ = None  # it holds what was too much
            self._runner.release_kv_cache()
            _release_memory()
            raise NotEnoughMemory(
                f"the largest step, of {limits.max_batch_prefill_tokens} tokens, does not fit beside "
                f"{sequence_limits.num_blocks} blocks of KV cache; decrease `--max-batch-prefill-tokens` or "
                f"`--cuda-memory-fraction`"
            ) from None


def _release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
