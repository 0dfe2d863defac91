from __future__ import annotations

import logging
import math
import struct
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import psutil
import pytest
import torch
from engine_driver import GREEDY, NUM_BLOCKS, Driver, driven, new, oracle_tokens, prompt, prompt_logprobs
from fake_runner import (
    BLOCK_SIZE,
    CRASH_TOKEN,
    DEVICE_TOKEN,
    MEMORY_TOKEN,
    NAN_TOKEN,
    FakeRunner,
    oracle_logits,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from text_generation_server.engine import executor
from text_generation_server.engine.engine import OUT_OF_MEMORY, STEP_FAILED, Engine, EngineHealth
from text_generation_server.engine.memory import DoesNotFit, KVPlan, WarmupLimits
from text_generation_server.engine.steps import BlockAddition, Chunk, NewSequence, Step, StepResult, TopTokens
from text_generation_server.errors import StaleEpoch
from text_generation_server.generation.parameters import SamplingParameters

SEEDED = SamplingParameters(do_sample=True, temperature=0.9, top_p=0.9, seed=11, repetition_penalty=1.2)


@pytest.fixture(params=[False, True], ids=["in turn", "one step ahead"])
def driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    with driven(run_ahead=request.param) as made:
        yield made


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "sampled"])
def test_sequences_generate_what_each_would_alone(driver: Driver, sampling: SamplingParameters) -> None:
    prompts = {1: prompt(1, 9), 2: prompt(2, 3), 3: prompt(3, 5)}
    futures = [
        driver.submit(
            add=[new(1, prompts[1], sampling=sampling), new(2, prompts[2], sampling=sampling)],
            chunks=[(1, 4), (2, 3)],
        ),
        driver.submit(chunks=[(1, 5)], decodes=[2]),
        driver.submit(add=[new(3, prompts[3], sampling=sampling)], chunks=[(3, 5)], decodes=[1, 2]),
        driver.submit(decodes=[3, 1]),
        driver.submit(decodes=[1, 2, 3]),
        driver.submit(decodes=[1, 2, 3]),
    ]
    for future in futures:
        driver.read(future)
    assert {sequence_id: len(ids) for sequence_id, ids in driver.outputs.items()} == {1: 5, 2: 5, 3: 4}
    for sequence_id, ids in driver.outputs.items():
        assert ids == oracle_tokens(prompts[sequence_id], len(ids), sampling)


def test_a_resumed_sequence_goes_on_as_if_nothing_had_happened(driver: Driver) -> None:
    token_ids = prompt(1, 6)
    expected = oracle_tokens(token_ids, 6, SEEDED)
    resumed = new(1, [*token_ids, *expected[:3]], num_prompt_tokens=6, sampling=SEEDED)
    result = driver.submit(add=[resumed], chunks=[(1, 9)]).result(10)
    assert (result.generations[0].first_output_index, result.generations[0].token_ids) == (3, expected[3:4])
    result = driver.submit(decodes=[1]).result(10)
    assert (result.generations[0].first_output_index, result.generations[0].token_ids) == (4, expected[4:5])


def test_cached_tokens_are_read_from_their_blocks(driver: Driver) -> None:
    token_ids = prompt(1, 10)
    driver.read(driver.submit(add=[new(1, token_ids)], chunks=[(1, 10)]))
    shared = new(2, token_ids, blocks=[9, 10, 30], num_cached_tokens=8)  # 9, 10: the first blocks of sequence 1
    driver.read(driver.submit(add=[shared], chunks=[(2, 2)], drops=[1]))
    assert driver.outputs[2] == driver.outputs[1]


def test_blocks_are_added_as_a_sequence_grows(driver: Driver) -> None:
    token_ids = prompt(1, 6)
    driver.read(driver.submit(add=[new(1, token_ids, blocks=[5])], chunks=[Chunk(1, 6, [7])]))
    driver.read(driver.submit(decodes=[1]))
    driver.read(driver.submit(decodes=[1]))
    driver.step_id += 1
    grown = Step(0, driver.step_id, decodes=[1], additions=[BlockAddition(1, [3])])
    driver.read(driver.submit_step(grown))
    assert driver.outputs[1] == oracle_tokens(token_ids, 4)


