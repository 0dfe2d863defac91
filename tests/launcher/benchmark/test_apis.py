"""Bodies that servers take, and the events that they were seen to send."""

import dataclasses
import json
from collections.abc import Callable

import pytest
from text_generation_launcher.benchmark.apis import Api, Extras, Piece, Usage, chat, completions, native
from text_generation_launcher.benchmark.config import Sampling
from text_generation_launcher.benchmark.errors import BenchmarkError

APIS = {
    "native": native(),
    "completions": completions("m"),
    "transformers": completions(extras=Extras.NONE),
    "chat": chat("m"),
}

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
            "chat",
            {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]},
            Piece(),
            id="the first event of a chat tells the role alone",
        ),
        pytest.param(
            "chat", {"choices": [{"delta": {"content": "a"}, "finish_reason": None}]}, Piece(True), id="chat token"
        ),
        pytest.param(
            "chat",
            {"choices": [{"delta": {"role": "assistant", "content": "a"}, "finish_reason": "length"}]},
            Piece(True),
            id="TGI's chat tells the role with every token",
        ),
        pytest.param(
            "chat",
            {"choices": [{"delta": {"reasoning_content": "hm"}, "finish_reason": None}]},
            Piece(True),
            id="thoughts are tokens",
        ),
        pytest.param(
            "native", {"token": TOKEN, "details": {"generated_tokens": 2}}, Piece(True, Usage(0, 2)), id="TGI 1"
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


EVERYTHING = Sampling(
    temperature=0.5,
    top_k=4,
    top_p=0.9,
    typical_p=0.8,
    repetition_penalty=1.1,
    frequency_penalty=0.1,
    watermark=True,
    do_sample=True,
    top_n_tokens=3,
)


def test_the_native_route_takes_every_sampling_flag() -> None:
    parameters = native(EVERYTHING).body("x", 7)["parameters"]
    assert parameters == {"max_new_tokens": 7, "details": True, **dataclasses.asdict(EVERYTHING)}
    assert native(Sampling(top_p=0.5)).body("x", 7)["parameters"]["do_sample"] is True
    assert native().body("x", 7)["parameters"] == {"max_new_tokens": 7, "details": True, "do_sample": False}


def test_openai_has_names_for_some_of_them() -> None:
    sampling = Sampling(temperature=0.5, top_p=0.9, frequency_penalty=0.1, top_n_tokens=3)
    shared = {"model": "m", "temperature": 0.5, "top_p": 0.9, "frequency_penalty": 0.1, "stream": True, "max_tokens": 7}
    assert completions("m", sampling, Extras.NONE).body("x", 7) == shared | {"prompt": "x", "logprobs": 3}
    messages = [{"role": "user", "content": "x"}]
    assert chat("m", sampling, Extras.NONE).body("x", 7) == shared | {
        "messages": messages,
        "logprobs": True,
        "top_logprobs": 3,
    }
    assert completions(sampling=Sampling(do_sample=True)).body("x", 7)["temperature"] == 1.0
    assert completions().body("x", 7)["temperature"] == 0


@pytest.mark.parametrize(
    "sampling",
    [Sampling(top_k=4), Sampling(typical_p=0.5), Sampling(repetition_penalty=1.1), Sampling(watermark=True)],
)
@pytest.mark.parametrize("api", [completions, chat])
def test_what_openai_has_no_name_for_is_refused(api: Callable[..., Api], sampling: Sampling) -> None:
    with pytest.raises(BenchmarkError, match="is no parameter of OpenAI's API"):
        api("m", sampling)
