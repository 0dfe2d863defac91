from __future__ import annotations

import pytest
from builders import queued
from text_generation_router.scheduling.queue import AdmissionHold, WaitingQueue, admission_hold


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
    queue.append(second)
    queue.put_back(first)
    assert list(queue) == [first, second]


def test_removing_what_does_not_wait_is_no_error() -> None:
    assert not WaitingQueue().remove(queued(1))