def test_top_tokens_come_with_each_token(driver: Driver) -> None:
    result = driver.read(driver.submit(add=[new(1, prompt(1, 4), top_n_tokens=3)], chunks=[(1, 4)]))
    (generation,) = result.generations
    (top,) = generation.top_tokens
    assert top.ids[0] == generation.token_ids[0]
    assert top.logprobs[0] == pytest.approx(generation.logprobs[0])
    assert len(top.ids) == 3


@pytest.mark.parametrize("chunks", [[13], [5, 8], [1, 1, 11], [12, 1]])
def test_prompt_logprobs_are_right_across_chunks(
    driver: Driver, chunks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor, "MAX_PROMPT_LOGITS_ROWS", 4)  # so that passes are split as well
    token_ids = prompt(1, 13)
    driver.read(driver.submit(add=[new(2, prompt(2, 4))], chunks=[(2, 4)]))
    asking = new(1, token_ids, prefill_logprobs=True, prefill_top_n_tokens=3)
    futures = [
        driver.submit(add=[] if index else [asking], chunks=[(1, size)], decodes=[2])
        for index, size in enumerate(chunks)
    ]
    found: list[float] = []
    top: list[TopTokens] = []
    for future in futures:
        for generation in driver.read(future).generations:
            if generation.prefill is not None:
                assert generation.prefill.first_position == len(found)
                found += generation.prefill.logprobs
                top += generation.prefill.top_tokens
    assert math.isnan(found[0])
    assert top[0] == TopTokens([], [])
    for position, tokens in enumerate(top[1:], start=1):
        expected = torch.log_softmax(oracle_logits(token_ids[:position]), -1).topk(3)
        assert tokens.ids == expected.indices.tolist()
        assert tokens.logprobs == pytest.approx(expected.values.tolist(), abs=1e-5)
    assert found[1:] == pytest.approx(prompt_logprobs(token_ids), abs=1e-5)
    assert driver.outputs[1] == oracle_tokens(token_ids, 1)
    assert driver.outputs[2] == oracle_tokens(prompt(2, 4), 1 + len(chunks))
    assert max(len(inputs.logits_indices_L) for inputs in driver.runner.forwards) <= 5


def test_the_mean_of_the_hidden_states_is_right_across_chunks_and_beside_others(driver: Driver) -> None:
    """The fake runner's state of a token is its id and its position."""
    long, short, other = prompt(1, 11), prompt(2, 3), prompt(3, 5)
    added = [new(1, long, embeds=True), new(2, short, embeds=True), new(3, other)]
    futures = [
        driver.submit(add=added, chunks=[(1, 4), (2, 3), (3, 5)]),
        driver.submit(chunks=[(1, 7)], decodes=[3]),
    ]
    first, second = ({each.sequence_id: each.embedding for each in driver.read(f).generations} for f in futures)
    assert struct.unpack("<2f", first[2]) == pytest.approx((sum(short) / 3, 1.0))
    assert struct.unpack("<2f", second[1]) == pytest.approx((sum(long) / 11, 5.0))
    assert (first[3], second[3]) == (b"", b"")
    assert driver.outputs[1] == oracle_tokens(long, 1)


def test_what_is_cached_cannot_be_embedded(driver: Driver) -> None:
    result = driver.submit(add=[new(1, prompt(1, 8), num_cached_tokens=4, embeds=True)]).result(10)
    assert result.failure is not None
    assert "some of its tokens are cached" in result.failure.message


def test_likely_tokens_of_a_prompt_come_with_its_logprobs_only(driver: Driver) -> None:
    result = driver.submit(add=[new(1, prompt(1, 4), prefill_top_n_tokens=1)]).result(10)
    assert result.failure is not None
    assert "prefill_top_n_tokens 1 need prefill logprobs" in result.failure.message


