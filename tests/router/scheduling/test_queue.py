from __future__ import annotations

import pytest
from builders import queued
from hypothesis import given
from hypothesis import strategies as st
from text_generation_router.scheduling.queue import AdmissionHold, WaitingQueue, admission_hold
from text_generation_router.scheduling.requests import QueuedRequest


def test_without_flags_nothing_is_held() -> None:
    assert admission_hold(None, None) is None


def test_a_flag_that_was_not_given_takes_the_default_beside_one_that_was() -> None:
    assert admission_hold(None, 7) == AdmissionHold(waiting_served_ratio=0.3, max_waiting_tokens=7)
    assert admission_hold(1.2, None) == AdmissionHold(waiting_served_ratio=1.2, max_waiting_tokens=20)


@pytest.mark.parametrize(
    ("num_waiting", "num_running", "decodes", "held"),
    [
        pytest.param(1, 0, 0, False, id="an idle server admits at once"),
        pytest.param(1, 4, 0, True, id="fewer than half of those running wait"),
        pytest.param(2, 4, 0, False, id="half of those running wait"),
        pytest.param(1, 4, 10, False, id="waited long enough"),
        pytest.param(1, 4, 9, True, id="not yet long enough"),
    ],
)
def test_hold(num_waiting: int, num_running: int, decodes: int, held: bool) -> None:
    hold = AdmissionHold(waiting_served_ratio=0.5, max_waiting_tokens=10)
    assert hold.holds(num_waiting=num_waiting, num_running=num_running, waiting_tokens=decodes) is held


def test_a_preempted_request_comes_back_at_the_front() -> None:
    queue = WaitingQueue()
    first, second = queued(1), queued(1)
    queue.append(first)
    assert queue.pop() is first
    queue.append(second)
    queue.put_back(first)
    assert list(queue) == [first, second]


def test_the_highest_priority_of_a_tenant_is_first_and_then_who_came_first() -> None:
    queue = WaitingQueue()
    low, high, later_high, normal = (queued(1, priority=priority) for priority in (-1, 5, 5, 0))
    for each in (low, high, later_high, normal):
        queue.append(each)
    assert [queue.pop() for _ in range(4)] == [high, later_high, normal, low]


def test_tenants_take_turns_by_what_they_were_served() -> None:
    queue = WaitingQueue()
    floods = [queued(1, tenant=b"a", priority=10) for _ in range(3)]
    for each in floods:
        queue.append(each)
    queue.shares.charge(b"a", output_tokens=10)
    rare = queued(1, tenant=b"b")
    queue.append(rare)
    queue.shares.charge(b"a", output_tokens=1)
    # No priority of one tenant makes another wait.
    assert queue.pop() is rare
    queue.shares.charge(b"b", output_tokens=100)
    assert queue.pop() is floods[0]


def test_without_fair_shares_it_is_who_came_first() -> None:
    queue = WaitingQueue(fair_shares=False)
    requests = [queued(1, tenant=tenant) for tenant in (b"a", b"a", b"b")]
    for each in requests:
        queue.append(each)
    queue.shares.charge(None, output_tokens=10)
    assert [queue.pop() for _ in requests] == requests


def test_suspects_go_ahead_of_everybody() -> None:
    queue = WaitingQueue()
    suspect, other = queued(1, priority=-10), queued(1, priority=10)
    for each in (suspect, other):
        queue.append(each)
    assert queue.pop() is other
    assert queue.pop() is suspect
    suspect.num_crashes = 2
    for each in (other, suspect):
        queue.put_back(each)
    assert queue.first() is suspect
    assert list(queue) == [suspect, other]


def test_a_tenant_is_active_as_long_as_a_request_of_it_waits_or_runs() -> None:
    queue = WaitingQueue()
    runs, waits = queued(1, tenant=b"a"), queued(1, tenant=b"a")
    for each in (runs, waits):
        queue.append(each)
    assert queue.pop() is runs
    assert queue.remove(waits)
    assert not queue.remove(runs)
    assert queue.shares.num_active == 1
    queue.leave(runs)
    queue.leave(runs)
    assert queue.shares.num_active == 0


@given(
    st.lists(
        st.tuples(st.sampled_from(["append", "pop", "put_back", "leave", "remove", "first"]), st.integers(0, 5)),
        max_size=300,
    ),
    st.booleans(),
)
def test_nothing_is_lost_and_nothing_doubled(events: list[tuple[str, int]], fair_shares: bool) -> None:
    queue = WaitingQueue(fair_shares=fair_shares)
    waiting: list[QueuedRequest] = []
    running: list[QueuedRequest] = []
    for kind, number in events:
        if kind == "append":
            request = queued(1, tenant=bytes([number % 3]), priority=number % 2)
            queue.append(request)
            waiting.append(request)
        elif kind == "pop" and waiting:
            popped = queue.pop()
            waiting.remove(popped)
            running.append(popped)
        elif kind == "put_back" and running:
            back = running.pop(number % len(running))
            back.num_crashes = number
            queue.put_back(back)
            waiting.append(back)
        elif kind == "leave" and running:
            queue.leave(running.pop(number % len(running)))
        elif kind == "remove" and waiting:
            assert queue.remove(waiting.pop(number % len(waiting)))
        else:
            first = queue.first()
            assert (first is None) is (not waiting)
        assert len(queue) == len(waiting)
        assert set(queue) == set(waiting)
        tenants = {each.request.tenant for each in (*waiting, *running)}
        assert queue.shares.num_active == (len(tenants) if fair_shares else bool(waiting or running))
    queue.clear()
    assert len(queue) == 0 and queue.first() is None


def test_removing_what_does_not_wait_is_no_error() -> None:
    assert not WaitingQueue().remove(queued(1))
