from __future__ import annotations

import pytest
import torch
from engine_driver import new, prompt
from fake_runner import BLOCK_SIZE, VOCAB_SIZE, FakeRunner
from text_generation_server.engine.batch import SequenceLimits
from text_generation_server.engine.executor import StepExecutor
from text_generation_server.engine.steps import Chunk, Step


@pytest.mark.parametrize("is_leader", [True, False])
def test_prompt_logprobs_are_computed_where_they_are_reported(is_leader: bool) -> None:
    runner = FakeRunner()
    runner.allocate_kv_cache(16)
    limits = SequenceLimits(
        vocab_size=VOCAB_SIZE, max_position_embeddings=0, block_size=BLOCK_SIZE, num_blocks=16, prefill_logprobs=True
    )
    executor = StepExecutor(runner, limits, is_leader=is_leader, broadcast=lambda ids_S: None)
    sequence = new(1, prompt(1, 6), prefill_logprobs=True)
    with torch.inference_mode():
        launched = executor.launch(Step(0, 1, new_sequences=[sequence], chunks=[Chunk(1, 6)]))
    assert bool(launched.prompt_logprobs) is is_leader