def test_a_prompt_of_one_token_has_no_likely_ones(driver: Driver) -> None:
    asking = new(1, prompt(1, 1), prefill_logprobs=True, prefill_top_n_tokens=3)
    (generation,) = driver.submit(add=[asking], chunks=[(1, 1)]).result(10).generations
    assert generation.prefill is not None
    assert generation.prefill.top_tokens == [TopTokens([], [])]


def test_a_long_prompt_with_a_resumed_tail_reports_prompt_positions_only(driver: Driver) -> None:
    token_ids = prompt(1, 9)
    resumed = new(1, token_ids, num_prompt_tokens=6, prefill_logprobs=True)
    generation = driver.submit(add=[resumed], chunks=[(1, 9)]).result(10).generations[0]
    assert generation.prefill is not None
    assert generation.prefill.logprobs[1:] == pytest.approx(prompt_logprobs(token_ids[:6]), abs=1e-5)
    assert generation.first_output_index == 3


def test_a_sequence_whose_logits_are_not_finite_fails_alone(driver: Driver) -> None:
    poisoned = [*prompt(1, 5), NAN_TOKEN]
    futures = [
        driver.submit(add=[new(1, poisoned), new(2, prompt(2, 6))], chunks=[(1, 6), (2, 6)]),
        driver.submit(decodes=[1, 2]),  # sent before the failure is known
        driver.submit(decodes=[2], drops=[1]),
    ]
    results = [driver.read(future) for future in futures]
    assert list(results[0].sequence_failures) == [1]
    assert [g.sequence_id for result in results for g in result.generations] == [2, 2, 2]
    assert driver.outputs[2] == oracle_tokens(prompt(2, 6), 3)
    assert driver.runner.zeroed == [9, 10], "of its blocks, what it has written"
    driver.read(driver.submit(add=[new(1, prompt(1, 4))], chunks=[(1, 4)]))
    assert driver.outputs[1] == oracle_tokens(prompt(1, 4), 1)


POISONED = [*prompt(1, 5), NAN_TOKEN]
BLOCKS = list(range(9, 17))


def test_whoever_gets_the_blocks_of_a_failed_sequence_is_unharmed(driver: Driver) -> None:
    with driver.together():  # dropped, and its blocks handed out again, before the failure is known
        futures = [
            driver.submit(add=[new(1, POISONED)], chunks=[(1, 6)]),
            driver.submit(add=[new(2, prompt(2, 5), blocks=BLOCKS)], chunks=[(2, 5)], drops=[1]),
            *(driver.submit(decodes=[2]) for _ in range(4)),
        ]
    results = [driver.read(future) for future in futures]
    assert [list(result.sequence_failures) for result in results] == [[1], [], [], [], [], []]
    assert driver.outputs[2] == oracle_tokens(prompt(2, 5), 5)


def test_whoever_gets_the_blocks_of_a_sequence_cut_off_in_its_prompt_is_unharmed(driver: Driver) -> None:
    driver.read(driver.submit(add=[new(1, [*POISONED, 5, 6, 7])], chunks=[(1, 6)]))
    driver.read(driver.submit(add=[new(2, prompt(2, 5), blocks=BLOCKS)], chunks=[(2, 5)], drops=[1]))
    assert driver.outputs[2] == oracle_tokens(prompt(2, 5), 1)
    assert driver.runner.zeroed == [9, 10]


def test_a_new_epoch_reads_nothing_of_a_failed_one(driver: Driver) -> None:
    driver.read(driver.submit(add=[new(1, [*POISONED, 5, 6, 7])], chunks=[(1, 6)]))
    assert driver.submit(add=[new(3, [5, CRASH_TOKEN])], chunks=[(3, 2)]).result(10).failure is not None
    driver.clear()
    driver.read(driver.submit(add=[new(2, prompt(2, 5), blocks=BLOCKS)], chunks=[(2, 5)]))
    assert driver.outputs[2] == oracle_tokens(prompt(2, 5), 1)


