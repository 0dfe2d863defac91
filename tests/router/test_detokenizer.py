from __future__ import annotations

import pytest
from builders import byte_tokenizer
from hypothesis import example, given
from hypothesis import strategies as st
from text_generation_router.detokenizer import Detokenizer, SequenceDetokenizer
from tokenizers import Tokenizer, decoders, models

BYTES = byte_tokenizer()
SPELT_AS_THEMSELVES = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in SPELT_AS_THEMSELVES]
BYTE_IDS = {byte: BYTES.get_vocab()[chr(byte)] for byte in SPELT_AS_THEMSELVES}
BYTE_IDS |= {byte: BYTES.get_vocab()[chr(256 + place)] for place, byte in enumerate(OTHERS)}


def metaspace_tokenizer() -> Tokenizer:
    """As sentencepiece models decode: a leading space is stripped, unknown characters come as bytes."""
    vocab = {"▁Hello": 0, "▁world": 1, "!": 2, "<0xE2>": 3, "<0x82>": 4, "<0xAC>": 5}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def pieces(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> list[str]:
    text = Detokenizer(tokenizer, frozenset()).start(prompt)
    return [text.step(token_id) for token_id in ids]


def test_the_first_space_behind_a_prompt_survives() -> None:
    assert pieces(metaspace_tokenizer(), [0], [1, 2]) == [" world", "!"]


def test_a_character_comes_whole_with_its_last_byte() -> None:
    assert pieces(metaspace_tokenizer(), [0], [3, 4, 5, 2]) == ["", "", "€", "!"]


def test_bytes_that_never_become_a_character_are_shown_once_the_text_goes_on() -> None:
    assert pieces(metaspace_tokenizer(), [0], [3, 2]) == ["", "�!"]


@given(st.text(max_size=30), st.text(max_size=5), st.sampled_from(["", "\ufffd", "\ufffd\ufffd"]))
def test_pieces_and_rest_concatenate_to_the_text(text: str, prompt: str, end_of_prompt: str) -> None:
    sequence = Detokenizer(BYTES, frozenset()).start(BYTES.encode(prompt + end_of_prompt).ids)
    shown = "".join(sequence.step(token_id) for token_id in BYTES.encode(text).ids)
    assert shown + sequence.rest() == text
    assert shown.rstrip("\ufffd") == text.rstrip("\ufffd")


@given(st.lists(st.integers(0, 255) | st.sampled_from([0xE2, 0x82, 0xAC, 0xF0, 0x9F]), max_size=60))
@example([0x80, 0x80, 0x80, 0xF0, 0x90, 0x80, 0xF0, 0x90, 0x80])  # several bytes that look like one character
def test_bytes_that_are_no_characters_are_shown_as_such(values: list[int]) -> None:
    ids = [BYTE_IDS[value] for value in values]
    sequence = Detokenizer(BYTES, frozenset()).start([])
    shown = [sequence.step(token_id) for token_id in ids]
    assert "".join(shown) + sequence.rest() == BYTES.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("tokenizer", [BYTES, metaspace_tokenizer()], ids=["byte level", "byte fallback"])
def test_an_endless_run_of_what_looks_incomplete_streams(tokenizer: Tokenizer) -> None:
    first = BYTES.encode("€").ids[0] if tokenizer is BYTES else 3
    sequence = Detokenizer(tokenizer, frozenset()).start([])
    shown = [sequence.step(first) for _ in range(200)]
    assert len("".join(shown)) >= 200 - 12
    assert "".join(shown) + sequence.rest() == "\ufffd" * 200


def test_a_character_that_is_completed_after_a_long_wait_comes_whole() -> None:
    euro, mark = BYTES.encode("€").ids, BYTES.encode("!").ids
    assert "".join(pieces(BYTES, [], [euro[0]] * 9 + euro + mark)) == "\ufffd" * 9 + "€!"


def test_a_character_begun_by_the_prompt_is_finished_without_repeating_the_prompt() -> None:
    euro = BYTES.encode("€").ids
    assert pieces(BYTES, [*BYTES.encode("ab").ids, euro[0]], [*euro[1:], BYTES.encode("!").ids[0]]) == ["", "€", "!"]


def test_a_decoder_that_changes_text_is_asked_about_all_of_it() -> None:
    """What a strip does depends on the place."""
    stripping = byte_tokenizer()
    stripping.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip("a", 1, 0)])
    a, b = (BYTE_IDS[ord(letter)] for letter in "ab")
    assert "".join(pieces(stripping, [], [a, a, b, a])) == "aba"


@given(st.lists(st.sampled_from([*"ab é€", "<s>", "\ufffd"]), max_size=20), st.integers(0, 3))
def test_lookups_and_the_stream_say_the_same(words: list[str], cut: int) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<s>"])
    ids = [token_id for word in words for token_id in tokenizer.encode(word).ids]
    prompt, ids = ids[:cut], ids[cut:]
    shared = Detokenizer(tokenizer, frozenset())
    by_stream = SequenceDetokenizer(tokenizer, prompt)
    looked_up = shared.start(prompt)
    assert [looked_up.step(token_id) for token_id in ids] == [by_stream.step(token_id) for token_id in ids]
    assert looked_up.rest() == by_stream.rest()


def test_a_token_by_itself() -> None:
    assert Detokenizer(BYTES, frozenset({256})).text_of(256) == "</s>"
