"""A step's rows packed into tensors."""

from __future__ import annotations

import pytest
import torch
from engine_driver import new
from text_generation_server.engine.batch import Batch, SequenceLimits
from text_generation_server.engine.inputs import build_inputs, padded
from text_generation_server.engine.steps import Chunk, Step

CPU = torch.device("cpu")
LIMITS = SequenceLimits(
    vocab_size=100, max_position_embeddings=0, block_size=4, num_blocks=1000, prefill_logprobs=False
)


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [(1, 1), (8, 8), (9, 16), (17, 24), (64, 64), (65, 80), (480, 480), (481, 496)],
)
def test_row_counts_are_few(num_tokens: int, expected: int) -> None:
    assert padded(num_tokens) == expected


def test_padding_comes_last_and_is_written_nowhere() -> None:
    batch = Batch()
    for number in range(3):
        batch.add(new(number, [7, 8, 9]), LIMITS)
    rows = batch.rows(Step(0, 1, chunks=[Chunk(number, 3) for number in range(3)]), LIMITS)
    inputs, counts = build_inputs(rows, block_size=4, device=CPU, pads=True)
    assert build_inputs(rows, block_size=4, device=CPU, pads=False)[0].num_tokens == 9
    assert inputs.num_tokens == 16
    assert inputs.input_ids_T.tolist() == [7, 8, 9] * 3 + [0] * 7
    assert inputs.position_ids_T.tolist() == [0, 1, 2] * 3 + [0] * 7
    assert inputs.slots_T.shape == (9,)
    assert (inputs.query_lens, counts) == ([3, 3, 3], [1, 1, 1])
    assert inputs.logits_indices_L.tolist() == [2, 5, 8]
