"""`embedding.requests`: texts -> ids, and vectors as they are asked for."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Any

import pytest
from builders import byte_tokenizer
from text_generation_router.embedding.requests import MAX_INPUTS, TextsRequest, finish, tokenise
from text_generation_router.errors import ValidationError
from text_generation_router.shards.convert import EmbeddingInfo
from text_generation_router.tokenizer import RouterTokenizer
from tokenizers.processors import TemplateProcessing

BOS, EOS = 257, 256


@pytest.fixture
def tokenizer() -> Iterator[RouterTokenizer]:
    """Bytes, with a token before and one behind."""
    raw = byte_tokenizer(("</s>", "<s>"))
    begin, end = raw.id_to_token(BOS), raw.id_to_token(EOS)
    raw.post_processor = TemplateProcessing(single=f"{begin} $A {end}", special_tokens=[(begin, BOS), (end, EOS)])
    made = RouterTokenizer(raw, vocab_size=300, num_workers=1)
    yield made
    made.close()


def byte_ids(text: str) -> list[int]:
    """The ids of printable ASCII: that alphabet begins with the exclamation mark."""
    return [byte - ord("!") for byte in text.encode()]


async def ids_of(tokenizer: RouterTokenizer, *inputs: Any, info: EmbeddingInfo, **options: Any) -> list[list[int]]:
    request = TextsRequest(inputs=list(inputs), **options)
    return await tokenise(request, tokenizer, info, max_tokens=6, vocab_size=300)


PLAIN = EmbeddingInfo(dimensions=4)


async def test_texts_and_ids(tokenizer: RouterTokenizer) -> None:
    assert await ids_of(tokenizer, "ab", [5, 6], "c", info=PLAIN) == [
        [BOS, *byte_ids("ab"), EOS],
        [5, 6],
        [BOS, *byte_ids("c"), EOS],
    ]


async def test_what_is_cut_keeps_its_special_tokens(tokenizer: RouterTokenizer) -> None:
    given = ("abcdefgh", [1, 2, 3, 4, 5, 6, 7])
    assert await ids_of(tokenizer, *given, info=PLAIN, truncate=True) == [
        [BOS, *byte_ids("abcd"), EOS],
        [1, 2, 3, 4, 5, 6],
    ]
    assert await ids_of(tokenizer, *given, info=PLAIN, truncate=True, keep_end=True) == [
        [BOS, *byte_ids("efgh"), EOS],
        [2, 3, 4, 5, 6, 7],
    ]


async def test_prompts_stand_before_texts(tokenizer: RouterTokenizer) -> None:
    info = EmbeddingInfo(dimensions=4, prompts={"q": "Q:", "none": ""}, default_prompt="q", lower_case=True)
    assert await ids_of(tokenizer, "A", info=info) == [[BOS, *byte_ids("q:a"), EOS]]
    assert await ids_of(tokenizer, "A", info=info, prompt_name="none") == [[BOS, *byte_ids("a"), EOS]]


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ([], {}, "`inputs` cannot be empty"),
        (["a", ""], {}, "input 1 is"),
        ([[]], {}, "input 0 is"),
        ([[300]], {}, "token ids of an input must be less than 300"),
        (["a"] * (MAX_INPUTS + 1), {}, "may be 2048 at most. Given: 2049"),
        (["a", "abcdefg"], {}, "at most 6 tokens. Given: 9 in input 1"),
        (["a"], {"prompt_name": "x"}, "no prompt of the name `x`; what it has: none"),
        (["a"], {"dimensions": 3}, "trained for: 4. Given: 3"),
        (["a"], {"dimensions": 0}, "trained for: 4. Given: 0"),
    ],
)
async def test_refusals(tokenizer: RouterTokenizer, inputs: Any, options: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        await ids_of(tokenizer, *inputs, info=PLAIN, **options)


def vector(*values: float) -> bytes:
    return array("f", values).tobytes()


async def test_vectors_are_cut_and_then_normalized() -> None:
    info = EmbeddingInfo(dimensions=4, shorter=frozenset({2}))
    given = [vector(3, 4, 12, 0), vector(0, 0, 0, 0)]
    assert await finish(given, TextsRequest(inputs=["a"]), info) == given
    assert await finish(given, TextsRequest(inputs=["a"], dimensions=2), info) == [vector(3, 4), vector(0, 0)]
    short = await finish(given, TextsRequest(inputs=["a"], dimensions=2, normalize=True), info)
    assert short == [vector(0.6, 0.8), vector(0, 0)]
    whole = EmbeddingInfo(dimensions=4, normalizes=True)
    assert await finish(given[:1], TextsRequest(inputs=["a"]), whole) == [vector(3 / 13, 4 / 13, 12 / 13, 0)]
    assert await finish(given, TextsRequest(inputs=["a"], normalize=False), whole) == given
