"""`/generate` and `POST /`: bodies, key order and headers, as in TGI."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import scripted
from text_generation_router.errors import GenerationFailed
from text_generation_router.scheduling.requests import (
    FinishReason,
    PrefillEvent,
    PrefillToken,
    QueuedRequest,
    Token,
    TokenEvent,
)

HEADERS = {
    "x-compute-type", "x-compute-time", "x-compute-characters", "x-total-time", "x-validation-time", "x-queue-time",
    "x-inference-time", "x-time-per-token", "x-prompt-tokens", "x-cached-tokens", "x-generated-tokens",
}  # fmt: skip
TOKENS = (
    '[{"id":1,"text":"Hel","logprob":-0.5,"special":false},{"id":2,"text":"lo","logprob":-1.0,"special":false},'
    '{"id":3,"text":" wörld","logprob":-1.5,"special":false}]'
)


async def ask(path: str, parameters: dict[str, Any] | None = None, **options: Any) -> str:
    body: dict[str, Any] = {"inputs": "My né"}
    if parameters is not None:
        body["parameters"] = parameters
    async with scripted.running(**options) as router:
        response = await router.client.post(path, json=body)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"] == "application/json"
        return str(response.text)


async def test_the_shortest_answer() -> None:
    assert await ask("/generate") == '{"generated_text":"Hello wörld"}'


async def test_details() -> None:
    assert await ask("/generate", {"details": True}) == (
        '{"generated_text":"Hello wörld","details":{"finish_reason":"length","generated_tokens":3,"seed":null,'
        f'"prefill":[],"tokens":{TOKENS}}}}}'
    )


async def test_the_seed_is_told_where_something_was_sampled() -> None:
    assert '"seed":7,' in await ask("/generate", {"details": True, "do_sample": True, "seed": 7})
    assert '"seed":7,' in await ask("/generate", {"details": True, "top_k": 5, "seed": 7})
    assert '"seed":null,' in await ask("/generate", {"details": True, "temperature": 1.0, "seed": 7})


async def test_top_tokens() -> None:
    text = await ask("/generate", {"details": True, "top_n_tokens": 1})
    top = '[{"id":1000,"text":"top0","logprob":-1.5,"special":false}]'
    assert text.endswith(f',"tokens":{TOKENS},"top_tokens":[{top},{top},{top}]}}}}')


async def test_prefill_forces_details_and_its_first_token_has_no_logprob() -> None:
    def script(queued: QueuedRequest) -> None:
        assert queued.request.decoder_input_details
        queued.stream.put(PrefillEvent([PrefillToken(64, "a", None), PrefillToken(65, "b", -0.3400000035762787)]))
        scripted.say(queued, "c")

    text = await ask("/generate", {"decoder_input_details": True}, script=script)
    assert '"prefill":[{"id":64,"text":"a","logprob":null},{"id":65,"text":"b","logprob":-0.34}],"tokens"' in text


async def test_best_of() -> None:
    texts = iter(["worse", "better"])

    def script(queued: QueuedRequest) -> None:
        text = next(texts)
        token = Token(9, text, -5.0 if text == "worse" else -0.5, special=False)
        queued.stream.put(TokenEvent(1, token, None, scripted.finished(text, 1, queued, FinishReason.EOS_TOKEN)))
        queued.stream.close()

    parameters = {"best_of": 2, "do_sample": True, "details": True, "return_full_text": True}
    async with scripted.running(script=script) as router:
        response = await router.client.post("/generate", json={"inputs": "> ", "parameters": parameters})
        assert response.headers["x-generated-tokens"] == "1", "of the choice that is returned"
        answer = response.json()
        assert list(answer["details"]) == [
            "finish_reason", "generated_tokens", "seed", "prefill", "tokens", "best_of_sequences",
        ]  # fmt: skip
        [other] = answer["details"]["best_of_sequences"]
        assert answer["generated_text"] == "> better"
        assert list(other) == ["generated_text", "finish_reason", "generated_tokens", "seed", "prefill", "tokens"]
        assert (other["generated_text"], other["finish_reason"]) == ("> worse", "eos_token")
        assert router.metrics.request_success.value() == router.metrics.request_count.value() == 1


@pytest.mark.parametrize(
    ("path", "asked", "by_default", "expected"),
    [
        pytest.param("/generate", None, True, "Hello wörld", id="/generate: never by itself"),
        pytest.param("/generate", True, False, "My néHello wörld", id="/generate: when asked"),
        pytest.param("/", None, True, "My néHello wörld", id="/: a text-generation model does"),
        pytest.param("/", None, False, "Hello wörld", id="/: other models do not"),
        pytest.param("/", False, True, "Hello wörld", id="/: unless asked not to"),
    ],
)
async def test_return_full_text(path: str, asked: bool | None, by_default: bool, expected: str) -> None:
    text = await ask(path, {"return_full_text": asked}, full_text_by_default=by_default)
    answer = f'{{"generated_text":"{expected}"}}'
    assert text == (f"[{answer}]" if path == "/" else answer)


async def test_absent_parameters_sample_and_empty_ones_do_not() -> None:
    async with scripted.running() as router:
        for body in ({"inputs": "x"}, {"inputs": "x", "parameters": {}}):
            await router.client.post("/generate", json=body)
        assert [queued.request.sampling.do_sample for queued in router.batcher.seen] == [True, False]


async def test_what_reaches_the_queue() -> None:
    parameters = {
        "temperature": 0.5, "repetition_penalty": 1.5, "frequency_penalty": 0.25, "top_k": 9, "top_p": 0.5,
        "typical_p": 0.75, "max_new_tokens": 11, "stop": ["a", "b"], "truncate": 2, "seed": 12, "top_n_tokens": 3,
    }  # fmt: skip
    traceparent = f"00-{'a' * 32}-{'b' * 16}-01"
    async with scripted.running() as router:
        await router.client.post("/generate", json={"inputs": "abc", "parameters": parameters})
        headers = {"traceparent": traceparent}
        await router.client.post("/generate", json={"inputs": "abc"}, headers=headers)
        await router.client.post("/generate", json={"inputs": "abc"}, headers={"traceparent": "00-zz-\x7f-01"})
        [request, traced, malformed] = [queued.request for queued in router.batcher.seen]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.typical_p) == (0.5, 9, 0.5, 0.75)
    assert (sampling.repetition_penalty, sampling.frequency_penalty) == (1.5, 0.25)
    assert (sampling.do_sample, sampling.seed) == (True, 12)
    assert (request.max_new_tokens, request.stop_sequences, request.top_n_tokens) == (11, ("a", "b"), 3)
    assert request.inputs == "abc"
    assert request.input_ids == [65, 66], "truncate keeps the last tokens"
    assert (traced.traceparent, malformed.traceparent) == (traceparent, "")
    assert traced.max_new_tokens == 117, "all that is left of the total"


async def test_headers() -> None:
    async with scripted.running() as router:
        response = await router.client.post("/generate", json={"inputs": "My né"})
    headers = response.headers
    assert {name for name in headers if name.startswith("x-")} == HEADERS
    assert headers["x-compute-type"] == "cpu"
    assert headers["x-compute-characters"] == "5"
    assert headers["x-prompt-tokens"] == "6"
    assert headers["x-generated-tokens"] == "3"
    assert (headers["x-queue-time"], headers["x-inference-time"], headers["x-time-per-token"]) == ("2", "300", "99")
    assert float(headers["x-compute-time"]) * 1000 // 1 == int(headers["x-total-time"])


async def test_424_a_failed_generation() -> None:
    def script(queued: QueuedRequest) -> None:
        scripted.say(queued, "lost", end=False)
        queued.stream.fail(GenerationFailed("Server error: out of luck"))

    async with scripted.running(script=script) as router:
        response = await router.client.post("/generate", json={"inputs": "x"})
        message = "Request failed during generation: Server error: out of luck"
        assert (response.status_code, response.json()) == (424, {"error": message, "error_type": "generation"})
        assert router.metrics.request_failure.value(err="generation") == 1


async def test_500_a_generation_that_breaks_off() -> None:
    async with scripted.running(script=lambda queued: queued.stream.close()) as router:
        response = await router.client.post("/generate", json={"inputs": "x"})
        body = {"error": "Incomplete generation", "error_type": "incomplete_generation"}
        assert (response.status_code, response.json()) == (500, body)
        streamed = await router.client.post("/generate_stream", json={"inputs": "x"})
        body = {"error": "Incomplete generation stream", "error_type": "incomplete_generation_stream"}
        assert (streamed.status_code, streamed.json()) == (500, body)


async def test_500_a_defect_tells_nothing_of_itself(caplog: pytest.LogCaptureFixture) -> None:
    def script(queued: QueuedRequest) -> None:
        raise KeyError("0x7f0000 /secret/path")

    async with scripted.running(script=script) as router:
        for path in ("/generate", "/generate_stream"):
            response = await router.client.post(path, json={"inputs": "x"})
            assert response.json() == {"error": "Internal server error", "error_type": "internal"}
            assert response.status_code == 500
        assert router.permits_taken == 0
        assert router.metrics.request_failure.value(err="internal") == 2
    assert "KeyError" in caplog.text


async def test_the_log_has_tgis_fields_and_no_text_of_the_client(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    parameters = {"stop": ["canary"], "max_new_tokens": 5, "top_p": 0.5, "seed": 3}
    async with scripted.running() as router:
        await router.client.post("/generate", json={"inputs": "canary", "parameters": parameters})
        await router.client.post("/generate_stream", json={"inputs": "canary", "parameters": parameters})
    spans = [vars(record)["span"] for record in caplog.records if record.message == "Success"]
    assert [span["name"] for span in spans] == ["generate", "generate_stream"]
    for span in spans:
        assert set(span) == {
            "name", "parameters", "total_time", "validation_time", "queue_time", "inference_time", "time_per_token",
            "seed",
        }  # fmt: skip
        assert span["parameters"]["max_new_tokens"] == 5
        assert (span["queue_time"], span["inference_time"], span["time_per_token"]) == ("2ms", "300ms", "100ms")
        assert span["seed"] == 3
    assert "canary" not in "".join(str(vars(record)) for record in caplog.records if "httpx" not in record.name)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/chat/completions", {"model": "canary"}, 404),
        ("/v1/chat/completions", {"response_format": {"type": "canary"}}, 422),
        ("/v1/chat/completions", {"chat_template_kwargs": {"canary": 1}}, 422),
        ("/v1/chat/completions", {"logit_bias": {"canary": 1}}, 422),
        ("/v1/messages", {"model": "canary", "max_tokens": 5}, 404),
        ("/v1/responses", {"input": [{"type": "canary"}]}, 422),
    ],
)
async def test_what_a_client_sent_is_not_in_the_log(
    path: str, body: dict[str, Any], status: int, caplog: pytest.LogCaptureFixture
) -> None:
    messages = {"messages": [{"role": "user", "content": "canary"}]}
    async with scripted.running() as router:
        response = await router.client.post(path, json=messages | body)
        assert (response.status_code, "canary" in response.text) == (status, True)
    assert f"failed with {status}" in caplog.text
    assert "canary" not in "".join(str(vars(record)) for record in caplog.records if "httpx" not in record.name)


async def test_a_request_that_fails_leaves_a_line_without_the_prompt(caplog: pytest.LogCaptureFixture) -> None:
    async with scripted.running() as router:
        with caplog.at_level("WARNING"):
            body = {"inputs": "a secret", "parameters": {"temperature": 0}}
            assert (await router.client.post("/generate", json=body)).status_code == 422
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == "generate failed with 422: validation"
    assert "secret" not in caplog.text
