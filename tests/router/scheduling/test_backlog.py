from __future__ import annotations

from text_generation_router.scheduling.backlog import MAX_RETRY_S, MIN_RETRY_S, Departures


def test_without_anything_known_it_is_soon() -> None:
    assert Departures().retry_after_s(100) == MIN_RETRY_S


def test_it_grows_with_who_waits() -> None:
    departures = Departures()
    for now in range(20):
        departures.note(now * 0.5, num_left=3)
    assert departures.retry_after_s(0) == 1
    assert departures.retry_after_s(10) == 5
    assert departures.retry_after_s(10_000) == MAX_RETRY_S


def test_a_pause_without_requests_is_no_slowness() -> None:
    departures = Departures()
    departures.note(0.0, num_left=1)
    departures.note(0.5, num_left=0)
    departures.note(1000.0, num_left=1)
    departures.note(1000.5, num_left=0)
    assert departures.retry_after_s(4) == 2
