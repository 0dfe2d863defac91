from __future__ import annotations

from collections import deque

import pytest
from builders import queued
from hypothesis import example, given, settings
from hypothesis import strategies as st
from text_generation_router.scheduling.blocks import BlockAllocator
from text_generation_router.scheduling.budget import BatchLimits
from text_generation_router.scheduling.costs import StepWork
from text_generation_router.scheduling.leases import Leases
from text_generation_router.scheduling.queue import AdmissionHold
from text_generation_router.scheduling.requests import QueuedRequest
from text_generation_router.scheduling.steps import StepPlan, StepScheduler


def scheduler(
    num_blocks: int = 64,
    block_size: int = 4,
    prefill: int = 16,
    batch_size: int | None = None,
    hold: AdmissionHold | None = None,
    caching: bool = False,
) -> StepScheduler:
    limits = BatchLimits(max_batch_prefill_tokens=prefill, max_batch_size=batch_size)
    return StepScheduler(limits, Leases(BlockAllocator(num_blocks, block_size), prefix_caching=caching), hold)


def plan(steps: StepScheduler, num_in_flight: int = 0) -> StepPlan:
    step = steps.plan(num_in_flight=num_in_flight)
    assert step is not None
    return step


def test_nothing_to_do_is_no_step() -> None:
    assert scheduler().plan(num_in_flight=0) is None


def test_a_prompt_is_sent_in_chunks_and_then_decoded() -> None:
    steps = scheduler(prefill=16)
    steps.waiting.append(queued(40, max_new_tokens=3))
    sizes = [plan(steps).chunks[0][1] for _ in range(3)]
    assert sizes == [16, 16, 8]
    assert [len(plan(steps).decodes) for _ in range(2)] == [1, 1]
    # Three tokens are on their way: a fourth row would lie past the maximum length.
    assert steps.plan(num_in_flight=2) is None


def test_decode_rows_come_first_and_count_against_the_budget() -> None:
    steps = scheduler(prefill=16)
    steps.waiting.append(queued(16))
    plan(steps)
    steps.waiting.append(queued(40))
    step = plan(steps)
    assert len(step.decodes) == 1
    assert [size for _, size in step.chunks] == [15]


def test_a_small_request_does_not_overtake_a_large_one() -> None:
    steps = scheduler(num_blocks=10, block_size=4, prefill=64)
    steps.waiting.append(queued(16))
    plan(steps)
    steps.waiting.append(queued(36))
    steps.waiting.append(queued(4))
    assert not plan(steps).new_sequences


def test_batch_size_limits_the_running_sequences() -> None:
    steps = scheduler(batch_size=2)
    for _ in range(3):
        steps.waiting.append(queued(2))
    assert len(plan(steps).new_sequences) == 2
    steps.finish(next(iter(steps.running.values())))
    assert len(plan(steps).new_sequences) == 1


def test_a_hold_keeps_requests_waiting_until_long_enough() -> None:
    steps = scheduler(hold=AdmissionHold(waiting_served_ratio=2.0, max_waiting_tokens=3))
    steps.waiting.append(queued(2, max_new_tokens=99))
    plan(steps)
    steps.waiting.append(queued(2))
    assert [len(plan(steps).new_sequences) for _ in range(3)] == [0, 0, 1]


def test_a_hold_that_ends_lets_in_all_that_fit() -> None:
    steps = scheduler(hold=AdmissionHold(waiting_served_ratio=2.0, max_waiting_tokens=3))
    steps.waiting.append(queued(2, max_new_tokens=99))
    plan(steps)
    for _ in range(5):  # more than twice what runs
        steps.waiting.append(queued(2, max_new_tokens=99))
    assert len(plan(steps).new_sequences) == 5
    for _ in range(3):
        steps.waiting.append(queued(2))
    assert [len(plan(steps).new_sequences) for _ in range(3)] == [0, 0, 3]


def test_what_a_finished_sequence_owned_is_free_and_the_shards_drop_it() -> None:
    steps = scheduler()
    steps.waiting.append(queued(9))
    sequence = plan(steps).new_sequences[0]
    steps.finish(sequence)
    steps.finish(sequence)
    assert steps.leases.num_used == 0
    assert plan(steps).drops == [sequence.sequence_id]
    assert steps.plan(num_in_flight=0) is None


