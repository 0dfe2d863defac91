"""What a server tells about itself: `/info`, `/tokenize`, `/metrics`, health, keys, headers, number types, its log."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from integration.asking import body, generate, metrics, stream, token_ids, wait_until_idle
from integration.launched import Launched, message_of, serving
from integration.reciting import POSITIONS

TGI_METRICS = [
    "tgi_request_count",
    "tgi_request_success",
    'tgi_request_failure{err="validation"}',
    'tgi_request_failure{err="overloaded"}',
    "tgi_request_duration_count",
    "tgi_request_validation_duration_count",
    "tgi_request_queue_duration_count",
    "tgi_request_inference_duration_count",
    "tgi_request_mean_time_per_token_duration_count",
    "tgi_request_generated_tokens_sum",
    "tgi_request_input_length_sum",
    "tgi_request_max_new_tokens_sum",
    "tgi_queue_size",
    "tgi_batch_current_size",
    "tgi_batch_current_max_tokens",
    'tgi_batch_inference_count{method="prefill"}',
    'tgi_batch_inference_count{method="decode"}',
    'tgi_batch_inference_duration_count{method="decode"}',
    'tgi_batch_forward_duration_count{method="decode"}',
    "tgi_request_duration_seconds_count",
    "tgi_batch_size",
]


def test_info_of_a_folder(reciting: Launched) -> None:
    info = reciting.client.get("/info").json()
    assert Path(info.pop("model_id")).is_dir()
    assert info == {
        "model_sha": None,
        "model_pipeline_tag": None,
        "max_concurrent_requests": 128,
        "max_best_of": 2,
        "max_stop_sequences": 4,
        "max_input_tokens": POSITIONS - 1,
        "max_total_tokens": POSITIONS,
        "validation_workers": 2,
        "max_client_batch_size": 4,
        "router": "text-generation-router",
        "version": version("text-generation-inference"),
        "sha": None,
        "docker_label": None,
    }


def test_info_of_the_embedded_model(embedded: Launched) -> None:
    assert embedded.client.get("/info").json()["model_id"] == "embedded"


@pytest.mark.parametrize("path", ["/", "/health", "/ping", "/live"])
def test_a_server_that_is_ready_is_healthy(embedded: Launched, path: str) -> None:
    response = embedded.client.get(path)
    assert (response.status_code, response.content) == (200, b"")


def test_tokens_of_a_text_are_told_with_their_bytes(embedded: Launched) -> None:
    text = "Hello 🦊, naïve world"
    tokens = embedded.client.post("/tokenize", json={"inputs": text}).json()
    own = [token for token in tokens if token["stop"]]
    assert all(text.encode()[t["start"] : t["stop"]].decode(errors="replace") == t["text"] for t in own)
    assert {at for token in own for at in range(token["start"], token["stop"])} == set(range(len(text.encode())))
    prefill = stream(embedded, text, max_new_tokens=1)[-1]["details"]["input_length"]
    assert prefill == len(tokens), "what is told is what is computed"


def test_metrics_have_tgis_names_and_count_what_happens(reciting: Launched) -> None:
    before = wait_until_idle(reciting)
    assert before.keys() >= set(TGI_METRICS)
    generate(reciting, "abc", max_new_tokens=7)
    stream(reciting, "abc", max_new_tokens=5)
    assert reciting.client.post("/generate", json=body("a", temperature=0.0)).status_code == 422
    after = wait_until_idle(reciting)
    grown = {name: after[name] - before[name] for name in TGI_METRICS}
    assert grown["tgi_request_count"] == 3
    assert grown["tgi_request_success"] == 2
    assert grown['tgi_request_failure{err="validation"}'] == 1
    assert grown["tgi_request_generated_tokens_sum"] == 12
    assert grown["tgi_request_input_length_sum"] == 6
    assert grown["tgi_request_max_new_tokens_sum"] == 12
    assert grown['tgi_batch_inference_count{method="prefill"}'] == 2
    assert grown['tgi_batch_inference_count{method="decode"}'] >= 10
    assert grown["tgi_request_duration_count"] == grown["tgi_request_duration_seconds_count"] == 2


def test_an_answer_carries_tgis_headers(reciting: Launched) -> None:
    headers = reciting.client.post("/generate", json=body("abc", max_new_tokens=4)).headers
    assert headers["x-compute-type"] == "1-cpu"
    assert headers["x-compute-characters"] == headers["x-prompt-tokens"] == "3"
    assert headers["x-generated-tokens"] == "4"
    assert float(headers["x-compute-time"]) > 0
    for name in ("total", "validation", "queue", "inference"):
        assert int(headers[f"x-{name}-time"]) <= int(headers["x-total-time"])
    assert int(headers["x-time-per-token"]) <= int(headers["x-inference-time"])


def test_a_served_request_is_a_line_of_the_log(reciting: Launched) -> None:
    seed = 20_161_121  # by which its line is found among those of the tests before, which may still be on their way
    generate(reciting, "secret", max_new_tokens=2, seed=seed)

    def found() -> list[dict[str, Any]]:
        done = [line for line in reciting.lines if message_of(line) == "Success"]
        return [line for line in done if line["span"]["parameters"]["seed"] == seed]

    while not found():
        assert reciting.process.poll() is None
        time.sleep(0.05)
    [line] = found()
    assert line["level"] == "INFO"
    assert line["span"]["name"] == "generate"
    assert {"total_time", "validation_time", "queue_time", "inference_time", "time_per_token", "seed"} <= set(
        line["span"]
    )
    assert "secret" not in reciting.text, "nobody's prompt is written down"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_behind_a_key(tiny_model: Callable[..., Path], dtype: str) -> None:
    """The weights are float32: ``--dtype`` converts them."""
    folder = tiny_model("llama")
    with serving("--model-id", str(folder), "--dtype", dtype, "--api-key", "open sesame") as server:
        for headers in ({}, {"authorization": "Bearer sesame"}):
            for path in ("/", "/generate", "/generate_stream", "/tokenize"):
                refused = server.client.post(path, json=body("hi"), headers=headers)
                assert (refused.status_code, refused.content) == (401, b"")
        assert server.client.get("/health").status_code == 200
        assert metrics(server)["tgi_request_count"] == 0
        server.client.headers["authorization"] = "Bearer open sesame"
        answers: list[dict[str, Any]] = [generate(server, "hi", max_new_tokens=10) for _ in range(2)]
        assert token_ids(answers[0]) == token_ids(answers[1])
        assert len(token_ids(answers[0])) == 10
        assert "open sesame" not in server.text
