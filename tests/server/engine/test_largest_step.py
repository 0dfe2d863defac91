"""The step by which a plan is verified: nothing that passes validation is larger."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_driver import driven
from fake_runner import BLOCK_SIZE, FakeRunner
from hypothesis import given
from hypothesis import strategies as st
from text_generation_server.attention import torch_paged
from text_generation_server.config import Dtype, ShardConfig
from text_generation_server.device_memory import DeviceMemory
from text_generation_server.engine import memory
from text_generation_server.engine.batch import Batch, SequenceLimits
from text_generation_server.engine.engine import Engine, compute_thread
from text_generation_server.engine.executor import StepExecutor
from text_generation_server.engine.inputs import ForwardInputs
from text_generation_server.engine.largest_step import largest_step, run
from text_generation_server.engine.memory import KVPlan, WarmupLimits
from text_generation_server.errors import NotEnoughMemory
from text_generation_server.model import footprint
from text_generation_server.model.live_bytes import LiveBytes
from text_generation_server.model.loader import load_model
from text_generation_server.planning import plan_loaded
from torch import Tensor

MakeModel = Callable[..., Path]


def sequence_limits(num_blocks: int, positions: int = 0, *, prefill_logprobs: bool = False) -> SequenceLimits:
    return SequenceLimits(
        vocab_size=100,
        max_position_embeddings=positions,
        block_size=16,
        num_blocks=num_blocks,
        prefill_logprobs=prefill_logprobs,
    )


@given(
    tokens=st.integers(1, 600),
    requests=st.integers(1, 40),
    batch_size=st.integers(0, 40),
    total=st.integers(0, 500),
    positions=st.integers(0, 500),
    num_blocks=st.integers(1, 40),
)
def test_it_is_as_large_as_the_limits_and_within_the_contract(
    tokens: int, requests: int, batch_size: int, total: int, positions: int, num_blocks: int
) -> None:
    if total and positions:
        total = min(total, positions)
    limits = WarmupLimits(
        max_batch_prefill_tokens=tokens,
        max_concurrent_requests=requests,
        max_batch_size=batch_size,
        max_total_tokens=total,
    )
    allowed = sequence_limits(num_blocks, positions)
    step = largest_step(limits, allowed)
    assert sum(chunk.num_tokens for chunk in step.chunks) == tokens
    rows = min(tokens, requests, batch_size or requests)
    assert len(step.new_sequences) >= rows
    longest = min(total or positions or num_blocks * 16, num_blocks * 16)
    assert len(step.new_sequences[0].token_ids) == longest
    batch = Batch()
    for new in step.new_sequences:
        batch.add(new, allowed)
    assert all(row.samples for row in batch.rows(step, allowed))


def test_every_processor_and_every_logprob_takes_part() -> None:
    limits = WarmupLimits(max_batch_prefill_tokens=64, max_concurrent_requests=4)
    step = largest_step(limits, sequence_limits(10, prefill_logprobs=True))
    for new in step.new_sequences:
        assert new.sampling.has_filter and new.sampling.has_penalty and new.sampling.do_sample
        assert new.prefill_logprobs and new.top_n_tokens and new.prefill_top_n_tokens


def test_an_engine_that_verifies_its_plan_runs_it_once_and_forgets_it() -> None:
    runner = FakeRunner()
    limits = WarmupLimits(max_batch_prefill_tokens=12, max_concurrent_requests=3)
    with verifying(runner) as engine:
        assert engine.warm_up(limits).result(10).num_blocks == 10
        [forward] = runner.forwards
        assert sum(forward.query_lens) == 12
        assert len(forward.query_lens) == 3
        assert engine.warm_up(limits).result(10).num_blocks == 10
        assert len(runner.forwards) == 1
        assert engine.health().num_sequences == 0


def test_a_largest_step_out_of_memory_ends_the_start_with_a_remedy() -> None:
    class Small(FakeRunner):
        def forward(self, inputs: ForwardInputs) -> Tensor:
            if inputs.num_tokens > 8:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            return super().forward(inputs)

    runner = Small()
    with verifying(runner) as engine:
        with pytest.raises(NotEnoughMemory) as error:
            engine.warm_up(WarmupLimits(max_batch_prefill_tokens=12, max_concurrent_requests=3)).result(10)
        assert str(error.value) == (
            "the largest step, of 12 tokens, does not fit beside 10 blocks of KV cache; decrease "
            "`--max-batch-prefill-tokens` or `--cuda-memory-fraction`"
        )
        assert runner.cache.numel() == 0, "the cache is given back"
        smaller = WarmupLimits(max_batch_prefill_tokens=8, max_concurrent_requests=3)
        assert engine.warm_up(smaller).result(10).num_blocks == 10


def test_on_a_cpu_nobody_waits_for_it() -> None:
    with driven() as driver:
        assert driver.runner.forwards == []


class verifying:
    """A running engine that verifies its plan of ten blocks."""

    def __init__(self, runner: FakeRunner) -> None:
        self.engine = Engine(
            runner,
            lambda runner, limits: KVPlan(num_blocks=10, derivation="fixed"),
            block_size=BLOCK_SIZE,
            verify_plan=True,
            compute=compute_thread(1),
        )

    def __enter__(self) -> Engine:
        self.engine.start()
        return self.engine

    def __exit__(self, *_: object) -> None:
        assert self.engine.stop(10)


SMALL_SCRATCH = 2**16


@pytest.fixture
def small_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention with so little scratch memory that it hides no mistake in the rest of the plan."""
    for name in ("SCORE_BYTES", "MASK_BYTES", "GATHERED_BYTES"):
        monkeypatch.setattr(torch_paged, name, SMALL_SCRATCH)
    monkeypatch.setattr(memory, "SCRATCH_BYTES", 3 * SMALL_SCRATCH)


