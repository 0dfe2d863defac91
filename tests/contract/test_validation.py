"""Every row of TGI's validation, in its order, with its message. Limits: 100 input, 120 total, best_of 2, 4 stops."""

from __future__ import annotations

from typing import Any

import pytest
import scripted

TWO_STOPS_TOO_MANY = [str(i) for i in range(6)]
SAMPLING_FOR_BEST_OF = "you must use sampling when `best_of` is > 1"
TEMPERATURE = "`temperature` must be strictly positive"
REPETITION = "`repetition_penalty` must be strictly positive"
FREQUENCY = "`frequency_penalty` must be >= -2.0 and <= 2.0"
TOP_P = "`top_p` must be > 0.0 and < 1.0"
TYPICAL_P = "`typical_p` must be > 0.0 and < 1.0"
TOP_K = "`top_k` must be strictly positive"
NO_TOKENS = "`max_new_tokens` must be strictly positive"
TOO_MANY_STOPS = "`stop` supports up to 4 stop sequences. Given: 6"
SEED_WITH_BEST_OF = "`seed` must not be set when `best_of` > 1"
TOP_N = "`top_n_tokens` must be >= 0 and <= 5. Given: 6"
EMPTY = "`inputs` cannot be empty"
TRUNCATE_0 = "`truncate` must be strictly positive and less than 100. Given: 0"
TRUNCATE_101 = "`truncate` must be strictly positive and less than 100. Given: 101"
STREAM_BEST_OF = "`best_of` != 1 is not supported when streaming tokens"
STREAM_DETAILS = "`decoder_input_details` == true is not supported when streaming tokens"

BOTH_KINDS = [
    pytest.param({"best_of": 1, "temperature": 0}, TEMPERATURE, id="2: temperature 0"),
    pytest.param({"temperature": -0.1}, TEMPERATURE, id="2: temperature below 0"),
    pytest.param({"temperature": 1e-60}, TEMPERATURE, id="2: temperature that is 0 in 32 bits"),
    pytest.param({"repetition_penalty": 0}, REPETITION, id="3: repetition_penalty 0"),
    pytest.param({"repetition_penalty": -1.5}, REPETITION, id="3: repetition_penalty below 0"),
    pytest.param({"frequency_penalty": 2.01}, FREQUENCY, id="4: frequency_penalty above 2"),
    pytest.param({"frequency_penalty": -2.01}, FREQUENCY, id="4: frequency_penalty below -2"),
    pytest.param({"top_p": 0}, TOP_P, id="5: top_p 0"),
    pytest.param({"top_p": 1.0}, TOP_P, id="5: top_p 1"),
    pytest.param({"top_p": 0.99999999999}, TOP_P, id="5: top_p that is 1 in 32 bits"),
    pytest.param({"typical_p": 0.0}, TYPICAL_P, id="6: typical_p 0"),
    pytest.param({"typical_p": 1}, TYPICAL_P, id="6: typical_p 1"),
    pytest.param({"top_k": 0}, TOP_K, id="7: top_k 0"),
    pytest.param({"top_k": -3}, TOP_K, id="7: top_k below 0"),
    pytest.param({"max_new_tokens": 0}, NO_TOKENS, id="8: max_new_tokens 0"),
    pytest.param({"stop": TWO_STOPS_TOO_MANY}, TOO_MANY_STOPS, id="9: too many stops"),
    pytest.param({"top_n_tokens": 6}, TOP_N, id="11: top_n_tokens above the limit"),
    pytest.param({"inputs": ""}, EMPTY, id="12: no inputs"),
    pytest.param({"truncate": 0}, TRUNCATE_0, id="13: truncate 0"),
    pytest.param({"truncate": 101}, TRUNCATE_101, id="13: truncate above the limit"),
    pytest.param(
        {"inputs": "x" * 21, "max_new_tokens": 100},
        "`inputs` tokens + `max_new_tokens` must be <= 120. Given: 21 `inputs` tokens and 100 `max_new_tokens`",
        id="16: too many tokens in all",
    ),
    pytest.param(
        {"inputs": "x", "max_new_tokens": 4_294_967_295},
        "`inputs` tokens + `max_new_tokens` must be <= 120. Given: 1 `inputs` tokens and 4294967295 `max_new_tokens`",
        id="16: the user's own number, however large",
    ),
    pytest.param(
        {"inputs": "x" * 121},
        "`inputs` tokens + `max_new_tokens` must be <= 120. Given: 121 `inputs` tokens and 0 `max_new_tokens`",
        id="16: a prompt that leaves no room",
    ),
    pytest.param(
        {"inputs": "x" * 101, "max_new_tokens": 1},
        "`inputs` must have less than 100 tokens. Given: 101",
        id="17: a prompt that is too long",
    ),
    pytest.param({"inputs": "x" * 120}, "`inputs` must have less than 100 tokens. Given: 120", id="17: up to the brim"),
    pytest.param({"adapter_id": "mine"}, "`adapter_id` is not supported yet", id="not yet: adapter_id"),
]