def test_a_healthy_sequence_that_ends_costs_no_more_than_the_row_under_way(driver: Driver) -> None:
    with driver.together():
        futures = [
            driver.submit(add=[new(1, prompt(1, 11))], chunks=[(1, 11)]),
            driver.submit(decodes=[1]),
            driver.submit(add=[new(2, prompt(2, 4))], chunks=[(2, 4)], drops=[1]),
        ]
    for future in futures:
        driver.read(future)
    assert driver.runner.zeroed in ([], [11])
    assert not driver.runner.zeroed or driver.engine._run_ahead


def test_blocks_that_others_may_share_are_kept_when_a_sequence_fails(driver: Driver) -> None:
    driver.read(driver.submit(add=[new(1, prompt(1, 6))], chunks=[(1, 6)]))
    with torch.inference_mode():
        driver.runner.cache[10 * BLOCK_SIZE] = NAN_TOKEN  # in its second block
    assert list(driver.read(driver.submit(decodes=[1])).sequence_failures) == [1]
    driver.read(driver.submit(add=[new(2, prompt(2, 4))], chunks=[(2, 4)], drops=[1]))
    assert driver.runner.zeroed == [10]


@pytest.mark.parametrize(
    ("token", "out_of_memory", "message", "cause"),
    [(MEMORY_TOKEN, True, OUT_OF_MEMORY, "can't allocate memory"), (CRASH_TOKEN, False, STEP_FAILED, "is broken")],
)
def test_a_failed_step_ends_its_epoch_and_a_new_one_begins_clean(
    driver: Driver, token: int, out_of_memory: bool, message: str, cause: str, caplog: pytest.LogCaptureFixture
) -> None:
    driver.read(driver.submit(add=[new(1, prompt(1, 4))], chunks=[(1, 4)]))
    failing = driver.submit(add=[new(2, [5, token])], chunks=[(2, 2)], decodes=[1])
    behind = driver.submit(decodes=[1])
    failure = failing.result(10).failure
    assert failure is not None and failure.out_of_memory is out_of_memory
    assert failure.message == message, "clients read it"
    (line,) = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert line.startswith("step 2 of epoch 0 failed: ") and cause in line
    assert "ended with a failed step" in getattr(behind.result(10).failure, "message", "")
    assert driver.engine.health().num_sequences == 0
    driver.clear()
    driver.read(driver.submit(add=[new(1, prompt(1, 4))], chunks=[(1, 4)]))
    assert driver.outputs[1] == oracle_tokens(prompt(1, 4), 1)


def test_a_step_keeps_its_result_when_the_one_behind_it_fails(driver: Driver) -> None:
    with driver.together():
        good = driver.submit(add=[new(1, prompt(1, 4))], chunks=[(1, 4)])
        failing = driver.submit(add=[new(2, [5, CRASH_TOKEN])], chunks=[(2, 2)], decodes=[1])
    driver.read(good)
    assert driver.outputs[1] == oracle_tokens(prompt(1, 4), 1)
    failure = failing.result(10).failure
    assert failure is not None and failure.message == STEP_FAILED


def with_peers(ids: torch.Tensor) -> None:
    """A broadcast whose peers sampled the same."""


@pytest.mark.parametrize("run_ahead", [False, True], ids=["in turn", "one step ahead"])
@pytest.mark.parametrize(
    ("broadcast", "token", "error"),
    [
        pytest.param(None, DEVICE_TOKEN, torch.AcceleratorError, id="the device is unusable"),
        pytest.param(with_peers, CRASH_TOKEN, ValueError, id="other ranks wait"),
        pytest.param(with_peers, MEMORY_TOKEN, RuntimeError, id="other ranks had the memory"),
    ],
)
def test_a_step_that_nothing_can_follow_is_answered_and_ends_the_thread(
    broadcast: Callable[[torch.Tensor], None] | None, token: int, error: type[Exception], run_ahead: bool
) -> None:
    with driven(broadcast=broadcast, run_ahead=run_ahead) as driver:
        driver.read(driver.submit(add=[new(1, prompt(1, 4))], chunks=[(1, 4)]))
        assert driver.submit(add=[new(2, [5, token])], chunks=[(2, 2)]).result(10).failure is not None
        assert isinstance(driver.running.exception(10), error)


