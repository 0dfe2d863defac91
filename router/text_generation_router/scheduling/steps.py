"""Which rows the next step computes: decode rows, prompt chunks, admissions, pre-emption.

A state machine without I/O: the batcher sends what `plan` returns and tells it what has ended.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from text_generation_router.scheduling.budget import BatchLimits
from text_generation_router.scheduling.costs import StepCosts, StepTime, StepWork
from text_generation_router.scheduling.leases import Lease, Leases
from text_generation_router.scheduling.queue import AdmissionHold, WaitingQueue
from text_generation_router.scheduling.requests import QueuedRequest

NOBODY = object()
CREDIT = 4.0
"""Requests by which a tenant has to be ahead of another that has no room, before one of its own is stopped for it."""
TRIAL_TOKENS = 2
"""What a suspect has to bring, computed alone: one behind its prompt, and one of a step like all that follow."""


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
    num_taken: int = 0
    """Tokens that results have brought since it was let in."""

    @property
    def num_unsent(self) -> int:
        return len(self.token_ids) - self.num_sent

    @property
    def may_decode(self) -> bool:
        """Whether another decode row can be useful: past the maximum length it never is."""
        # Asked once a token: a property of a property would cost as much again.
        return self.num_outputs_sent < self.queued.request.max_new_tokens and len(self.token_ids) == self.num_sent

    @property
    def num_tokens_after_decode(self) -> int:
        """Tokens in the KV cache once one more decode row has run: its input is the last token sampled so far."""
        return len(self.queued.request.input_ids) + self.num_outputs_sent


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

    def sequences(self) -> Iterator[RunningSequence]:
        """Those that it computes."""
        yield from self.decodes
        yield from (sequence for sequence, _ in self.chunks)

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

    def __init__(
        self,
        limits: BatchLimits,
        leases: Leases,
        hold: AdmissionHold | None = None,
        *,
        fair_shares: bool = True,
    ) -> None:
        self.limits = limits
        self.leases = leases
        self.costs = StepCosts()
        self.waiting = WaitingQueue(fair_shares=fair_shares)
        self.running: dict[int, RunningSequence] = {}
        self._hold = hold
        self._drops: list[int] = []
        self._next_sequence_id = 1
        self._waiting_tokens = 1
        self._blocks_ran_dry = False
        self._cache_grew = False
        """Since a prompt was last looked up that had been let in already."""
        self._next_is_held_up = False
        """Whether whose turn it is did not fit into the last step."""
        self._on_trial: RunningSequence | None = None
        """A suspect: nothing is computed beside it."""

    def plan(self, *, num_in_flight: int) -> StepPlan | None:
        """The next step, or None when there is nothing to compute before a result or a request arrives.

        ``num_in_flight`` steps are sent and their results not applied. A victim is chosen only when there are none:
        until then nobody knows which sequences are about to end by themselves.
        """
        plan = StepPlan(drops=self._drops)
        self._end_trial()
        if num_in_flight == 0:
            self._preempt_until_decodes_fit(plan)
            self._preempt_for_shares(plan)
        elif self._blocks_ran_dry or self._victim_over_share() is not None:
            return None
        self._add_decodes(plan)
        self._add_chunks(plan, num_in_flight)
        if plan.is_empty:
            return None
        self._drops = []
        self._waiting_tokens += bool(plan.decodes and not plan.new_sequences)
        return plan

    def took_token(self, sequence: RunningSequence) -> None:
        """A result has brought the sequence's next token: all before it is computed, and was finite."""
        is_first, queued = sequence.num_verified == 0, sequence.queued
        sequence.num_verified = len(queued.request.input_ids) + len(queued.output_ids) - 1
        sequence.num_taken += 1
        self.waiting.shares.charge(self.waiting.tenant_of(queued), output_tokens=1)
        if is_first:  # its prompt may be the prompt of others that come while it runs, or have come with it
            self.leases.enter(sequence.lease, sequence.token_ids, sequence.num_verified)
            self._cache_grew = True

    def finish(self, sequence: RunningSequence, *, keep: bool = True) -> None:
        """End a running sequence, and have the shards drop it; twice is harmless.

        What it has computed is kept for others as long as there is room, but for one that failed.
        """
        if self._stop(sequence, keep=keep):
            self.waiting.leave(sequence.queued)

    def cancel(self, queued: QueuedRequest) -> None:
        """Forget a request wherever it is."""
        if self.waiting.remove(queued):
            return
        for sequence in self.running.values():
            if sequence.queued is queued:
                self.finish(sequence)
                return

    def abandon_epoch(self) -> list[QueuedRequest]:
        """Give back all blocks without telling the shards, whose state is gone; returns the requests that ran, in the
        order in which they were let in. Each is to be put back or forgotten."""
        lost = [sequence.queued for sequence in self.running.values()]
        for sequence in self.running.values():
            self.leases.give_back(sequence.lease)
        self.leases.forget()
        self.running.clear()
        self._drops = []
        self._blocks_ran_dry = self._next_is_held_up = False
        self._on_trial = None
        return lost

    def put_back(self, requests: Iterable[QueuedRequest]) -> None:
        """Requests that ran wait again, to go on from where they were."""
        for queued in requests:
            self.waiting.put_back(queued)

    def forget(self, queued: QueuedRequest) -> None:
        """A request that ran will not be put back. Harmless for one that is not known."""
        self.waiting.leave(queued)

    def halve_prefill_budget(self) -> int:
        """Take in fewer tokens of prompts in a step from now on; returns how many."""
        budget = max(self.limits.max_batch_prefill_tokens // 2, 1)
        self.limits = replace(self.limits, max_batch_prefill_tokens=budget)
        return budget

    def run_at_most(self, num_sequences: int) -> int:
        """Run no more than so many from now on, at least one; returns how many."""
        size = max(min(num_sequences, self.limits.max_batch_size or num_sequences), 1)
        self.limits = replace(self.limits, max_batch_size=size)
        return size

    @property
    def num_running_tokens(self) -> int:
        """Tokens that the blocks of the running sequences can hold."""
        return self.leases.num_used * self.leases.block_size

    def _add_decodes(self, plan: StepPlan) -> None:
        """Give every finished prompt a decode row, and a block where it outgrows its table."""
        self._blocks_ran_dry = False
        block_size = self.leases.block_size
        for sequence in self.running.values():
            if not sequence.may_decode:
                continue
            if sequence.num_tokens_after_decode > len(sequence.lease.table) * block_size:
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
            victim = self._victim(self._held())
            assert victim is not None, "more than one runs"
            self._preempt(victim, plan)
        self._blocks_ran_dry = False

    def _preempt_for_shares(self, plan: StepPlan) -> None:
        """Make room for the next in line at the cost of a tenant that holds more than its share."""
        while (victim := self._victim_over_share()) is not None:
            self._preempt(victim, plan)

    def _victim_over_share(self) -> RunningSequence | None:
        """Whom to stop, if the next in line has no room, and its tenant is entitled to some: it stays within its share
        of the room and another does not, or it has been served that much less."""
        queued = self.waiting.first()
        num_active = self.waiting.shares.num_active
        if not self._next_is_held_up or queued is None or num_active < 2 or queued.is_suspect or not self.running:
            return None
        needed = self.leases.blocks_for(queued.num_tokens) + 1
        places = self.limits.max_batch_size
        lacks_place = places is not None and len(self.running) >= places
        growth = sum(self._missing(each) for each in self.running.values() if each.may_decode)
        if not lacks_place and self.leases.num_available >= needed + growth + len(self.running):
            return None
        held = self._held(in_places=lacks_place)
        share = ((places or 0) if lacks_place else self.leases.num_blocks) / num_active
        tenant = self.waiting.tenant_of(queued)
        victim = self._victim(held, spared=tenant)
        if victim is None:
            return None
        other = self.waiting.tenant_of(victim.queued)
        # Who has been served less all the time may come with several at once.
        shares = self.waiting.shares
        if shares.served(other) - shares.served(tenant) > CREDIT * shares.cost(queued):
            return victim
        stays_within = held[tenant] + (1 if lacks_place else needed) <= share
        return victim if stays_within and held[other] > share else None

    def _victim(self, held: Counter[Hashable], *, spared: Hashable = NOBODY) -> RunningSequence | None:
        """Whom to stop: of the tenant that holds most, of the lowest priority, the newest; never the oldest of all, and
        nobody of ``spared``."""
        _, *others = self.running.values()
        # Of equals `min` takes the first: the newest.
        return min(
            (each for each in reversed(others) if self.waiting.tenant_of(each.queued) != spared),
            key=lambda each: (-held[self.waiting.tenant_of(each.queued)], each.queued.request.priority),
            default=None,
        )

    def _held(self, *, in_places: bool = False) -> Counter[Hashable]:
        """Blocks, or places in the batch, that each tenant holds."""
        held: Counter[Hashable] = Counter()
        for sequence in self.running.values():
            held[self.waiting.tenant_of(sequence.queued)] += 1 if in_places else len(sequence.lease.table)
        return held

    def _preempt(self, victim: RunningSequence, plan: StepPlan) -> None:
        self._stop(victim, keep=True)
        self.waiting.put_back(victim.queued)
        plan.num_preempted += 1

    def _stop(self, sequence: RunningSequence, *, keep: bool) -> bool:
        """Give back what a sequence holds and have the shards drop it; False if it does not run."""
        if self.running.pop(sequence.sequence_id, None) is None:
            return False
        if sequence is self._on_trial:
            self._on_trial = None
        if keep:
            queued = sequence.queued
            self.leases.enter(sequence.lease, queued.request.input_ids + queued.output_ids, sequence.num_verified)
        # Steps run in order: a step already sent may still write to these blocks, but every step that could hand
        # them to somebody else comes later and carries the drop.
        self.leases.give_back(sequence.lease)
        self._drops.append(sequence.sequence_id)
        return True

    def _end_trial(self) -> None:
        """A suspect that has brought its tokens is none any more; it makes room for the next one."""
        sequence = self._on_trial
        if sequence is None or sequence.num_taken < TRIAL_TOKENS:
            return
        sequence.queued.num_crashes = 0
        if (following := self.waiting.first()) is not None and following.is_suspect:
            self._stop(sequence, keep=True)
            self.waiting.put_back(sequence.queued)
        self._on_trial = None

    def _missing(self, sequence: RunningSequence) -> int:
        """Blocks that its next decode row needs and its table lacks."""
        return max(self.leases.blocks_for(sequence.num_tokens_after_decode) - len(sequence.lease.table), 0)

    def _add_chunks(self, plan: StepPlan, num_in_flight: int) -> None:
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
        while budget > 0 and (newcomer := self._admit(num_in_flight)) is not None:
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

    def _admit(self, num_in_flight: int) -> RunningSequence | None:
        """Start the first waiting request if it fits; a later, smaller one never overtakes it: it would starve."""
        queued = self.waiting.first()
        if queued is None or self._blocks_ran_dry or self._on_trial is not None:
            return None
        if queued.is_suspect and (self.running or num_in_flight):
            return None
        if self.limits.max_batch_size is not None and len(self.running) >= self.limits.max_batch_size:
            self._next_is_held_up = True
            return None
        token_ids = queued.request.input_ids + queued.output_ids
        lease = self.leases.take(
            token_ids,
            salt=queued.request.cache_salt,
            reuse=not queued.request.reads_whole_prompt,
            # Leave every running sequence its next block, else the newcomer is the next victim.
            spare=len(self.running),
        )
        self._next_is_held_up = lease is None
        if lease is None:
            return None
        self.waiting.pop()
        sequence = RunningSequence(queued, token_ids, lease, num_outputs_sent=len(queued.output_ids))
        self._begin(sequence, lease)
        self._waiting_tokens = 1
        self.running[sequence.sequence_id] = sequence
        if queued.is_suspect:
            self._on_trial = sequence
        if not queued.is_charged:
            queued.is_charged = True
            tenant = self.waiting.tenant_of(queued)
            self.waiting.shares.charge(tenant, input_tokens=queued.num_prompt_tokens - lease.num_cached_tokens)
        return sequence