def test_cancel_finds_a_request_wherever_it_is() -> None:
    steps = scheduler(batch_size=1)
    running, waiting = queued(5), queued(5)
    steps.waiting.append(running)
    steps.waiting.append(waiting)
    plan(steps)
    steps.cancel(waiting)
    steps.cancel(running)
    assert len(steps.waiting) == 0
    assert steps.leases.num_used == 0


def test_dry_blocks_preempt_the_newest_only_once_nothing_is_in_flight() -> None:
    steps = scheduler(num_blocks=6, block_size=4, prefill=64)
    old, new = queued(8, max_new_tokens=8), queued(7, max_new_tokens=8)
    steps.waiting.append(old)
    steps.waiting.append(new)
    while steps.plan(num_in_flight=1) is not None:
        pass
    assert list(steps.running.values())[-1].queued is new
    step = plan(steps, num_in_flight=0)
    assert step.num_preempted == 1
    assert [sequence.queued for sequence in steps.running.values()] == [old]
    assert len(step.drops) == 1
    assert list(steps.waiting) == [new]


def test_an_abandoned_epoch_owns_nothing() -> None:
    steps = scheduler()
    ran, waits = queued(5), queued(200)
    steps.waiting.append(ran)
    plan(steps)
    steps.waiting.append(waits)
    assert steps.abandon_epoch() == [ran]
    assert steps.leases.num_used == 0
    assert steps.plan(num_in_flight=0) is not None, "what waits is served in the new epoch"


class ObedientShard:
    """Keeps the shard's side of the contract and complains where a plan breaks it."""

    def __init__(self, steps: StepScheduler) -> None:
        self.steps = steps
        self.computed: dict[int, int] = {}
        self.known: dict[int, int] = {}
        self.tables: dict[int, list[int]] = {}

    def run(self, step: StepPlan) -> list[int]:
        """Returns the ids of the sequences that got a token."""
        for sequence_id in step.drops:
            del self.tables[sequence_id], self.known[sequence_id], self.computed[sequence_id]
        for sequence in step.new_sequences:
            self.tables[sequence.sequence_id] = []
            self.known[sequence.sequence_id] = len(sequence.token_ids)
            self.computed[sequence.sequence_id] = sequence.lease.num_cached_tokens
        rows = [(sequence.sequence_id, size) for sequence, size in step.chunks]
        rows += [(sequence.sequence_id, 1) for sequence in step.decodes]
        assert len(rows) == len(dict(rows)), "a sequence has one row in a step"
        yields = []
        for sequence_id, size in rows:
            self.computed[sequence_id] += size
            if self.computed[sequence_id] >= self.known[sequence_id]:
                yields.append(sequence_id)
        return yields