def test_what_every_rank_refuses_ends_no_rank() -> None:
    with driven(broadcast=with_peers) as driver:
        assert driver.submit(decodes=[9]).result(10).failure is not None
        driver.clear()
        driver.read(driver.submit(add=[new(1, prompt(1, 4))], chunks=[(1, 4)]))


def test_a_rank_takes_every_step_that_its_peers_may_be_in() -> None:
    with driven(broadcast=with_peers) as driver:
        with driver.together():
            steps = [
                driver.submit(add=[new(1, prompt(1, 4))], chunks=[(1, 4)]),
                driver.submit(decodes=[1]),
            ]
            cleared = driver.engine.clear(1)
        for step in steps:
            driver.read(step)
        cleared.result(10)


@pytest.mark.parametrize(
    "call",
    [lambda engine: engine.clear(1), lambda engine: engine.warm_up(WarmupLimits(max_batch_size=1))],
    ids=["clear", "warm_up"],
)
def test_a_call_that_is_cancelled_while_it_waits_is_left_out(
    driver: Driver, call: Callable[[Engine], Future[object]]
) -> None:
    with driver.together():
        running = driver.submit(add=[new(1, prompt(1, 4))], chunks=[(1, 4)])
        assert driver.runner.entered.wait(10)
        assert call(driver.engine).cancel()
    driver.read(running)
    assert driver.engine.health().epoch == 0 and driver.engine.health().num_sequences == 1
    driver.epoch = 1
    driver.clear()
    driver.read(driver.submit(add=[new(1, prompt(1, 4))], chunks=[(1, 4)]))
    assert driver.outputs[1] == oracle_tokens(prompt(1, 4), 1)


def test_steps_of_another_epoch_are_refused_and_do_no_harm(driver: Driver) -> None:
    driver.clear()
    driver.read(driver.submit(add=[new(1, prompt(1, 4))], chunks=[(1, 4)]))
    for epoch in (0, 2, 2**63):
        failure = driver.submit_step(Step(epoch, 2, decodes=[1])).result(10).failure
        assert failure is not None and "epoch" in failure.message
    driver.read(driver.submit(decodes=[1]))
    with pytest.raises(StaleEpoch):
        driver.engine.clear(1).result(10)
    driver.read(driver.submit(decodes=[1]))
    assert driver.outputs[1] == oracle_tokens(prompt(1, 4), 3)


def test_steps_queued_before_a_reset_are_not_executed() -> None:
    runner = FakeRunner()
    with driven(runner=runner) as driver:
        runner.gate = threading.Event()
        running = driver.submit(add=[new(1, prompt(1, 4))], chunks=[(1, 4)])
        queued = driver.submit(decodes=[1])
        while not runner.forwards:
            time.sleep(0.001)
        cleared = driver.engine.clear(1)
        runner.gate.set()
        assert running.result(10).failure is None
        assert queued.result(10).failure is not None
        cleared.result(10)
        assert len(runner.forwards) == 1


