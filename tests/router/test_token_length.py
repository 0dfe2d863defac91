from __future__ import annotations

from builders import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from text_generation_router.token_length import longest_token_bytes
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers


def trained(**settings: object) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["aaaaaaaa bbbb the the the answer", "ééééé 🦊🦊🦊"] * 50, trainer)
    return tokenizer


TRAINED = trained()


@given(st.one_of(st.text(max_size=300), st.text("ab é🦊 the", max_size=300)))
def test_a_text_has_as_many_tokens_as_its_bytes_say(text: str) -> None:
    longest = longest_token_bytes(TRAINED)
    assert longest is not None
    assert len(TRAINED.encode(text).ids) * longest >= len(text.encode())


def test_special_tokens_count_by_their_text() -> None:
    assert longest_token_bytes(byte_tokenizer(("<|a very long special token|>",))) == 29


def test_where_nothing_can_be_said() -> None:
    shortening = trained()
    shortening.normalizer = normalizers.Strip()
    leaving_out = trained()
    leaving_out.pre_tokenizer = pre_tokenizers.Whitespace()
    swallowing = trained()
    swallowing.add_special_tokens([AddedToken("<s>", lstrip=True)])
    unknown = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="b"))
    for tokenizer in (shortening, leaving_out, swallowing, unknown, words):
        assert longest_token_bytes(tokenizer) is None
