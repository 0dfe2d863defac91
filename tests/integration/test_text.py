"""From tokens to text and back, through the whole stack: stop texts, pieces, special tokens, truncation."""

from __future__ import annotations

from typing import Any

import pytest
from integration.asking import generate, stream
from integration.launched import Launched
from integration.reciting import ALPHABET, FOXES, POSITIONS


def pieces(events: list[dict[str, Any]]) -> str:
    return "".join(event["token"]["text"] for event in events if not event["token"]["special"])


def test_an_answer_ends_with_the_models_end_of_sequence_token(reciting: Launched) -> None:
    answer = generate(reciting, "a")
    assert answer["generated_text"] == ALPHABET
    assert answer["details"]["finish_reason"] == "eos_token"
    assert answer["details"]["generated_tokens"] == len(ALPHABET) + 1
    assert answer["details"]["tokens"][-1]["special"] is True


def test_an_answer_ends_with_the_last_token_asked_for(reciting: Launched) -> None:
    answer = generate(reciting, "a", max_new_tokens=5)
    assert answer["generated_text"] == "bcdef"
    assert answer["details"]["finish_reason"] == "length"


@pytest.mark.slow
def test_without_a_limit_an_answer_ends_where_the_models_positions_end(reciting: Launched) -> None:
    answer = generate(reciting, "AAAA")
    assert answer["details"]["generated_tokens"] == POSITIONS - 4
    assert answer["details"]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        pytest.param(["e"], "bcde", id="one token"),
        pytest.param(["def"], "bcdef", id="several tokens"),
        pytest.param(["dx", "efg", "ef"], "bcdef", id="the first that is complete, whatever their order"),
        pytest.param(["abc"], ALPHABET, id="not across the end of the prompt"),
        pytest.param(["ABC"], ALPHABET, id="one that never comes"),
    ],
)
def test_a_stop_text_ends_the_answer_and_stays_in_it(reciting: Launched, stop: list[str], text: str) -> None:
    answer = generate(reciting, "a", stop=stop)
    assert answer["generated_text"] == text
    assert answer["details"]["finish_reason"] == ("eos_token" if text == ALPHABET else "stop_sequence")
    events = stream(reciting, "a", stop=stop)
    assert pieces(events) == events[-1]["generated_text"] == text


def test_a_stop_text_of_characters_that_are_several_tokens(reciting: Launched) -> None:
    events = stream(reciting, "!", stop=["é→"])
    assert pieces(events) == events[-1]["generated_text"] == "🦊é→"
    assert events[-1]["details"]["finish_reason"] == "stop_sequence"


@pytest.mark.parametrize(
    ("begin", "end"), [(1, 3), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((0, 2), (2, 4)))]
)
def test_a_stop_text_inside_a_token_cuts_that_token(embedded: Launched, begin: int, end: int) -> None:
    """Every token of a text in turn is stopped in, also where a stop text reaches from one into the next."""
    prompt = "Tell me a short story."
    events = stream(embedded, prompt, max_new_tokens=40)
    whole = pieces(events)
    tokens = [event["token"]["text"] for event in events]
    starts = [len("".join(tokens[:index])) for index in range(len(tokens))]
    assert any(len(token) > end for token in tokens)
    for start in starts[::4]:
        stop = whole[start + begin : start + end + 2]
        expected = whole[: whole.index(stop) + len(stop)]
        stopped = stream(embedded, prompt, max_new_tokens=40, stop=[stop])
        assert pieces(stopped) == stopped[-1]["generated_text"] == expected
        assert stopped[-1]["details"]["finish_reason"] == "stop_sequence"
        assert generate(embedded, prompt, max_new_tokens=40, stop=[stop])["generated_text"] == expected


def test_a_character_of_several_tokens_comes_with_its_last(reciting: Launched) -> None:
    events = stream(reciting, "!", max_new_tokens=2 * len(FOXES.encode()))
    texts = [event["token"]["text"] for event in events]
    assert texts == ["", "", "", "🦊", "", "é", "", "", "→", "!"] * 2
    assert events[-1]["generated_text"] == FOXES * 2
    assert [event["generated_text"] for event in events[:-1]] == [None] * (len(events) - 1)
    assert [event["index"] for event in events] == list(range(1, len(events) + 1))


def test_half_a_character_at_the_end_is_left_out(reciting: Launched) -> None:
    assert generate(reciting, "!", max_new_tokens=3)["generated_text"] == ""
    assert generate(reciting, "!", max_new_tokens=5)["generated_text"] == "🦊"


@pytest.mark.parametrize(
    "prompt",
    [
        pytest.param("Tell me of a 🦊 and a naïve 👩\u200d👩\u200d👧.", id="emoji"),
        pytest.param("日本の首都は？", id="no spaces"),
        pytest.param("a\u0301 \ud7ff \U0010ffff", id="the borders of Unicode"),
        pytest.param("\n\t ", id="spaces alone"),
    ],
)
def test_pieces_concatenate_to_the_whole(embedded: Launched, tiny: Launched, prompt: str) -> None:
    """Also of a model that says random bytes."""
    for server in (embedded, tiny):
        for seed in range(3):
            parameters = {"do_sample": True, "temperature": 1.5, "seed": seed, "max_new_tokens": 40}
            events = stream(server, prompt, **parameters)
            assert pieces(events) == events[-1]["generated_text"]
            assert generate(server, prompt, **parameters)["generated_text"] == events[-1]["generated_text"]


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/"])
def test_return_full_text_puts_the_prompt_in_front(reciting: Launched, path: str) -> None:
    def ask(**parameters: Any) -> str:
        request = {"inputs": "xa", "parameters": {"max_new_tokens": 3, **parameters}, "stream": True}
        if path != "/":
            del request["stream"]
        text = reciting.client.post(path, json=request).text
        return text[text.rindex('"generated_text":') :]

    assert '"xabcd"' in ask(return_full_text=True)
    assert '"bcd"' in ask(return_full_text=False)
    assert ('"xabcd"' if path == "/" else '"bcd"') in ask()


def test_truncate_keeps_the_last_tokens(reciting: Launched, tiny: Launched) -> None:
    events = stream(reciting, "xyza", truncate=2, max_new_tokens=3)
    assert events[-1]["details"]["input_length"] == 2
    assert events[-1]["generated_text"] == "bcd"
    whole = generate(tiny, "a prompt of many words, all of them important", max_new_tokens=8, truncate=9)
    assert whole == generate(tiny, "important", max_new_tokens=8)


def test_the_embedded_model_knows_the_capital_of_france(embedded: Launched) -> None:
    assert "Paris" in generate(embedded, "What is the capital of France?", max_new_tokens=20)["generated_text"]
