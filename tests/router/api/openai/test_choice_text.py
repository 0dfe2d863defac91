"""Text without its stop text, however it comes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from text_generation_router.api.openai.choice_text import ChoiceText
from text_generation_router.scheduling.requests import Finished, FinishReason, RequestTimings, Token, TokenEvent
from text_generation_router.stopping import StoppingRules, StopTextMatcher

TIMINGS = RequestTimings(validation_s=0, queue_s=0, inference_s=0, total_s=0)


def run(
    words: list[str], stops: tuple[str, ...], max_new_tokens: int = 10_000
) -> tuple[ChoiceText, list[str], list[int]]:
    """What the client sees of a model that says ``words``: pieces, and token indices. By the engine's own rules."""
    rules = StoppingRules(max_new_tokens, frozenset(), StopTextMatcher(stops) if stops else None)
    choice = ChoiceText(stops)
    pieces: list[str] = []
    indices: list[int] = []
    for index, word in enumerate(words, 1):
        reason, text = rules.check(index, index, word)
        event = TokenEvent(index, Token(index, text, -1.0, special=False), None)
        if reason is None and index == len(words):
            reason = FinishReason.EOS_TOKEN
        if reason is not None:
            event.finished = Finished("", reason, index, None, 1, 0, TIMINGS)
        piece = choice.add(event)
        pieces.append(piece.text)
        indices += [each.index for each in piece.tokens]
        if reason is not None:
            break
    return choice, pieces, indices


def first_stop(text: str, stops: tuple[str, ...]) -> str | None:
    """The text before the stop text that is complete first; of several that end there, the longest."""
    ends = [(start + len(stop), -len(stop)) for stop in stops if (start := text.find(stop)) >= 0]
    if not ends:
        return None
    end = min(ends)[0]
    return text[: end - max(len(stop) for stop in stops if text[:end].endswith(stop))]


WORDS = st.lists(st.text("abc", max_size=4), min_size=1, max_size=12)


@given(words=WORDS, stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3).map(tuple))
def test_a_client_sees_all_before_the_stop_text_and_nothing_of_it(words: list[str], stops: tuple[str, ...]) -> None:
    choice, pieces, indices = run(words, stops)
    before = first_stop("".join(words), stops)
    assert "".join(pieces) == ("".join(words) if before is None else before)
    assert choice.finish_reason == "stop"
    assert indices == sorted(set(indices))
    if before is None:
        assert indices == list(range(1, len(words) + 1)), "every token is reported"


def test_text_is_not_held_back_longer_than_needed() -> None:
    _, pieces, _ = run(["a", "S", "b", "ST", "O", "x", "STOP", "y"], ("STOP",))
    assert pieces == ["a", "", "Sb", "", "", "STOx", ""]


def test_the_length_ends_it_too_and_a_stop_text_at_the_end_is_no_part_of_the_text() -> None:
    choice, pieces, _ = run(["a", "b", "c"], ("x",), max_new_tokens=2)
    assert (choice.finish_reason, pieces) == ("length", ["a", "b"])
    choice, pieces, _ = run(["a", "x", "c"], ("x",), max_new_tokens=2)
    assert (choice.finish_reason, pieces) == ("stop", ["a", ""])
    choice, pieces, _ = run(["a", "x", "c"], ("xyz",), max_new_tokens=2)
    assert (choice.finish_reason, pieces) == ("length", ["a", "x"]), "the beginning of a stop text is text"


def test_a_token_that_ends_in_the_stop_text_is_not_reported() -> None:
    assert run(["ab", "cS", "TOP"], ("STOP",))[2] == [1]
