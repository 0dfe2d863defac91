"""Which rows the next step computes: decode rows, prompt chunks, admissions, pre-emption.

A state machine without I/O: the batcher sends what `plan` returns and tells it what has ended.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from text_generation_router.scheduling.budget import BatchLimits
from text_generation_router.scheduling.costs import StepCosts, StepTime, StepWork
from text_generation_router.scheduling.leases import Lease, Leases
from text_generation_router.scheduling.queue import AdmissionHold, WaitingQueue
from text_generation_router.scheduling.requests import QueuedRequest


@dataclass(slots=True, eq=False)
class RunningSequence:
    """A request that has blocks on the shards.

    Its counters run ahead of the results: they say what was sent, since the next step is planned before the
    result of the one before is known.
    """

    queued: QueuedRequest
    token_ids: list[int]
    """Prompt, and after a pre-emption the ids generated so far; what the shard computes before it samples."""
    lease: Lease
    sequence_id: int = 0
    num_sent: int = 0
    """Leading ``token_ids`` that were in the cache or have been sent for computation."""
    num_outputs_sent: int = 0
    """Output tokens that the steps sent so far yield, those from before a pre-emption included."""
    is_long: bool = False
    """Whether no single step can take in all that it has to compute before its first token."""
    num_verified: int = 0
    """Leading tokens that are computed, and that finite logits were computed from. This one runs behind the results."""

    @property
    def num_unsent(self) -> int:
        return len(self.token_ids) - self.num_sent

    @property
    def may_decode(self) -> bool:
        """Whether another decode row can be useful: past the maximum length it never is."""
        return self.num_unsent == 0 and self.num_outputs_sent < self.queued.request.max_new_tokens

    @property
    def num_tokens_after_decode(self) -> int:
        """Tokens in the KV cache once one more decode row has run: its input is the last token sampled so far."""
        return self.queued.num_prompt_tokens + self.num_outputs_sent


@dataclass(slots=True)
class StepPlan:
    """One step, in the order in which a shard reads it."""

    drops: list[int] = field(default_factory=list)
    new_sequences: list[RunningSequence] = field(default_factory=list)
    chunks: list[tuple[RunningSequence, int]] = field(default_factory=list)
    decodes: list[RunningSequence] = field(default_factory=list)
    additions: list[tuple[RunningSequence, list[int]]] = field(default_factory=list)
    concat_reason: str = "chunking"
    """Why newcomers may join now, as TGI's metric calls it."""
    num_preempted: int = 0
    """Running sequences that lost their blocks for this step; the shards see them as drops."""

    @property
    def is_empty(self) -> bool:
        return not (self.drops or self.new_sequences or self.chunks or self.decodes)

    @property
    def work(self) -> StepWork:
        """What it computes. The chunks are counted as sent already."""
        tokens = sum(size for _, size in self.chunks)
        before = sum(size * (sequence.num_sent - size / 2) for sequence, size in self.chunks)
        return StepWork(len(self.decodes), tokens, before / max(tokens, 1))


