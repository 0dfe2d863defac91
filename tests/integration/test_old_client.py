"""The package `text-generation` 0.7.0, unmodified: what the scripts of TGI's users call."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from integration.asking import WITHIN_S
from integration.crowd import full
from integration.launched import Launched
from integration.reciting import ALPHABET, POSITIONS

PYTHON = Path(sys.prefix, "clients", "bin", "python")
SCRIPT = Path(__file__).with_name("old_client.py")

Call = tuple[str, Any, dict[str, Any]]


def calls(server: Launched, *wanted: Call, asynchronous: bool = False) -> list[Any]:
    """What the client returns for each call."""
    assert PYTHON.exists(), f"{PYTHON} is missing: run `make clients`, with the same VENV as for the tests"
    ran = subprocess.run(
        [PYTHON, SCRIPT, server.url, *(["async"] if asynchronous else [])],
        input=json.dumps(wanted),
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    results: list[Any] = json.loads(ran.stdout)
    return results


@pytest.fixture(params=[False, True], ids=["Client", "AsyncClient"])
def asynchronous(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_answers_and_streams(reciting: Launched, asynchronous: bool) -> None:
    answer, stopped, full_text, events = calls(
        reciting,
        ("generate", "a", {"max_new_tokens": 40}),
        ("generate", "a", {"max_new_tokens": 40, "stop_sequences": ["zzz", "ghi"]}),
        ("generate", "xya", {"max_new_tokens": 2, "return_full_text": True, "truncate": 2}),
        ("generate_stream", "!", {"max_new_tokens": 10}),
        asynchronous=asynchronous,
    )
    assert answer["generated_text"] == ALPHABET
    assert answer["details"]["finish_reason"] == "eos_token"
    assert answer["details"]["generated_tokens"] == len(answer["details"]["tokens"]) == len(ALPHABET) + 1
    assert stopped["generated_text"] == "bcdefghi"
    assert stopped["details"]["finish_reason"] == "stop_sequence"
    assert full_text["generated_text"] == "xyabc"
    assert "".join(event["token"]["text"] for event in events) == events[-1]["generated_text"] == "🦊é→!"
    assert events[-1]["details"] == {"finish_reason": "length", "generated_tokens": 10, "seed": None}
    assert all(event["details"] is None for event in events[:-1])


def test_details_of_all_kinds(tiny: Launched, asynchronous: bool) -> None:
    sampling = {"max_new_tokens": 6, "do_sample": True, "temperature": 0.9, "top_k": 20, "top_p": 0.9, "typical_p": 0.9}
    penalties = {"repetition_penalty": 1.1, "frequency_penalty": 0.5}
    prefill, seeded, again, best, top = calls(
        tiny,
        ("generate", "hello", {"max_new_tokens": 1, "decoder_input_details": True}),
        ("generate", "hello", {**sampling, **penalties, "seed": 42}),
        ("generate", "hello", {**sampling, **penalties, "seed": 42}),
        ("generate", "hello", {**sampling, "best_of": 2}),
        ("generate_stream", "hello", {"max_new_tokens": 2, "top_n_tokens": 3}),
        asynchronous=asynchronous,
    )
    assert [token["text"] for token in prefill["details"]["prefill"]] == list("hello")
    assert prefill["details"]["prefill"][0]["logprob"] is None
    assert seeded == again
    assert seeded["details"]["seed"] == 42
    assert len(best["details"]["best_of_sequences"]) == 1
    assert [len(event["top_tokens"]) for event in top] == [3, 3]


def test_what_is_refused_raises_the_clients_own_errors(reciting: Launched, asynchronous: bool) -> None:
    too_long = {"max_new_tokens": 5000}
    results = calls(
        reciting,
        ("generate", "a", too_long),
        ("generate_stream", "a", too_long),
        ("generate", "a", {"stop_sequences": list("abcde")}),
        asynchronous=asynchronous,
    )
    assert [result["error"] for result in results] == ["ValidationError"] * 3
    assert f"`inputs` tokens + `max_new_tokens` must be <= {POSITIONS}" in results[0]["message"]
    assert "`stop` supports up to 4 stop sequences. Given: 5" in results[2]["message"]


def test_a_server_that_is_full_raises_overloaded_error(reciting: Launched, asynchronous: bool) -> None:
    with full(reciting):
        results = calls(reciting, ("generate", "a", {}), ("generate_stream", "a", {}), asynchronous=asynchronous)
    assert results == [{"error": "OverloadedError", "message": "Model is overloaded"}] * 2


def test_chats(embedded: Launched, asynchronous: bool) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    answer, chunks = calls(
        embedded,
        ("chat", question, {"max_tokens": 30, "temperature": 0}),
        ("chat", question, {"max_tokens": 30, "temperature": 0, "stream": True}),
        asynchronous=asynchronous,
    )
    text = answer["choices"][0]["message"]["content"]
    assert "Paris" in text
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == text
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