ORDER: list[tuple[str, dict[str, Any]]] = [
    (TEMPERATURE, {"temperature": 0}),
    (REPETITION, {"repetition_penalty": 0}),
    (FREQUENCY, {"frequency_penalty": 3}),
    (TOP_P, {"top_p": 0}),
    (TYPICAL_P, {"typical_p": 0}),
    (TOP_K, {"top_k": 0}),
    (NO_TOKENS, {"max_new_tokens": 0}),
    (TOO_MANY_STOPS, {"stop": TWO_STOPS_TOO_MANY}),
    (SEED_WITH_BEST_OF, {"seed": 1, "best_of": 2}),
    (TOP_N, {"top_n_tokens": 6}),
    (EMPTY, {"inputs": ""}),
    (TRUNCATE_0, {"truncate": 0}),
]


def body(fields: dict[str, Any], **more: Any) -> dict[str, Any]:
    parameters = {key: value for key, value in fields.items() if key != "inputs"}
    return {"inputs": fields.get("inputs", "hello"), "parameters": parameters, **more}


def refusal(message: str) -> dict[str, str]:
    return {"error": f"Input validation error: {message}", "error_type": "validation"}


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
@pytest.mark.parametrize(("fields", "message"), BOTH_KINDS)
async def test_a_request_is_refused_with_tgis_words(path: str, fields: dict[str, Any], message: str) -> None:
    async with scripted.running() as router:
        response = await router.client.post(path, json=body(fields))
        assert (response.status_code, response.json()) == (422, refusal(message))
        assert response.headers["content-type"] == "application/json"
        assert not any(name.startswith("x-") for name in response.headers)
        assert router.batcher.seen == []
        assert router.permits_taken == 0
        assert router.metrics.request_failure.value(err="validation") == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param({"best_of": 3, "do_sample": True}, "`best_of` must be > 0 and <= 2. Given: 3", id="0d"),
        pytest.param({"best_of": 2}, SAMPLING_FOR_BEST_OF, id="1"),
        pytest.param({"best_of": 2, "temperature": 0.5, "seed": 1}, SEED_WITH_BEST_OF, id="10"),
    ],
)
async def test_best_of_is_refused_when_not_streamed(fields: dict[str, Any], message: str) -> None:
    async with scripted.running() as router:
        for path in ("/generate", "/"):
            response = await router.client.post(path, json=body(fields))
            assert (response.status_code, response.json()) == (422, refusal(message))


async def test_0c_best_of_where_it_is_switched_off() -> None:
    async with scripted.running(max_best_of=1) as router:
        response = await router.client.post("/generate", json=body({"best_of": 2, "do_sample": True}))
        assert response.json() == refusal("`best_of` != 1 is not allowed for this endpoint")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param({"best_of": 2, "do_sample": True}, STREAM_BEST_OF, id="0a: two"),
        pytest.param({"best_of": 0}, STREAM_BEST_OF, id="0a: zero"),
        pytest.param({"best_of": 3, "decoder_input_details": True}, STREAM_BEST_OF, id="0a comes before 0b"),
        pytest.param({"decoder_input_details": True, "temperature": 0}, STREAM_DETAILS, id="0b comes before 2"),
    ],
)
async def test_what_cannot_be_streamed(fields: dict[str, Any], message: str) -> None:
    async with scripted.running() as router:
        streamed = await router.client.post("/generate_stream", json=body(fields))
        compat = await router.client.post("/", json=body(fields, stream=True))
        assert streamed.json() == compat.json() == refusal(message)
        assert streamed.status_code == compat.status_code == 422


