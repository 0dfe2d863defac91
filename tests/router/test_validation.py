"""GenerateRequest + Limits + ids -> ValidRequest. The messages are tested in tests/contract/test_validation.py."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import limits
from text_generation_router.errors import ValidationError
from text_generation_router.generate_request import Caller, GenerateParameters, GenerateRequest
from text_generation_router.scheduling.requests import Sampling
from text_generation_router.validation import build_request, check_parameters, check_shape


def request(inputs: str = "hello", **parameters: Any) -> GenerateRequest:
    return GenerateRequest(inputs, GenerateParameters(**parameters))


@pytest.mark.parametrize(
    ("parameters", "sampling"),
    [
        pytest.param({}, Sampling(), id="greedy, every step off"),
        pytest.param({"do_sample": True}, Sampling(do_sample=True), id="asked for"),
        pytest.param({"temperature": 1.0}, Sampling(), id="a neutral temperature changes nothing"),
        pytest.param({"temperature": 0.5}, Sampling(temperature=0.5, do_sample=True), id="temperature samples"),
        pytest.param({"top_k": 3}, Sampling(top_k=3, do_sample=True), id="top_k samples"),
        pytest.param({"top_p": 0.5}, Sampling(top_p=0.5, do_sample=True), id="top_p samples"),
        pytest.param({"typical_p": 0.5}, Sampling(typical_p=0.5, do_sample=True), id="typical_p samples"),
        pytest.param({"repetition_penalty": 2.0}, Sampling(repetition_penalty=2.0), id="penalties do not"),
        pytest.param({"frequency_penalty": -2.0}, Sampling(frequency_penalty=-2.0), id="nor this one"),
    ],
)
def test_sampling(parameters: dict[str, Any], sampling: Sampling) -> None:
    assert check_parameters(request(**parameters), limits()).sampling == sampling


def test_floats_are_rounded_to_what_the_shards_compute_with() -> None:
    checked = check_parameters(request(temperature=0.1), limits())
    assert checked.sampling.temperature == pytest.approx(0.1)
    assert checked.sampling.temperature != 0.1


def test_the_rest_is_passed_on() -> None:
    checked = check_parameters(
        request(stop=("a",), top_n_tokens=2, decoder_input_details=True, seed=5, truncate=3), limits()
    )
    assert checked.seed == 5
    valid = build_request(checked, [1, 2, 3, 4], limits(), seed=9, caller=Caller(traceparent="t", tenant=b"s"))
    assert (valid.input_ids, valid.sampling.seed) == ([2, 3, 4], 9)
    assert (valid.traceparent, valid.cache_salt) == ("t", b"s")
    assert (valid.stop_sequences, valid.top_n_tokens, valid.decoder_input_details) == (("a",), 2, True)
    assert valid.max_new_tokens == 117


def test_chat_prompts_have_their_special_tokens_already() -> None:
    asked = GenerateRequest("x", GenerateParameters(), add_special_tokens=False)
    assert check_parameters(asked, limits()).add_special_tokens is False


def test_a_prompt_that_is_no_token_at_all_is_empty() -> None:
    with pytest.raises(ValidationError, match="`inputs` cannot be empty"):
        build_request(check_parameters(request(), limits()), [], limits(), seed=1)


@given(
    num_inputs=st.integers(1, 300),
    max_new_tokens=st.none() | st.integers(1, 300),
    truncate=st.none() | st.integers(1, 100),
)
def test_what_is_valid_fits(num_inputs: int, max_new_tokens: int | None, truncate: int | None) -> None:
    checked = check_parameters(request(max_new_tokens=max_new_tokens, truncate=truncate), limits())
    ids = list(range(num_inputs))
    try:
        valid = build_request(checked, ids, limits(), seed=1)
    except ValidationError:
        used = min(num_inputs, truncate or num_inputs)
        assert used > 100 or used + (max_new_tokens or 0) > 120
        return
    assert valid.input_ids == ids[-len(valid.input_ids) :]
    assert 1 <= len(valid.input_ids) <= 100
    assert 1 <= valid.max_new_tokens <= 120 - len(valid.input_ids)
    assert max_new_tokens in (None, valid.max_new_tokens)


def test_the_shape_is_checked_for_the_kind_of_answer() -> None:
    for fine in (request(), request(best_of=1)):
        check_shape(fine, limits(), streaming=True)
    check_shape(request(best_of=2, decoder_input_details=True), limits(), streaming=False)
    for streaming, bad in ((True, request(best_of=2)), (True, request(decoder_input_details=True))):
        with pytest.raises(ValidationError):
            check_shape(bad, limits(), streaming=streaming)