@settings(max_examples=200, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20), st.integers(0, 30)), min_size=1, max_size=12),
    num_blocks=st.integers(13, 40),
    prefill=st.integers(1, 40),
    batch_size=st.none() | st.integers(1, 4),
    cancels=st.sets(st.integers(0, 11), max_size=3),
    caching=st.booleans(),
    results_at_once=st.lists(st.integers(1, 2), min_size=1, max_size=7),
)
# The second computes what the first does too, and needs every block there is.
@example(
    requests=[(12, 1, 0), (22, 20, 0)],
    num_blocks=13,
    prefill=1,
    batch_size=None,
    cancels=set(),
    caching=True,
    results_at_once=[1],
)
def test_every_request_gets_exactly_its_tokens(
    requests: list[tuple[int, int, int]],
    num_blocks: int,
    prefill: int,
    batch_size: int | None,
    cancels: set[int],
    caching: bool,
    results_at_once: list[int],
) -> None:
    steps = scheduler(num_blocks=num_blocks, block_size=4, prefill=prefill, batch_size=batch_size, caching=caching)
    shard = ObedientShard(steps)
    arrivals = sorted(((at, queued(prompt, new)) for prompt, new, at in requests), key=lambda item: item[0])
    everyone: list[QueuedRequest] = [request for _, request in arrivals]
    leaving = [request for i, request in enumerate(everyone) if i in cancels]
    in_flight: deque[list[int]] = deque()
    for now in range(5000):
        while arrivals and arrivals[0][0] <= now:
            steps.waiting.append(arrivals.pop(0)[1])
        if now == 15:
            for request in leaving:
                steps.cancel(request)
                arrivals = [item for item in arrivals if item[1] is not request]
        step = steps.plan(num_in_flight=len(in_flight)) if len(in_flight) < 2 else None
        if step is not None:
            assert sum(size for _, size in step.chunks) + len(step.decodes) <= max(prefill, len(step.decodes) + 1)
            in_flight.append(shard.run(step))
        own = [block for sequence in steps.running.values() for block in sequence.lease.own]
        held_blocks = {block for sequence in steps.running.values() for block in sequence.lease.table}
        assert len(own) == len(set(own))
        assert len(held_blocks) <= steps.leases.num_used <= steps.leases.num_blocks
        for sequence in steps.running.values():
            held = len(sequence.lease.table) * 4
            assert shard.computed.get(sequence.sequence_id, 0) <= held, "no token without a slot"
        arrived = results_at_once[now % len(results_at_once)] if step is None or len(in_flight) == 2 else 0
        for sequence_id in [i for _ in range(min(arrived, len(in_flight))) for i in in_flight.popleft()]:
            running = steps.running.get(sequence_id)
            if running is None:
                continue
            running.queued.output_ids.append(7)
            steps.took_token(running)
            assert len(running.queued.output_ids) <= running.queued.request.max_new_tokens
            if len(running.queued.output_ids) == running.queued.request.max_new_tokens:
                steps.finish(running)
        if not (arrivals or steps.running or len(steps.waiting) or in_flight):
            break
    for request in everyone:
        if request not in leaving:
            assert len(request.output_ids) == request.request.max_new_tokens
    assert steps.leases.num_used == 0


def test_a_second_prompt_computes_only_what_the_first_did_not() -> None:
    steps = scheduler(prefill=64, caching=True)
    first, second = queued(40, max_new_tokens=2), queued(40)
    steps.waiting.append(first)
    sequence = plan(steps).new_sequences[0]
    first.output_ids.append(7)
    steps.took_token(sequence)
    steps.waiting.append(second)
    step = plan(steps)
    assert [size for _, size in step.chunks] == [4]
    assert step.new_sequences[0].lease.table[:9] == sequence.lease.table[:9]
    assert second.num_cached_tokens == 36


def test_a_prompt_is_shared_only_once_a_token_was_sampled_behind_it() -> None:
    steps = scheduler(prefill=64, caching=True)
    steps.waiting.append(queued(40))
    plan(steps)
    steps.waiting.append(queued(40))
    assert [size for _, size in plan(steps).chunks] == [40]


@pytest.mark.parametrize(("keep", "num_cached"), [(True, 40), (False, 36)])
def test_what_a_failed_request_has_generated_is_not_kept(keep: bool, num_cached: int) -> None:
    steps = scheduler(prefill=64, caching=True)
    first = queued(39, max_new_tokens=9)
    steps.waiting.append(first)
    sequence = plan(steps).new_sequences[0]
    for token in (40, 41, 42, 43):
        first.output_ids.append(token)
        steps.took_token(sequence)
    steps.finish(sequence, keep=keep)
    second = queued(60)
    steps.waiting.append(second)
    plan(steps)
    assert second.num_cached_tokens == num_cached


def test_a_pre_empted_request_finds_what_it_had_computed() -> None:
    steps = scheduler(num_blocks=8, block_size=4, prefill=64, caching=True)
    old, new = queued(12, max_new_tokens=20), queued(12, max_new_tokens=20)
    new.request.input_ids.reverse()
    sequences = []
    for request in (old, new):
        steps.waiting.append(request)
        sequences += plan(steps).new_sequences
        request.output_ids.append(7)
        steps.took_token(sequences[-1])
    for _ in range(12):
        step = plan(steps)
        for sequence in step.decodes:
            sequence.queued.output_ids.append(7)
            steps.took_token(sequence)
        if step.num_preempted:
            break
    assert list(steps.running.values()) == sequences[:1]
    steps.finish(sequences[0])
    (again,) = plan(steps).new_sequences
    assert again.queued is new
    assert again.lease.num_cached_tokens >= 12
    assert new.num_cached_tokens == 0


