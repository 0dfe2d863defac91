"""Prompts have the length that was asked for, by whatever tokenizer."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from builders import byte_tokenizer
from text_generation_launcher.benchmark.errors import BenchmarkError
from text_generation_launcher.benchmark.prompts import LocalTokenizer, exact_prompts, prompt_ids, story
from text_generation_launcher.benchmark.tokenizer import load_tokenizer
from tokenizers import Tokenizer, processors


def with_bos() -> Tokenizer:
    tokenizer = byte_tokenizer(("<s>",))
    number = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", number)])
    return tokenizer


def embedded_tokenizer() -> Tokenizer:
    import text_generation_server

    return load_tokenizer(str(Path(text_generation_server.__file__).parent / "embedded_model" / "files"), "main")


async def take(tokenizer: Tokenizer, num_tokens: int, count: int) -> list[str]:
    prompts = exact_prompts(LocalTokenizer(tokenizer), num_tokens, random.Random(0))
    return [await anext(prompts) for _ in range(count)]


@pytest.mark.parametrize("num_tokens", [2, 10, 300])
@pytest.mark.parametrize("make", [byte_tokenizer, with_bos, embedded_tokenizer])
async def test_texts_have_exactly_so_many_tokens(make: object, num_tokens: int) -> None:
    assert callable(make)
    tokenizer = make()
    texts = await take(tokenizer, num_tokens, 8)
    assert [len(tokenizer.encode(text).ids) for text in texts] == [num_tokens] * 8
    assert all(text == text.strip() and text.isascii() for text in texts)


async def test_texts_are_distinct() -> None:
    assert len(set(await take(embedded_tokenizer(), 10, 200))) == 200


async def test_where_there_are_no_others_texts_come_again() -> None:
    texts = await take(byte_tokenizer(), 1, 60)
    assert 1 < len(set(texts)) < 60


async def test_less_than_the_special_tokens_is_refused() -> None:
    with pytest.raises(BenchmarkError, match="`--sequence-length` must be at least 2"):
        await take(with_bos(), 1, 1)


@pytest.mark.parametrize("num_tokens", [1, 10, 5000])
def test_ids_for_a_shard_begin_as_a_prompt_does(num_tokens: int) -> None:
    tokenizer = with_bos()
    ids = prompt_ids(tokenizer, num_tokens, vocab_size=300)
    assert len(ids) == num_tokens
    assert ids[0] == tokenizer.token_to_id("<s>")


def test_a_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(BenchmarkError, match="this is not the model's tokenizer"):
        prompt_ids(byte_tokenizer(), 10, vocab_size=4)


def test_stories_are_long_enough() -> None:
    assert len(story(random.Random(0), 100).split()) >= 100


def test_a_tokenizer_is_a_folder_or_a_file(tokenizer_folder: Path) -> None:
    for name in (tokenizer_folder, tokenizer_folder / "tokenizer.json"):
        assert load_tokenizer(str(name), "main").get_vocab_size() == 257


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("{tmp}", "there is no tokenizer.json in", id="a folder without one"),
        pytest.param("{tmp}/broken.json", "is no tokenizer", id="a broken file"),
        pytest.param("/nowhere/model", "`--tokenizer-name /nowhere/model` does not exist", id="no such folder"),
        pytest.param("org/absent", "nor to be had from the hub", id="not on the hub"),
        pytest.param("a b c", "nor to be had from the hub", id="no name at all"),
    ],
)
def test_a_tokenizer_that_cannot_be_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(BenchmarkError) as error:
        load_tokenizer(name.format(tmp=tmp_path), "main")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
