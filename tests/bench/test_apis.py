"""`bench.apis` reads the events that the servers were seen to send."""

import json

import pytest
from bench.apis import APIS, Piece, Usage

TOKEN = {"id": 7, "text": " a", "logprob": -1.0, "special": False}
DETAILS = {"finish_reason": "length", "generated_tokens": 64, "seed": None, "input_length": 128}
COUNTS = {"prompt_tokens": 128, "completion_tokens": 64, "total_tokens": 192}


@pytest.mark.parametrize(
    ("api", "event", "piece"),
    [
        pytest.param("native", {"index": 1, "token": TOKEN, "details": None}, Piece(has_token=True), id="native token"),
        pytest.param(
            "native", {"index": 64, "token": TOKEN, "details": DETAILS}, Piece(True, Usage(128, 64)), id="native end"
        ),
        pytest.param("native", {"error": "no", "error_type": "generation"}, Piece(error="no"), id="native error"),
        pytest.param(
            "completions",
            {"choices": [{"index": 0, "text": "", "finish_reason": None}], "usage": None},
            Piece(has_token=True),
            id="a token without text is a token",
        ),
        pytest.param("completions", {"choices": [], "usage": COUNTS}, Piece(False, Usage(128, 64)), id="vLLM's usage"),
        pytest.param(
            "transformers",
            {"choices": [{"finish_reason": "length", "index": 0, "text": ""}], "usage": COUNTS},
            Piece(False, Usage(128, 64)),
            id="the last event of transformers carries no token",
        ),
        pytest.param(
            "llama.cpp",
            {"index": 0, "content": "", "tokens": [7], "stop": False},
            Piece(has_token=True),
            id="llama.cpp",
        ),
        pytest.param(
            "llama.cpp",
            {"stop": True, "tokens_evaluated": 128, "tokens_predicted": 64},
            Piece(False, Usage(128, 64)),
            id="the last event of llama.cpp carries no token",
        ),
        pytest.param("transformers", {"error": "dead"}, Piece(error="dead"), id="transformers error"),
    ],
)
def test_events(api: str, event: dict[str, object], piece: Piece) -> None:
    assert APIS[api].read(event) == piece


@pytest.mark.parametrize("name", APIS)
def test_bodies_are_json_with_prompt_and_length(name: str) -> None:
    body = json.dumps(APIS[name].body("prompt text", 61))
    assert "prompt text" in body
    assert "61" in body