def running(steps: StepScheduler, num_decodes: int) -> None:
    """Streams that decode, and a machine on which a row costs 1 ms and a prompt token too."""
    steps.costs.observe(StepWork(num_decodes, 0, 0.0), 0.001 * num_decodes)
    steps.costs.observe(StepWork(num_decodes, 100, 50.0), 0.001 * (num_decodes + 100))
    for _ in range(num_decodes):
        steps.waiting.append(queued(2, max_new_tokens=100))
    while len(plan(steps).decodes) < num_decodes:
        pass


def test_a_long_prompt_is_cut_finer_while_others_run() -> None:
    steps = scheduler(num_blocks=1000, prefill=512)
    running(steps, 40)
    steps.waiting.append(queued(2000))
    sizes = [plan(steps).chunks[0][1] for _ in range(3)]
    assert sizes == [48, 48, 48]  # 61 of the 1 ms tokens would do, and products take 16 at once


def test_a_short_prompt_beside_a_long_one_does_not_wait_for_it() -> None:
    steps = scheduler(num_blocks=1000, prefill=512)
    running(steps, 40)
    steps.waiting.append(queued(2000))
    plan(steps)
    steps.waiting.append(queued(30))
    assert [size for _, size in plan(steps).chunks] == [48, 30]


def test_a_second_long_prompt_gets_what_time_is_left_and_those_behind_it_do_not_wait() -> None:
    steps = scheduler(num_blocks=2000, prefill=512)
    running(steps, 40)
    for size in (2000, 2000, 30):
        steps.waiting.append(queued(size))
    step = plan(steps)
    assert [size for _, size in step.chunks] == [48, 12, 30]
    assert len(step.new_sequences) == 3


def test_a_burst_with_a_common_beginning_computes_it_at_most_twice() -> None:
    steps = scheduler(num_blocks=5000, prefill=512, caching=True)
    running(steps, 8)
    burst = [queued(2000 + tail) for tail in range(8)]
    for request in burst:
        steps.waiting.append(request)
    computed, sent = 0, deque[StepPlan]()
    while not all(request.output_ids for request in burst):
        step = plan(steps, num_in_flight=len(sent))
        computed += sum(size for _, size in step.chunks)
        sent.append(step)
        if len(sent) < 2:  # one step is always planned before the result of the one before is known
            continue
        for sequence, _ in sent.popleft().chunks:
            if sequence.num_unsent == 0 and not sequence.queued.output_ids:
                sequence.queued.output_ids.append(7)
                steps.took_token(sequence)
    assert computed < 2 * 2100
    assert [request.num_cached_tokens >= 1996 for request in burst[1:]] == [True] * 7


def test_a_prompt_that_goes_on_from_what_another_computed_is_a_new_one_to_the_shards() -> None:
    steps = scheduler(num_blocks=64, prefill=16, caching=True)
    first, second = queued(24), queued(40)
    steps.waiting.append(first)
    plan(steps)
    steps.waiting.append(second)
    step = plan(steps)  # 8 of the first, 8 of the second
    assert [size for _, size in step.chunks] == [8, 8]
    one, two = steps.running.values()
    old_id = two.sequence_id
    first.output_ids.append(7)
    steps.took_token(one)
    step = plan(steps)
    assert step.drops == [old_id]
    assert step.new_sequences == [two]
    assert two.sequence_id in steps.running
    assert old_id not in steps.running
    assert two.lease.table[:6] == one.lease.table[:6]
    assert [size for sequence, size in step.chunks if sequence is two] == [15]  # up to 39: the first has a row
    assert second.num_cached_tokens == 24


def admit_all(steps: StepScheduler, *requests: QueuedRequest) -> StepPlan:
    for request in requests:
        steps.waiting.append(request)
    return plan(steps)


