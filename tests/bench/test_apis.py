from __future__ import annotations

from typing import Any

import pytest
from bench.apis import APIS
from text_generation_launcher.benchmark.apis import Piece, Usage


@pytest.mark.parametrize(
    ("event", "piece"),
    [
        pytest.param({"index": 0, "content": "", "tokens": [7], "stop": False}, Piece(has_token=True), id="a token"),
        pytest.param(
            {"stop": True, "tokens_evaluated": 128, "tokens_predicted": 64},
            Piece(False, Usage(128, 64)),
            id="the last event carries no token",
        ),
        pytest.param({"error": "dead"}, Piece(error="dead"), id="an error"),
    ],
)
def test_the_events_of_llama_cpp(event: dict[str, Any], piece: Piece) -> None:
    assert APIS["llama.cpp"].read(event) == piece