class StepScheduler:
    """Owns the waiting queue, the running sequences and their blocks."""

    def __init__(self, limits: BatchLimits, leases: Leases, hold: AdmissionHold | None = None) -> None:
        self.limits = limits
        self.leases = leases
        self.costs = StepCosts()
        self.waiting = WaitingQueue()
        self.running: dict[int, RunningSequence] = {}
        self._hold = hold
        self._drops: list[int] = []
        self._next_sequence_id = 1
        self._waiting_tokens = 1
        self._blocks_ran_dry = False
        self._cache_grew = False
        """Since a prompt was last looked up that had been let in already."""

    def plan(self, *, num_in_flight: int) -> StepPlan | None:
        """The next step, or None when there is nothing to compute before a result or a request arrives.

        ``num_in_flight`` steps are sent and their results not applied. A victim is chosen only when there are none:
        until then nobody knows which sequences are about to end by themselves.
        """
        plan = StepPlan(drops=self._drops)
        if num_in_flight == 0:
            self._preempt_until_decodes_fit(plan)
        elif self._blocks_ran_dry:
            return None
        self._add_decodes(plan)
        self._add_chunks(plan)
        if plan.is_empty:
            return None
        self._drops = []
        self._waiting_tokens += bool(plan.decodes and not plan.new_sequences)
        return plan

    def took_token(self, sequence: RunningSequence) -> None:
        """A result has brought the sequence's next token: all before it is computed, and was finite."""
        is_first = sequence.num_verified == 0
        sequence.num_verified = sequence.queued.num_tokens - 1
        if is_first:  # its prompt may be the prompt of others that come while it runs, or have come with it
            self.leases.enter(sequence.lease, sequence.token_ids, sequence.num_verified)
            self._cache_grew = True

    def finish(self, sequence: RunningSequence, *, keep: bool = True) -> None:
        """Give back what a running sequence holds and have the shards drop it; twice is harmless.

        What it has computed is kept for others as long as there is room, but for one that failed.
        """
        if self.running.pop(sequence.sequence_id, None) is None:
            return
        if keep:
            queued = sequence.queued
            self.leases.enter(sequence.lease, queued.request.input_ids + queued.output_ids, sequence.num_verified)
        # Steps run in order: a step already sent may still write to these blocks, but every step that could hand
        # them to somebody else comes later and carries the drop.
        self.leases.give_back(sequence.lease)
        self._drops.append(sequence.sequence_id)

    def cancel(self, queued: QueuedRequest) -> None:
        """Forget a request wherever it is."""
        if self.waiting.remove(queued):
            return
        for sequence in self.running.values():
            if sequence.queued is queued:
                self.finish(sequence)
                return

    def abandon_epoch(self) -> list[QueuedRequest]:
        """Give back all blocks without telling the shards, whose state is gone; returns the requests that ran."""
        lost = [sequence.queued for sequence in self.running.values()]
        for sequence in self.running.values():
            self.leases.give_back(sequence.lease)
        self.leases.forget()
        self.running.clear()
        self._drops = []
        self._blocks_ran_dry = False
        return lost

    @property
    def num_running_tokens(self) -> int:
        """Tokens that the blocks of the running sequences can hold."""
        return self.leases.num_used * self.leases.block_size

    def _add_decodes(self, plan: StepPlan) -> None:
        """Give every finished prompt a decode row, and a block where it outgrows its table."""
        self._blocks_ran_dry = False
        for sequence in self.running.values():
            if not sequence.may_decode:
                continue
            if sequence.num_tokens_after_decode > len(sequence.lease.table) * self.leases.block_size:
                missing = self._missing(sequence)
                new_blocks = self.leases.grow(sequence.lease, missing)
                if new_blocks is None:
                    self._blocks_ran_dry = True
                    continue
                plan.additions.append((sequence, new_blocks))
            sequence.num_outputs_sent += 1
            plan.decodes.append(sequence)

    def _preempt_until_decodes_fit(self, plan: StepPlan) -> None:
        """Take blocks from the newest sequences, never from the oldest, until every other one can go on."""
        while len(self.running) > 1:
            needed = sum(self._missing(sequence) for sequence in self.running.values() if sequence.may_decode)
            if needed <= self.leases.num_available:
                break
            victim = next(reversed(self.running.values()))
            self.finish(victim)
            self.waiting.put_back(victim.queued)
            plan.num_preempted += 1
        self._blocks_ran_dry = False

    def _missing(self, sequence: RunningSequence) -> int:
        """Blocks that its next decode row needs and its table lacks."""
        return max(self.leases.blocks_for(sequence.num_tokens_after_decode) - len(sequence.lease.table), 0)

    def _add_chunks(self, plan: StepPlan) -> None:
        """Fill the step with prompt chunks: sequences that began first, then admissions in arrival order."""
        self._take_up_cached(plan)
        budget = max(self.limits.max_batch_prefill_tokens - len(plan.decodes), 1)
        started = [sequence for sequence in self.running.values() if sequence.num_unsent]
        time = StepTime(
            self.costs,
            num_decodes=len(plan.decodes),
            num_prompts=len(started) + len(self.waiting),
            max_inter_token_latency_s=self.limits.max_inter_token_latency_s,
        )
        for sequence in started:
            budget -= self._add_chunk(plan, sequence, budget, time)
        if self._hold is not None:
            if self._is_held_back(self._hold):
                return
            plan.concat_reason = self._hold.reason(self._waiting_tokens)
        while budget > 0 and (newcomer := self._admit()) is not None:
            plan.new_sequences.append(newcomer)
            budget -= self._add_chunk(plan, newcomer, budget, time)

    def _take_up_cached(self, plan: StepPlan) -> None:
        """Let prompts go on from what another sequence has computed since they were let in.

        Requests with a common beginning often come together; all but the first would compute it again.
        """
        if not self._cache_grew:
            return
        self._cache_grew = False
        for sequence in list(self.running.values()):
            request = sequence.queued.request
            if sequence.num_unsent == 0 or request.reads_whole_prompt:
                continue
            lease = self.leases.retake(
                sequence.lease, sequence.token_ids, salt=request.cache_salt, num_sent=sequence.num_sent
            )
            if lease is None:
                continue
            # To the shards it is another sequence. What is under way for the old one is done in vain, before the drop.
            self._drops.append(sequence.sequence_id)
            self._begin(sequence, lease)
            plan.new_sequences.append(sequence)
        if plan.new_sequences:  # they keep their places: the newest are the first to be pre-empted
            self.running = {sequence.sequence_id: sequence for sequence in self.running.values()}

    def _begin(self, sequence: RunningSequence, lease: Lease) -> None:
        """Start it, or start it anew, with these blocks."""
        sequence.lease = lease
        sequence.num_sent = lease.num_cached_tokens
        sequence.sequence_id = self._next_sequence_id
        self._next_sequence_id += 1
        num_new = len(sequence.token_ids) - lease.num_cached_tokens
        sequence.is_long = num_new > self.limits.max_batch_prefill_tokens
        if not sequence.queued.output_ids:
            sequence.queued.num_cached_tokens = lease.num_cached_tokens

    def _add_chunk(self, plan: StepPlan, sequence: RunningSequence, budget: int, time: StepTime) -> int:
        """Take in as much of a prompt as the step has room and time for; returns how much."""
        wanted = min(sequence.num_unsent, budget)
        size = time.tokens(wanted, sequence.num_sent, is_long=sequence.is_long) if wanted else 0
        if size:
            plan.chunks.append((sequence, size))
            sequence.num_sent += size
            if sequence.num_unsent == 0:
                sequence.num_outputs_sent += 1
        return size

    def _is_held_back(self, hold: AdmissionHold) -> bool:
        """Whether all that wait stay outside in this step. Asked once a step: an open door is open for all that fit."""
        return hold.holds(
            num_waiting=len(self.waiting),
            num_running=len(self.running),
            waiting_tokens=self._waiting_tokens,
        )

    def _admit(self) -> RunningSequence | None:
        """Start the first waiting request if it fits; a later, smaller one never overtakes it: it would starve."""
        queued = self.waiting.first()
        if queued is None or self._blocks_ran_dry:
            return None
        if self.limits.max_batch_size is not None and len(self.running) >= self.limits.max_batch_size:
            return None
        token_ids = queued.request.input_ids + queued.output_ids
        lease = self.leases.take(
            token_ids,
            salt=queued.request.cache_salt,
            reuse=not queued.request.reads_whole_prompt,
            # Leave every running sequence its next block, else the newcomer is the next victim.
            spare=len(self.running),
        )
        if lease is None:
            return None
        self.waiting.pop()
        sequence = RunningSequence(queued, token_ids, lease, num_outputs_sent=len(queued.output_ids))
        self._begin(sequence, lease)
        self._waiting_tokens = 1
        self.running[sequence.sequence_id] = sequence
        return sequence
