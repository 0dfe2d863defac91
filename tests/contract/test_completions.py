"""`/v1/completions` and `/v1/models`: as OpenAI's clients expect them, and TGI's."""

from __future__ import annotations

import json
from typing import Any

import pytest
import scripted
from text_generation_router.scheduling.requests import PrefillEvent, PrefillToken, QueuedRequest

PATH = "/v1/completions"


async def ask(body: dict[str, Any], status: int = 200, **options: Any) -> Any:
    async with scripted.running(**options) as router:
        response = await router.client.post(PATH, json={"prompt": "Hi"} | body)
        assert response.status_code == status, response.text
        await router.idle()
        return response.json()


async def chunks(body: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    async with scripted.running(**options) as router:
        response = await router.client.post(PATH, json={"prompt": "Hi", "stream": True} | body)
        assert response.status_code == 200, response.text
        await router.idle()
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def texts(choices: list[dict[str, Any]]) -> list[tuple[int, str]]:
    return [(choice["index"], choice["text"]) for choice in choices]


def repeat(queued: QueuedRequest) -> None:
    """Says its prompt again, and which answer it is."""
    scripted.say(queued, queued.request.inputs, f" {queued.request.sampling.choice_index}")


async def test_an_answer() -> None:
    answer = await ask({})
    assert answer.pop("id").startswith("cmpl-")
    assert isinstance(answer.pop("created"), int)
    assert answer == {
        "object": "text_completion",
        "model": "test/model",
        "system_fingerprint": scripted.FINGERPRINT,
        "choices": [{"index": 0, "text": "Hello wörld", "logprobs": None, "finish_reason": "length"}],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 3,
            "total_tokens": 5,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


async def test_a_stream() -> None:
    said = await chunks({"stream_options": {"include_usage": True}})
    assert [texts(chunk["choices"]) for chunk in said] == [[(0, "Hel")], [(0, "lo")], [(0, " wörld")], []]
    assert [chunk["choices"][0]["finish_reason"] for chunk in said[:-1]] == [None, None, "length"]
    assert [chunk["usage"] and chunk["usage"]["total_tokens"] for chunk in said] == [None, None, None, 5]


@pytest.mark.parametrize(
    ("prompt", "inputs"),
    [
        ("ab", ["ab"]),
        (["ab", "cd"], ["ab", "cd"]),
        ([64, 65], ["ab"]),
        ([[64, 65], [66]], ["ab", "c"]),
    ],
)
async def test_prompts_are_texts_or_ids(prompt: Any, inputs: list[str]) -> None:
    async with scripted.running() as router:
        response = await router.client.post(PATH, json={"prompt": prompt})
        assert response.status_code == 200, response.text
        requests = [queued.request for queued in router.batcher.seen]
    assert [request.inputs for request in requests] == inputs
    if not isinstance(prompt[0], str):
        assert [request.input_ids for request in requests] == ([prompt] if isinstance(prompt[0], int) else prompt)


async def test_several_prompts_and_several_answers_to_each() -> None:
    answer = await ask({"prompt": ["a", "b"], "n": 2}, script=repeat)
    assert texts(answer["choices"]) == [(0, "a 0"), (1, "a 1"), (2, "b 0"), (3, "b 1")]
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (2, 8)
    said = await chunks({"prompt": ["a", "b"], "n": 2}, script=repeat)
    streamed = dict.fromkeys(range(4), "")
    for chunk in said:
        for index, text in texts(chunk["choices"]):
            streamed[index] += text
    assert streamed == {0: "a 0", 1: "a 1", 2: "b 0", 3: "b 1"}


async def test_the_best_of_several_answers() -> None:
    def script(queued: QueuedRequest) -> None:
        # A token's logprob falls with its index: fewer are better.
        scripted.say(queued, *"xyz"[queued.request.sampling.choice_index :])

    answer = await ask({"best_of": 3, "n": 2}, script=script)
    assert texts(answer["choices"]) == [(0, "z"), (1, "yz")]
    assert answer["usage"]["completion_tokens"] == 6, "all of them were computed"


async def test_an_echo_goes_ahead_of_the_answer() -> None:
    assert texts((await ask({"echo": True}))["choices"]) == [(0, "HiHello wörld")]
    said = await chunks({"echo": True})
    assert [text for chunk in said for _, text in texts(chunk["choices"])] == ["HiHel", "lo", " wörld"]


async def test_logprobs_in_the_old_form() -> None:
    (choice,) = (await ask({"logprobs": 1}))["choices"]
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"] == [-0.5, -1.0, -1.5]
    assert logprobs["text_offset"][0] == 0
    assert len(logprobs["tokens"]) == len(logprobs["text_offset"]) == len(logprobs["top_logprobs"]) == 3
    (choice,) = (await ask({"logprobs": 0}))["choices"]
    assert choice["logprobs"]["top_logprobs"] is None


async def test_logprobs_of_an_echo() -> None:
    def script(queued: QueuedRequest) -> None:
        assert queued.request.decoder_input_details
        assert queued.request.prefill_top_n_tokens == asked
        prompt = [PrefillToken(39, "H", None), PrefillToken(72, "i", -2.0, [(72, -2.0), (39, -3.0)])]
        queued.stream.put(PrefillEvent(prompt))
        scripted.say(queued, "!")

    asked = 2
    (choice,) = (await ask({"logprobs": 2, "echo": True}, script=script, prefill_logprobs=True))["choices"]
    assert choice["logprobs"]["top_logprobs"][:2] == [None, {"i": -2.0, "H": -3.0}]
    asked = 0
    (choice,) = (await ask({"logprobs": 0, "echo": True}, script=script, prefill_logprobs=True))["choices"]
    assert choice["logprobs"]["top_logprobs"] is None
    assert choice["logprobs"]["token_logprobs"] == [None, -2.0, -0.5]
    assert choice["logprobs"]["tokens"][:2] == ["H", "i"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2]


async def test_logprobs_of_a_prompt_have_to_be_known() -> None:
    answer = await ask({"logprobs": 0, "echo": True}, 422)
    assert "`--enable-prefill-logprobs`" in answer["error"]["message"]


async def test_offsets_count_characters_and_not_what_is_not_shown() -> None:
    def script(queued: QueuedRequest) -> None:
        ids = [256, *queued.request.input_ids]  # a token that a tokenizer puts ahead of every text
        queued.stream.put(PrefillEvent([PrefillToken(token_id, "", -1.0) for token_id in ids]))
        scripted.say(queued, "!")

    body = {"prompt": "a\u00f6\U0001f600b", "logprobs": 0, "echo": True}
    (choice,) = (await ask(body, script=script, prefill_logprobs=True))["choices"]
    assert choice["text"].startswith("a\u00f6\U0001f600b")
    assert choice["logprobs"]["text_offset"] == [0, 0, 1, 1, 2, 2, 2, 2, 3, 4]


async def test_a_completion_that_obeys_a_schema() -> None:
    async with scripted.running() as router:
        router.take_any_grammar()
        body = {"prompt": "Hi", "response_format": {"type": "json_object"}}
        assert (await router.client.post(PATH, json=body)).status_code == 200
        assert router.batcher.seen[0].request.grammar is not None


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": []}, "Empty array detected. Do not use an empty array for the prompt."),
        ({"prompt": ["a", 5]}, "an array of one kind"),
        ({"prompt": [512]}, "token ids of a prompt must be less than 512"),
        ({"prompt": [[]]}, "`inputs` cannot be empty"),
        ({"prompt": ""}, "`inputs` cannot be empty"),
        ({"prompt": ["a"] * 5}, "Number of prompts exceeds the maximum allowed batch size of 4"),
        ({"suffix": "x"}, "Suffix is not supported"),
        ({"best_of": 1, "n": 2}, "`best_of` must be >= `n`"),
        ({"logprobs": 21}, "`logprobs` must be"),
        ({"use_beam_search": True}, "`use_beam_search` is not supported"),
        ({"stop_token_ids": [5]}, "`stop_token_ids` is not supported"),
    ],
)
async def test_what_cannot_be_honoured_is_refused(body: dict[str, Any], message: str) -> None:
    assert message in (await ask(body, 422))["error"]["message"]
    assert message in (await ask(body | {"stream": True}, 422))["error"]["message"]


async def test_what_only_a_stream_cannot_have() -> None:
    for body in ({"best_of": 2}, {"echo": True, "logprobs": 1}):
        assert "when streaming" in (await ask(body | {"stream": True}, 422))["error"]["message"]


async def test_one_prompt_that_is_refused_refuses_all() -> None:
    answer = await ask({"prompt": ["a", "b" * 300]}, 422)
    assert "must" in answer["error"]["message"]


async def test_models() -> None:
    async with scripted.running() as router:
        listed = (await router.client.get("/v1/models")).json()
        assert listed["object"] == "list"
        (model,) = listed["data"]
        assert (model["id"], model["object"], model["owned_by"]) == ("test/model", "model", "test/model")
        for name in ("test/model", "tgi"):
            assert (await router.client.get(f"/v1/models/{name}")).json() == model
        unknown = await router.client.get("/v1/models/other")
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")


async def test_all_of_it_is_behind_the_key() -> None:
    async with scripted.running(api_key="secret") as router:
        for method, path in (("GET", "/v1/models"), ("POST", PATH), ("POST", "/v1/chat/completions")):
            response = await router.client.request(method, path)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