STARTED = [new(1, prompt(1, 6)), new(2, prompt(2, 6))]


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (Step(0, 2, decodes=[9]), "unknown sequence 9"),
        (Step(0, 2, decodes=[2]), "not computed yet"),
        (Step(0, 2, decodes=[1, 1]), "twice"),
        (Step(0, 2, decodes=[1], chunks=[Chunk(1, 1)]), "two rows"),
        (Step(0, 2, chunks=[Chunk(2, 3), Chunk(2, 3)]), "two rows"),
        (Step(0, 2, chunks=[Chunk(1, 1)]), "a chunk of 1 tokens"),
        (Step(0, 2, chunks=[Chunk(2, 0)]), "a chunk of 0 tokens"),
        (Step(0, 2, chunks=[Chunk(2, 2**32 - 1)]), "a chunk of"),
        (Step(0, 2, chunks=[Chunk(2, 1, [0])]), "block ids"),
        (Step(0, 2, additions=[BlockAddition(1, [NUM_BLOCKS + 1])]), "block ids"),
        (Step(0, 2, additions=[BlockAddition(1, [1] * NUM_BLOCKS)]), "more blocks"),
        (Step(0, 2, additions=[BlockAddition(7, [1])]), "unknown sequence 7"),
        (Step(0, 2, new_sequences=[new(1, [1])]), "exists already"),
        (Step(0, 2, new_sequences=[new(3, [1, 64])]), "token ids"),
        (Step(0, 2, new_sequences=[new(3, [])]), "num_prompt_tokens"),
        (Step(0, 2, new_sequences=[new(3, [1], num_prompt_tokens=2)]), "num_prompt_tokens"),
        (Step(0, 2, new_sequences=[new(3, [1, 2], num_cached_tokens=2)]), "nothing left"),
        (Step(0, 2, new_sequences=[new(3, [1, 2], blocks=[], num_cached_tokens=1)]), "do not fit"),
        (Step(0, 2, new_sequences=[new(3, [1], top_n_tokens=65)]), "top_n_tokens"),
        (Step(0, 2, new_sequences=[new(3, [1, 2], blocks=[])], chunks=[Chunk(3, 2)]), "do not fit"),
        (Step(0, 3), "step 3 arrived where 2 was due"),
    ],
)
def test_a_step_against_the_contract_fails_with_a_reason(driver: Driver, step: Step, text: str) -> None:
    driver.read(driver.submit(add=STARTED, chunks=[(1, 6), (2, 3)]))
    result = driver.submit_step(step).result(10)
    assert result.failure is not None and text in result.failure.message
    assert not result.failure.out_of_memory
    assert driver.submit_step(Step(0, 3)).result(10).failure is not None
    driver.clear()
    driver.read(driver.submit(add=[new(1, prompt(1, 4))], chunks=[(1, 4)]))


def test_positions_beyond_the_model_are_refused() -> None:
    with driven(runner=FakeRunner(max_positions=6)) as driver:
        result = driver.submit(add=[new(1, prompt(1, 7))], chunks=[(1, 7)]).result(10)
        assert result.failure is not None and "6 positions" in result.failure.message


def test_a_step_before_warmup_is_refused_and_a_second_warmup_changes_nothing(driver: Driver) -> None:
    driver.read(driver.submit(add=[new(1, prompt(1, 4))], chunks=[(1, 4)]))
    assert driver.engine.warm_up(WarmupLimits()).result(10).num_blocks == NUM_BLOCKS
    driver.read(driver.submit(decodes=[1]))
    assert driver.outputs[1] == oracle_tokens(prompt(1, 4), 2)