SHAPES = {
    "wide": {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8},
    "many words": {"vocab_size": 16_000},
    "few key/value heads": {"hidden_size": 256, "num_attention_heads": 16, "num_key_value_heads": 1},
}


@pytest.mark.usefixtures("small_scratch")
@pytest.mark.parametrize("attention", ["torch", None])
@pytest.mark.parametrize("dtype", [Dtype.FLOAT32, Dtype.BFLOAT16])
@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        *(pytest.param("llama", changes, id=name) for name, changes in SHAPES.items()),
        pytest.param("mistral", {}, id="a window"),
        pytest.param("gemma2", {}, id="capped scores"),
        pytest.param("mixtral", {}, id="experts"),
        pytest.param("gpt2", {}, id="no rotary embedding"),
        pytest.param("deepseek_v3", {}, id="keys wider than values", marks=pytest.mark.slow),
        pytest.param("gemma3n_text", {}, id="several streams", marks=pytest.mark.slow),
    ],
)
def test_the_largest_step_holds_no_more_than_was_planned(
    model_type: str, changes: dict[str, int], dtype: Dtype, attention: str | None, tiny_model: MakeModel
) -> None:
    folder = tiny_model(model_type, **changes)
    config = ShardConfig(
        model_id="tiny", uds_path=Path("unused"), dtype=dtype, attention=attention, prefill_logprobs=True
    )
    runner = load_model(config, folder)
    found = footprint.survey(config, folder, "cpu")
    limits = WarmupLimits(max_batch_prefill_tokens=480, max_concurrent_requests=24, max_batch_total_tokens=2048)
    device = DeviceMemory(kind="cpu", name="cpu", usable_bytes=2**32, derivation="4 GiB")
    plan = plan_loaded(found, runner.info, runner.layers, device, limits, config)
    runner.allocate_kv_cache(plan.num_blocks)
    allowed = SequenceLimits(
        vocab_size=runner.info.vocab_size,
        max_position_embeddings=runner.info.max_position_embeddings,
        block_size=16,
        num_blocks=plan.num_blocks,
        prefill_logprobs=True,
    )
    step = largest_step(limits, allowed)
    scattered = {block: 1 + (block - 1) * 37 % plan.num_blocks for block in range(1, plan.num_blocks + 1)}
    for new in step.new_sequences:  # so that attention has to copy what it reads
        new.blocks[:] = [scattered[block] for block in new.blocks]
    executor = StepExecutor(runner, allowed)
    with torch.inference_mode(), LiveBytes() as live:
        run(executor, step)
    assert live.peak <= plan.step_bytes
