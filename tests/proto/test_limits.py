"""Limits that follow from others, and how they are explained."""

from __future__ import annotations

import pytest
from text_generation_proto import limits
from text_generation_proto.limits import Limit


@pytest.mark.parametrize(
    ("given", "device_type", "rows", "derived"),
    [
        (100, "cuda", 128, Limit(100, "as given")),
        (None, "cuda", 128, Limit(4096, "the default")),
        (None, "cpu", 128, Limit(512, "the default on a CPU")),
        (None, "cpu", 1000, Limit(1016, "a token for each of 1000 requests, and 16 of a prompt")),
    ],
)
def test_prefill_tokens(given: int | None, device_type: str, rows: int, derived: Limit) -> None:
    assert limits.batch_prefill_tokens(given, device_type=device_type, rows=rows, block_size=16) == derived


@pytest.mark.parametrize(
    ("given", "capacity", "positions", "model_max_length", "derived"),
    [
        (7, 100, 50, None, Limit(7, "as given")),
        (None, 100, 500, 300, Limit(100, "all tokens of the KV cache")),
        (None, 100, 50, None, Limit(50, "the model's positions")),
        (None, 100, 0, None, Limit(100, "all tokens of the KV cache")),
        (None, 100, 50, 20, Limit(20, "the tokenizer's limit")),
    ],
)
def test_total_tokens(
    given: int | None, capacity: int, positions: int, model_max_length: int | None, derived: Limit
) -> None:
    made = limits.total_tokens(given, capacity=capacity, positions=positions, model_max_length=model_max_length)
    assert made == derived


def test_input_tokens() -> None:
    assert limits.input_tokens(None, 10) == Limit(9, "`max_total_tokens` - 1")
    assert limits.input_tokens(5, 10) == Limit(5, "as given")


def test_rows_and_the_largest_step() -> None:
    assert limits.most_rows(128, None) == 128
    assert limits.most_rows(128, 8) == 8
    assert limits.most_rows(4, 8) == 4
    assert limits.largest_step_tokens(512, 128) == 512
    assert limits.largest_step_tokens(16, 128) == 129
