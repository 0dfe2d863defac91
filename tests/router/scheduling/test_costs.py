from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_generation_router.scheduling.costs import (
    LEAST_TOKENS,
    MARGIN,
    STRETCH,
    UNKNOWN_TOKENS,
    StepCosts,
    StepTime,
    StepWork,
)


def step_s(work: StepWork) -> float:
    """A machine: 10 ms a step and 1 ms a row, and prompt tokens of 0.1 ms that double after 1,000 others."""
    return 0.01 + 0.001 * work.num_decodes + 1e-4 * work.num_prompt_tokens * (1 + work.context / 1000)


def learned(num_steps: int = 200, seed: int = 0) -> StepCosts:
    choose = random.Random(seed)
    costs = StepCosts()
    for _ in range(num_steps):
        rows = choose.choice([1, 4])
        costs.observe(StepWork(rows, 0, 0.0), step_s(StepWork(rows, 0, 0.0)))
        work = StepWork(rows, choose.randint(16, 256), choose.uniform(0, 3000))
        costs.observe(work, step_s(work))
    return costs


def time(costs: StepCosts, *, num_decodes: int = 4, num_prompts: int = 1, limit_s: float | None = None) -> StepTime:
    return StepTime(costs, num_decodes=num_decodes, num_prompts=num_prompts, max_inter_token_latency_s=limit_s)


@pytest.mark.parametrize("start", [0, 500, 2500])
def test_what_was_learned_predicts_the_next_step(start: int) -> None:
    costs = learned()
    assert costs.decode_s(4) == pytest.approx(0.014, rel=0.01)
    assert costs.prompt_s(100, start) == pytest.approx(100 * 1e-4 * (1 + (start + 50) / 1000), rel=0.05)
    for work in (StepWork(4, 0, 0.0), StepWork(4, 100, start + 50)):
        assert costs.step_s(work) == pytest.approx(step_s(work), rel=0.05)


def test_a_number_of_rows_that_has_not_run_is_taken_for_the_nearest_that_has() -> None:
    costs = learned()
    assert costs.decode_s(32) == costs.decode_s(4)
    assert StepCosts().decode_s(1) is None
    assert StepCosts().step_s(StepWork(1, 10, 0.0)) == 0


@pytest.mark.parametrize("start", [0, 1000, 2900])
@pytest.mark.parametrize("num_decodes", [1, 4])
def test_a_piece_of_a_long_prompt_keeps_a_step_within_its_stretch(start: int, num_decodes: int) -> None:
    costs = learned()
    size = time(costs, num_decodes=num_decodes).tokens(3000, start, is_long=True)
    quiet = step_s(StepWork(num_decodes, 0, 0))
    took = step_s(StepWork(num_decodes, size, start + size / 2))
    assert LEAST_TOKENS <= size < 3000
    factor = max(1.0, 2 / num_decodes)
    assert took - quiet <= (STRETCH - 1) * quiet * factor
    assert took - quiet >= 0.4 * (STRETCH - 1) * quiet * factor


def test_with_nobody_waiting_for_a_token_nothing_is_cut() -> None:
    assert time(learned(), num_decodes=0).tokens(3000, 0, is_long=True) == 3000


def test_short_prompts_are_not_cut_but_long_ones_beside_them_get_less() -> None:
    step = time(learned())
    assert step.tokens(512, 0, is_long=False) == 512
    assert step.tokens(3000, 0, is_long=True) == LEAST_TOKENS


def test_one_long_prompt_of_a_step_goes_on_whatever_it_costs_and_the_next_waits() -> None:
    step = time(learned(), limit_s=0.001)
    assert step.tokens(3000, 0, is_long=True) == LEAST_TOKENS
    assert step.tokens(3000, 0, is_long=True) == 0


def test_the_last_tokens_of_a_prompt_are_not_held_back() -> None:
    assert time(learned(), limit_s=0.001).tokens(3, 3000, is_long=True) == 3


def test_the_more_wait_for_their_first_token_the_longer_the_others_wait_for_their_next() -> None:
    sizes = [time(learned(), num_prompts=each).tokens(10_000, 0, is_long=True) for each in (1, 2, 4, 8, 28)]
    assert sizes == sorted(sizes)
    assert sizes[0] == sizes[1] < sizes[2]


@pytest.mark.parametrize("limit_s", [0.03, 0.1])
@pytest.mark.parametrize("is_long", [True, False])
def test_a_latency_that_was_asked_for_bounds_all_prompts(limit_s: float, is_long: bool) -> None:
    size = time(learned(), num_prompts=28, limit_s=limit_s).tokens(3000, 500, is_long=is_long)
    took = step_s(StepWork(4, size, 500 + size / 2))
    assert MARGIN * 0.7 * limit_s <= took <= limit_s


def test_as_long_as_nothing_is_known_pieces_are_small() -> None:
    assert time(StepCosts(), limit_s=1.0).tokens(3000, 0, is_long=False) == UNKNOWN_TOKENS


def test_a_hiccup_is_not_taken_for_the_rule() -> None:
    costs = learned()
    before = costs.prompt_s(100, 1000)
    costs.observe(StepWork(4, 100, 1000.0), 30.0)
    costs.observe(StepWork(4, 0, 0.0), 30.0)
    assert costs.prompt_s(100, 1000) < 2 * before
    assert (costs.decode_s(4) or 0) < 2 * 0.014


def test_a_machine_that_has_become_slower_is_noticed() -> None:
    costs = learned()
    for _ in range(60):
        costs.observe(StepWork(4, 0, 0.0), 0.05)
        costs.observe(StepWork(4, 100, 1000.0), 0.05 + 0.1)
    assert costs.decode_s(4) == pytest.approx(0.05, rel=0.05)
    assert costs.prompt_s(100, 1000) == pytest.approx(0.1, rel=0.1)


@given(
    steps=st.lists(
        st.tuples(st.integers(0, 300), st.integers(0, 5000), st.floats(0, 1e5), st.floats(0, 100)), max_size=30
    ),
    wanted=st.integers(1, 5000),
    start=st.integers(0, 100_000),
    limit_s=st.none() | st.floats(0.001, 10),
)
def test_whatever_was_measured_a_prompt_goes_on(
    steps: list[tuple[int, int, float, float]], wanted: int, start: int, limit_s: float | None
) -> None:
    costs = StepCosts()
    for num_decodes, num_prompt_tokens, context, seconds in steps:
        costs.observe(StepWork(num_decodes, num_prompt_tokens, context), seconds)
    assert math.isfinite(costs.prompt_s(wanted, start))
    assert costs.prompt_s(wanted, start) >= 0
    size = time(costs, limit_s=limit_s).tokens(wanted, start, is_long=True)
    assert min(wanted, LEAST_TOKENS) <= size <= wanted