def test_a_warmup_that_fails_leaves_no_stale_answer(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(runner: object, limits: WarmupLimits) -> KVPlan:
        raise DoesNotFit("too much")

    with monkeypatch.context() as patch:
        patch.setattr(driver.engine, "_plan", refuse)
        with pytest.raises(DoesNotFit):
            driver.engine.warm_up(WarmupLimits(max_batch_total_tokens=2**40)).result(10)
    assert driver.engine.warm_up(WarmupLimits()).result(10).num_blocks == NUM_BLOCKS
    driver.read(driver.submit(add=[new(1, prompt(1, 4))], chunks=[(1, 4)]))


U = st.integers(0, 3) | st.sampled_from([60, 2**31, 2**32 - 1])
WILD_BLOCKS = st.lists(U | st.integers(1, NUM_BLOCKS), max_size=4)
FUZZED_STEP = st.builds(
    Step,
    epoch=st.just(0),
    step_id=st.just(1),
    drops=st.lists(U, max_size=2),
    new_sequences=st.lists(
        st.builds(
            NewSequence,
            U,
            st.lists(st.integers(0, 59) | U, max_size=6).map(lambda ids: array("q", ids)),
            U,
            WILD_BLOCKS,
            U,
            st.just(SEEDED),
            U,
            st.booleans(),
        ),
        max_size=2,
    ),
    chunks=st.lists(st.builds(Chunk, U, U | st.integers(1, 6), WILD_BLOCKS), max_size=3),
    decodes=st.lists(U, max_size=3),
    additions=st.lists(st.builds(BlockAddition, U, WILD_BLOCKS), max_size=2),
)


@pytest.fixture(scope="module")
def shared_driver() -> Iterator[Driver]:
    with driven() as made:
        yield made


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(FUZZED_STEP, min_size=1, max_size=4))
def test_wild_steps_fail_as_steps_and_the_engine_lives(shared_driver: Driver, steps: list[Step]) -> None:
    driver = shared_driver
    driver.clear()
    driver.submit(add=[new(1, prompt(1, 6)), new(2, prompt(2, 6))], chunks=[(1, 6), (2, 2)]).result(10)
    for step in steps:
        driver.step_id += 1
        wild = Step(
            driver.epoch, driver.step_id, step.drops, step.new_sequences, step.chunks, step.decodes, step.additions
        )
        result = driver.submit_step(wild).result(10)
        if result.failure is not None:
            assert result.failure.message not in (STEP_FAILED, OUT_OF_MEMORY), "every refusal is one we foresaw"
            break
    driver.clear()
    driver.read(driver.submit(add=[new(3, prompt(3, 5))], chunks=[(3, 5)]))
    assert driver.outputs[3] == oracle_tokens(prompt(3, 5), 1)


def test_health_tells_idle_from_a_step_that_hangs() -> None:
    runner = FakeRunner()
    with driven(runner=runner) as driver:
        assert driver.engine.health().progress_age_ns == 0
        runner.gate = threading.Event()
        future = driver.submit(add=[new(1, prompt(1, 4))], chunks=[(1, 4)])
        while not runner.forwards:
            time.sleep(0.001)
        time.sleep(0.05)
        assert driver.engine.health().progress_age_ns > 40_000_000
        runner.gate.set()
        timings = driver.read(future).timings
        assert timings.forward_ns >= 40_000_000 and timings.total_ns >= timings.forward_ns
        assert timings.num_prefill_tokens == 4
        time.sleep(0.02)
        idle = driver.read(driver.submit(decodes=[1])).timings
        assert idle.idle_ns >= 15_000_000 and idle.num_decode_rows == 1
        assert idle.overhead_ns == pytest.approx(
            idle.idle_ns + idle.total_ns - idle.forward_ns - idle.sample_ns, abs=5_000_000
        )
        health = driver.engine.health()
        assert (health.progress_age_ns, health.last_step_id, health.num_sequences) == (0, 2, 1)


def test_a_step_on_the_device_is_not_idle_when_the_one_before_it_has_ended() -> None:
    with driven(run_ahead=True) as driver:
        healths: list[EngineHealth] = []

        def deliver(result: StepResult) -> None:
            assert result.failure is None, result.failure
            healths.append(driver.engine.health())

        with driver.together():
            driver.engine.submit(Step(0, 1, new_sequences=[new(1, prompt(1, 4))], chunks=[Chunk(1, 4)]), deliver)
            driver.engine.submit(Step(0, 2, decodes=[1]), deliver)
        assert driver.engine.stop(10)
        assert [health.last_step_id for health in healths] == [1, 2]
        assert [health.progress_age_ns > 0 for health in healths] == [True, False]


def test_an_idle_engine_takes_no_processor_time() -> None:
    with driven() as driver:
        driver.read(driver.submit(add=[new(1, prompt(1, 4))], chunks=[(1, 4)]))
        time.sleep(0.05)
        before = psutil.Process().cpu_times()
        time.sleep(0.5)
        after = psutil.Process().cpu_times()
        assert (after.user + after.system) - (before.user + before.system) < 0.1