@pytest.mark.parametrize("first", range(len(ORDER)), ids=[message[:30] for message, _ in ORDER])
async def test_the_first_failure_wins(first: int) -> None:
    """A request that breaks a rule and all that come after it hears of that rule."""
    fields: dict[str, Any] = {"do_sample": True}
    for _, broken in ORDER[first:]:
        fields |= broken
    async with scripted.running() as router:
        response = await router.client.post("/generate", json=body(fields))
        assert response.json() == refusal(ORDER[first][0])


async def test_1_comes_before_all_others() -> None:
    broken: dict[str, Any] = {}
    for _, more in ORDER:
        broken |= more
    fields = {key: value for key, value in broken.items() if key not in ("temperature", "top_k", "top_p", "typical_p")}
    async with scripted.running() as router:
        response = await router.client.post("/generate", json=body(fields))
        assert response.json() == refusal(SAMPLING_FOR_BEST_OF)


async def test_15_a_token_that_the_model_does_not_know() -> None:
    async with scripted.running(vocab_size=200) as router:
        response = await router.client.post("/generate", json=body({"inputs": "a</s>"}))
        assert response.json() == refusal("tokenizer error the text holds token 256, the model knows 200 tokens")


async def test_18_grammar_support_is_switched_off() -> None:
    async with scripted.running(disable_grammar_support=True) as router:
        response = await router.client.post("/generate", json=body({"grammar": {"type": "regex", "value": "a"}}))
        assert response.json() == refusal("grammar is not supported")


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"frequency_penalty": -2.0}, id="frequency_penalty -2"),
        pytest.param({"frequency_penalty": 2.0}, id="frequency_penalty 2"),
        pytest.param({"best_of": 0}, id="best_of 0 is 1"),
        pytest.param({"stop": ["a", "b", "c", "d"]}, id="four stops"),
        pytest.param({"top_n_tokens": 0}, id="top_n_tokens 0"),
        pytest.param({"truncate": 100}, id="truncate at the limit"),
        pytest.param({"inputs": "x" * 100}, id="inputs at the limit"),
        pytest.param({"inputs": "x" * 100, "max_new_tokens": 20}, id="total at the limit"),
        pytest.param({"inputs": "x" * 1000, "truncate": 5, "max_new_tokens": 115}, id="truncated, it fits"),
        pytest.param({"seed": 18_446_744_073_709_551_615}, id="largest seed"),
        pytest.param({"best_of": 2, "top_k": 1}, id="top_k is sampling"),
        pytest.param({"watermark": False, "grammar": None, "adapter_id": None}, id="asking for nothing"),
        pytest.param({"temperature": None, "seed": None, "return_full_text": None}, id="null is absent"),
    ],
)
async def test_what_is_allowed(fields: dict[str, Any]) -> None:
    async with scripted.running() as router:
        response = await router.client.post("/generate", json=body(fields))
        assert response.status_code == 200, response.text


async def test_a_full_server_validates_nothing() -> None:
    async with scripted.running(max_concurrent_requests=0) as router:
        invalid = await router.client.post("/generate", json=body({"temperature": 0}))
        assert invalid.status_code == 429
        assert invalid.json() == {"error": "Model is overloaded", "error_type": "overloaded"}


async def test_the_shape_comes_before_the_permits_of_all_copies() -> None:
    async with scripted.running(max_concurrent_requests=1) as router:
        assert (await router.client.post("/generate", json=body({"best_of": 9}))).status_code == 422
        copies = await router.client.post("/generate", json=body({"best_of": 2, "do_sample": True}))
        assert copies.status_code == 429
