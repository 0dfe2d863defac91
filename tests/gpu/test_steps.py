"""Whole models on a GPU: captured steps, and steps for which the host waits for nothing."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import paged_driver
import pytest
import tiny_models
import torch
from text_generation_server.config import Dtype, ShardConfig
from text_generation_server.distributed import Group
from text_generation_server.engine.batch import SequenceLimits
from text_generation_server.engine.cuda_graphs import GraphedRunner, with_graphs
from text_generation_server.engine.executor import StepExecutor
from text_generation_server.engine.steps import Chunk, NewSequence, Step
from text_generation_server.generation.parameters import SamplingParameters
from text_generation_server.model.loader import load_model
from text_generation_server.model.runner import ModelRunner
from text_generation_server.model.transformers_runner import TransformersRunner

pytestmark = pytest.mark.gpu

MakeModel = Callable[..., Path]


@pytest.fixture(autouse=True)
def as_in_the_engine() -> Iterator[None]:
    with torch.inference_mode():
        yield


def load(folder: Path, attention: str | None = None) -> TransformersRunner:
    config = ShardConfig(model_id="tiny", uds_path=Path("unused"), dtype=Dtype.FLOAT32, attention=attention)
    return load_model(config, folder, Group(rank=0, world_size=1, device=torch.device("cuda", 0)))


def graphed(runner: TransformersRunner) -> GraphedRunner:
    made = with_graphs(runner, [1, 2, 4, 8], max_total_tokens=256)
    assert isinstance(made, GraphedRunner)
    return made


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "gpt_oss"])
def test_the_default_is_ours_and_its_tokens_are_those_of_generate(model_type: str, tiny_model: MakeModel) -> None:
    import transformers

    folder = tiny_model(model_type)
    prompts = paged_driver.random_prompts(6, lengths=(40, 7, 70))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    expected = paged_driver.generated(model, prompts, max_new_tokens=12, eos_ids=[tiny_models.EOS_ID])
    runner = load(folder)
    assert runner.info.attention == "triton"
    through: ModelRunner = graphed(runner)
    for each in (runner, through):
        tokens = paged_driver.greedy(
            each, prompts, max_new_tokens=12, eos_ids=[tiny_models.EOS_ID], arrive_within=4, chunk_tokens=16
        )
        assert tokens == expected
    assert isinstance(through, GraphedRunner) and through.sizes == [1, 2, 4, 8] and through.num_replays


@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param(SamplingParameters(), id="greedy"),
        pytest.param(
            SamplingParameters(
                do_sample=True, temperature=0.8, top_k=20, top_p=0.9, typical_p=0.9, repetition_penalty=1.1,
                frequency_penalty=0.1,
            ),
            id="every parameter",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("with_logprobs", [False, True])
def test_a_launch_never_waits_for_the_device(
    sampling: SamplingParameters, with_logprobs: bool, tiny_model: MakeModel
) -> None:
    runner = graphed(load(tiny_model("llama")))
    runner.allocate_kv_cache(64)
    limits = SequenceLimits(
        vocab_size=runner.info.vocab_size, max_position_embeddings=0, block_size=16, num_blocks=64,
        prefill_logprobs=True,
    )  # fmt: skip
    executor = StepExecutor(runner, limits)
    new = [
        NewSequence(
            index, array("q", range(10, 40)), 30, blocks=list(range(1 + 8 * index, 9 + 8 * index)),
            num_cached_tokens=0, sampling=sampling, top_n_tokens=3 * with_logprobs, prefill_logprobs=with_logprobs,
        )
        for index in range(3)
    ]  # fmt: skip
    steps = [
        Step(0, 1, new_sequences=new, chunks=[Chunk(index, 20) for index in range(3)]),
        Step(0, 2, chunks=[Chunk(index, 10) for index in range(3)]),
        *(Step(0, 3 + index, decodes=[0, 1, 2]) for index in range(6)),
    ]
    executor.collect(executor.launch(steps[0]))  # kernels that were not needed before are compiled
    launched = None
    for step in steps[1:]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            now = executor.launch(step, launched)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if launched is not None:
            executor.collect(launched)
        launched = now
    assert launched is not None
    assert len(executor.collect(launched).generations) == 3
    assert runner.num_replays == 6