def bring_tokens(steps: StepScheduler) -> None:
    """Every running sequence gets the token of its last step."""
    for sequence in list(steps.running.values()):
        sequence.queued.output_ids.append(1)
        steps.took_token(sequence)


def test_suspects_are_computed_one_by_one_until_each_has_shown_that_it_is_none() -> None:
    steps = scheduler(prefill=64)
    suspects = [queued(4, max_new_tokens=9) for _ in range(2)]
    admit_all(steps, *suspects)
    assert steps.abandon_epoch() == suspects
    for suspect in suspects:
        suspect.num_crashes = 2
    steps.put_back(suspects)
    steps.waiting.append(innocent := queued(4, max_new_tokens=9))
    for suspect in suspects:
        step = steps.plan(num_in_flight=1)
        assert step is None or not list(step.sequences()), "something of another request may still be computed"
        first = plan(steps)
        assert [sequence.queued for sequence in first.new_sequences] == [suspect]
        bring_tokens(steps)
        second = plan(steps)
        assert [sequence.queued for sequence in second.sequences()] == [suspect]
        bring_tokens(steps)
    last = plan(steps)
    # The last one goes on where it is, the others join it.
    assert [sequence.queued for sequence in last.sequences()] == [suspects[1], suspects[0], innocent]
    assert [suspect.num_crashes for suspect in suspects] == [0, 0]


def test_a_suspect_that_ends_makes_room_for_the_next() -> None:
    steps = scheduler(prefill=64)
    suspects = [queued(4) for _ in range(2)]
    admit_all(steps, *suspects)
    for suspect in steps.abandon_epoch():
        suspect.num_crashes = 2
        steps.put_back([suspect])
    (sequence,) = plan(steps).new_sequences
    steps.finish(sequence)
    assert [each.queued for each in plan(steps).new_sequences] == [suspects[1]]


def test_who_holds_more_than_its_share_makes_room_for_who_holds_less() -> None:
    steps = scheduler(num_blocks=16, block_size=4, prefill=64)
    flood = [queued(12, max_new_tokens=20, tenant=b"a") for _ in range(4)]
    admit_all(steps, *flood)
    assert len(steps.running) == 4 or steps.waiting.first() is not None
    bring_tokens(steps)
    steps.waiting.append(rare := queued(12, max_new_tokens=4, tenant=b"b"))
    plan(steps)  # finds that there is no room
    assert steps.plan(num_in_flight=1) is None, "a victim is chosen when nothing is under way"
    step = plan(steps)
    assert rare in [sequence.queued for sequence in step.new_sequences]
    assert step.num_preempted >= 1
    # The oldest goes on.
    assert next(iter(steps.running.values())).queued is flood[0]


def test_within_ones_share_one_waits() -> None:
    steps = scheduler(num_blocks=16, block_size=4, prefill=64, batch_size=2)
    one, other = queued(4, max_new_tokens=20, tenant=b"a"), queued(4, max_new_tokens=20, tenant=b"b")
    admit_all(steps, one, other)
    bring_tokens(steps)
    steps.waiting.append(queued(4, tenant=b"b"))
    for _ in range(3):
        assert not plan(steps).num_preempted
        bring_tokens(steps)


def test_the_victim_has_the_lowest_priority_and_is_not_the_oldest() -> None:
    steps = scheduler(num_blocks=9, block_size=4, prefill=64)
    oldest = queued(7, max_new_tokens=9, priority=-10)
    low, normal = queued(7, max_new_tokens=9, priority=-1), queued(7, max_new_tokens=9)
    for request in (oldest, low, normal):
        admit_all(steps, request)
    victims = []
    for _ in range(4):
        bring_tokens(steps)
        before = {sequence.queued for sequence in steps.running.values()}
        if plan(steps).num_preempted:
            victims += list(before - {sequence.queued for sequence in steps.running.values()})
    assert victims == [low]


def test_steps_that_are_too_large_become_smaller() -> None:
    steps = scheduler(prefill=16)
    assert [steps.halve_prefill_budget() for _ in range(6)] == [8, 4, 2, 1, 1, 1]
    assert [size for _, size in admit_all(steps, queued(3)).chunks] == [1]
