from __future__ import annotations

from builders import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from text_generation_router.detokenizer import Detokenizer
from tokenizers import Tokenizer, decoders, models

BYTES = byte_tokenizer()


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
def test_pieces_concatenate_to_the_text(text: str, prompt: str, end_of_prompt: str) -> None:
    ids = BYTES.encode(text).ids
    if not text.endswith("\ufffd"):  # looks unfinished, so the last one is held back
        assert "".join(pieces(BYTES, BYTES.encode(prompt + end_of_prompt).ids, ids)) == text


def test_a_character_begun_by_the_prompt_is_finished_without_repeating_the_prompt() -> None:
    euro = BYTES.encode("€").ids
    assert pieces(BYTES, [*BYTES.encode("ab").ids, euro[0]], [*euro[1:], BYTES.encode("!").ids[0]]) == ["", "€", "!"]


def test_a_token_by_itself() -> None:
    assert Detokenizer(BYTES, frozenset({256})).text_of(256) == "</s>"
