"""`scheduling.backlog`: what a client is told that finds no place."""

import pytest
from text_generation_router.scheduling.backlog import COMEBACKS, MAX_RETRY_S, MIN_RETRY_S, Backlog, Departures


def every(interval_s: float, count: int = 10) -> Departures:
    departures = Departures()
    for number in range(count):
        departures.note(number * interval_s, num_left=5)
    return departures


def test_nothing_is_known_at_first() -> None:
    assert Departures().turn_away(0.0, 100) == MIN_RETRY_S


def test_it_is_the_time_in_which_those_ahead_leave() -> None:
    assert every(0.5).turn_away(5.0, 0) == 1
    assert every(0.5).turn_away(5.0, 10) == 5
    assert every(0.5).turn_away(5.0, 10_000) == MAX_RETRY_S


def test_requests_that_end_together_do_not_hide_the_pace() -> None:
    departures = Departures()
    for burst in range(4):
        departures.arrive(burst * 8.0)
        for left in reversed(range(16)):
            departures.note((burst + 1) * 8.0, num_left=left)
    assert departures.turn_away(32.0, 16) == 8


def test_those_who_were_turned_away_before_come_back_ahead() -> None:
    departures = every(0.5)
    told = [departures.turn_away(5.0, 0) for _ in range(40)]
    assert told == sorted(told)
    assert told[0] == 1
    assert told[-1] == 39 / COMEBACKS // 2 + 1
    # Once they are back, they are ahead of nobody.
    assert departures.turn_away(5.0 + told[-1], 0) == 1


def test_a_pause_says_nothing() -> None:
    departures = Departures()
    departures.note(0.0, num_left=1)
    departures.note(0.5, num_left=0)
    departures.arrive(100.0)
    departures.note(100.5, num_left=0)
    assert departures.turn_away(101.0, 4) == 2


def test_as_many_wait_as_may() -> None:
    full, free = (Backlog(lambda count=count: count, 2) for count in (2, 1))  # type: ignore[misc]
    assert full.is_full
    assert not free.is_full
    assert full.surplus(lambda: "abc") == "c", "the last come are the first to go"
    assert not full.surplus(lambda: "ab")
    assert not free.surplus(lambda: pytest.fail("nobody need be gathered"))


def test_without_a_limit_all_wait_that_are_let_in() -> None:
    backlog = Backlog(lambda: 1000, None)
    assert not backlog.is_full
    assert not backlog.surplus(lambda: list(range(1000)))
