from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_generation_router.scheduling.requests import FinishReason
from text_generation_router.stopping import StoppingRules, StopTextMatcher


def run(stops: tuple[str, ...], pieces: list[str]) -> tuple[str, bool]:
    """The text up to the end of the first stop, and whether there was one."""
    matcher, text = StopTextMatcher(stops), ""
    for piece in pieces:
        end = matcher.end_of_match(piece)
        if end is not None:
            return text + piece[:end], True
        text += piece
    return text, False


@pytest.mark.parametrize(
    ("stops", "pieces", "text"),
    [
        pytest.param(("b",), ["a", "b", "c"], "ab", id="a whole piece"),
        pytest.param(("b",), ["abc"], "ab", id="inside a piece"),
        pytest.param(("STOP",), ["xS", "T", "OPy"], "xSTOP", id="across pieces"),
        pytest.param(("cd", "bc"), ["abcd"], "abc", id="the one that ends first"),
        pytest.param(("abab",), ["aab", "ab"], "aabab", id="a false start before it"),
        pytest.param(("b",), ["a", "", "b"], "ab", id="empty pieces between"),
        pytest.param(("é",), ["caf", "é!"], "café", id="characters, not bytes"),
    ],
)
def test_text_ends_right_behind_the_stop(stops: tuple[str, ...], pieces: list[str], text: str) -> None:
    assert run(stops, pieces) == (text, True)


@given(
    st.lists(st.text("ab", max_size=4), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_pieces_do_not_matter(pieces: list[str], stops: list[str]) -> None:
    whole = "".join(pieces)
    ends = [i for i in range(1, len(whole) + 1) if any(whole[:i].endswith(stop) for stop in stops)]
    assert run(tuple(stops), pieces) == ((whole[: ends[0]], True) if ends else (whole, False))


@pytest.mark.parametrize(
    ("count", "token_id", "piece", "reason"),
    [
        pytest.param(1, 5, "a", None, id="goes on"),
        pytest.param(3, 5, "a", FinishReason.LENGTH, id="length"),
        pytest.param(1, 9, "", FinishReason.EOS_TOKEN, id="end of sequence"),
        pytest.param(1, 5, ".", FinishReason.STOP_SEQUENCE, id="stop text"),
        pytest.param(3, 9, "", FinishReason.LENGTH, id="length comes before end of sequence"),
        pytest.param(1, 9, ".", FinishReason.EOS_TOKEN, id="end of sequence comes before stop text"),
    ],
)
def test_order_of_rules(count: int, token_id: int, piece: str, reason: FinishReason | None) -> None:
    rules = StoppingRules(max_new_tokens=3, eos_token_ids=frozenset({9}), matcher=StopTextMatcher((".",)))
    assert rules.check(count, token_id, piece) == (reason, piece)


@pytest.mark.parametrize(
    ("stops", "reason"),
    [(("</s>",), FinishReason.STOP_SEQUENCE), (("s",), None), (("a</s>",), None)],
)
def test_a_special_token_is_a_stop_only_as_a_whole(stops: tuple[str, ...], reason: FinishReason | None) -> None:
    rules = StoppingRules(max_new_tokens=9, eos_token_ids=frozenset(), matcher=StopTextMatcher(stops))
    assert rules.check(1, 5, "a") == (None, "a")
    assert rules.check(2, 6, "</s>", special=True) == (reason, "</s>")


def test_a_stop_text_goes_on_behind_a_special_token() -> None:
    rules = StoppingRules(max_new_tokens=9, eos_token_ids=frozenset(), matcher=StopTextMatcher(("ab",)))
    rules.check(1, 5, "a")
    rules.check(2, 6, "</s>", special=True)
    assert rules.check(3, 5, "bc") == (FinishReason.STOP_SEQUENCE, "b")


def test_an_empty_stop_asks_for_one_token() -> None:
    assert run(("",), ["one", "two"]) == ("one", True)


def test_the_text_is_cut_even_where_length_ends_the_sequence() -> None:
    rules = StoppingRules(max_new_tokens=1, eos_token_ids=frozenset(), matcher=StopTextMatcher((".",)))
    assert rules.check(1, 5, "a. b") == (FinishReason.LENGTH, "a.")
