from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_generation_router.scheduling import shares
from text_generation_router.scheduling.shares import INPUT_WEIGHT, OUTPUT_WEIGHT, Shares


def test_the_least_served_is_next_and_of_equals_the_first() -> None:
    counted = Shares()
    for tenant in "ab":
        counted.enter(tenant)
    assert counted.next_of("ab") == "a"
    assert counted.next_of("ba") == "b"
    counted.charge("a", input_tokens=1)
    assert counted.next_of("ab") == "b"
    counted.charge("b", output_tokens=1)
    assert counted.next_of("ab") == "a"


def test_nobody_saves_up_while_idle() -> None:
    counted = Shares()
    counted.enter("a")
    counted.charge("a", output_tokens=500)
    counted.enter("late")
    assert counted.served("late") == counted.served("a") == 500 * OUTPUT_WEIGHT


def test_who_comes_back_keeps_what_was_counted() -> None:
    counted = Shares()
    for tenant in "ab":
        counted.enter(tenant)
    counted.charge("a", input_tokens=90)
    counted.leave("a")
    counted.enter("a")
    assert counted.served("a") == 90 * INPUT_WEIGHT
    assert counted.next_of("ab") == "b"


def test_names_that_clients_make_up_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "MAX_REMEMBERED", 10)
    counted = Shares()
    counted.enter("stays")
    counted.charge("stays", output_tokens=7)
    for number in range(100):
        counted.enter(number)
        counted.charge(number, output_tokens=1)
        counted.leave(number)
    assert len(counted._served) <= 11
    assert counted.served("stays") == 7 * OUTPUT_WEIGHT
    assert counted.num_active == 1


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 50)), min_size=1, max_size=200))
def test_backlogged_tenants_are_never_further_apart_than_two_requests(work: list[tuple[int, int]]) -> None:
    """The bound of the paper: with all of them backlogged, counters differ by at most what is charged at once."""
    counted = Shares()
    for tenant in range(4):
        counted.enter(tenant)
    largest = max(size for _, size in work)
    for _, size in work:
        counted.charge(counted.next_of(range(4)), output_tokens=size)
        counters = [counted.served(tenant) for tenant in range(4)]
        assert max(counters) - min(counters) <= largest * OUTPUT_WEIGHT


@given(st.lists(st.tuples(st.sampled_from(["enter", "leave", "charge"]), st.integers(0, 3)), max_size=200))
def test_the_least_served_of_the_active_never_falls_behind(events: list[tuple[str, int]]) -> None:
    counted = Shares()
    active: list[int] = []
    floor = 0.0
    for kind, tenant in events:
        if kind == "enter":
            counted.enter(tenant)
            active.append(tenant)
        elif tenant in active:
            if kind == "leave":
                counted.leave(tenant)
                active.remove(tenant)
            else:
                counted.charge(tenant, output_tokens=3)
        assert counted.num_active == len(set(active))
        if active:
            lowest = min(counted.served(each) for each in active)
            assert lowest >= floor
            floor = lowest
