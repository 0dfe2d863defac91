"""Prompt -> ids on worker threads."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path

import pytest
from builders import byte_tokenizer
from text_generation_router.config import ConfigError
from text_generation_router.errors import ValidationError
from text_generation_router.tokenizer import Encoding, RouterTokenizer, _Budget
from tokenizers import processors


def tokenizer(vocab_size: int = 512) -> RouterTokenizer:
    raw = byte_tokenizer(("<s>", "</s>"))
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    raw.enable_padding(length=50)
    raw.enable_truncation(3)
    return RouterTokenizer(raw, vocab_size=vocab_size, num_workers=2)


async def test_ids_are_those_of_the_whole_text_and_no_padding() -> None:
    assert (await tokenizer().encode("abcdef")).ids == [256, *range(64, 70)]
    assert (await tokenizer().encode("abcdef", add_special_tokens=False)).ids == [*range(64, 70)]


async def test_offsets_on_demand() -> None:
    def then(encoding: Encoding) -> tuple[list[tuple[int, int]], str]:
        return encoding.offsets, threading.current_thread().name

    offsets, thread = await tokenizer().encode_then("ab", then)
    assert offsets == [(0, 0), (0, 1), (1, 2)]
    assert thread.startswith("tokenizer")


def test_special_ids() -> None:
    subject = tokenizer()
    assert subject.special_ids == {256, 257}


async def test_ids_outside_the_model_are_refused() -> None:
    with pytest.raises(ValidationError, match="tokenizer error the text holds token 257, the model knows 257 tokens"):
        await tokenizer(vocab_size=257).encode("a</s>")


async def test_the_loop_runs_while_a_long_text_is_tokenised() -> None:
    subject = tokenizer()
    work = asyncio.create_task(subject.encode("word " * 200_000))
    ticks = 0
    while not work.done():
        await asyncio.sleep(0.001)
        ticks += 1
    assert len((await work).ids) == 1_000_001
    assert ticks > 20


async def test_what_a_client_left_behind_is_given_back() -> None:
    subject = tokenizer()
    tasks = [asyncio.create_task(subject.encode("word " * 100_000)) for _ in range(10)]
    await asyncio.sleep(0.01)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    async with asyncio.timeout(5):
        while subject._budget._left != subject._budget._size:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    assert (await subject.encode("a")).ids == [256, 64]


async def test_the_budget_is_first_come_first_served() -> None:
    budget = _Budget(10)
    order: list[str] = []

    async def take(name: str, amount: int) -> None:
        await budget.take(amount)
        order.append(name)

    assert await budget.take(8) == 8
    tasks = [asyncio.create_task(take(name, amount)) for name, amount in (("big", 99), ("small", 1), ("last", 1))]
    await asyncio.sleep(0)
    assert order == [], "a small one does not overtake"
    tasks[0].cancel()
    await asyncio.sleep(0.001)
    assert order == ["small", "last"]
    budget.give_back(10)
    assert await budget.take(1000) == 10, "a text larger than the budget goes alone"


def test_a_folder_a_file_and_neither(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    byte_tokenizer().save(str(path))
    for given in (tmp_path, path):
        assert RouterTokenizer.load(str(given), vocab_size=300, num_workers=1).special_ids == {256}
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"Unable to load tokenizer .*tokenizer\.json"):
        RouterTokenizer.load(str(tmp_path), vocab_size=300, num_workers=1)


def test_tokens_that_only_the_configuration_calls_special(tmp_path: Path) -> None:
    byte_tokenizer(()).save(str(tmp_path / "tokenizer.json"))
    config = {
        "eos_token": {"content": "a", "lstrip": False},
        "pad_token": "b",
        "bos_token": None,
        "unk_token": "no such token",
        "additional_special_tokens": ["c", {"content": "d"}],
        "model_max_length": 77,
        "add_bos_token": True,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"cls_token": "e"}))
    loaded = RouterTokenizer.load(str(tmp_path), vocab_size=300, num_workers=1)
    assert loaded.special_ids == {loaded.tokenizer.token_to_id(token) for token in "abcde"}
    assert loaded.model_max_length == 77
    (tmp_path / "tokenizer_config.json").write_text("[]")
    assert RouterTokenizer.load(str(tmp_path), vocab_size=300, num_workers=1).model_max_length is None
