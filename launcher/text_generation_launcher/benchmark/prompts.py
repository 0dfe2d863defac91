"""Prompts of an exact number of tokens: ids for a shard, distinct texts for a server."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from typing import Protocol

from tokenizers import Tokenizer

from text_generation_launcher.benchmark.errors import BenchmarkError

MAX_TRIES = 200

_PARTS = (
    ("A baker", "The old captain", "Every teacher", "My neighbour", "One farmer", "The young doctor", "No sailor"),
    ("remembers", "has lost", "sells", "is looking for", "paints", "repairs", "talks about", "would like to keep"),
    ("a silver clock", "the wooden boat", "two letters", "some bread", "the blue door", "a long story", "seven maps"),
    ("near the harbour", "after the rain", "in a quiet street", "before winter", "with great care", "on the hill"),
)
"""One of each makes a sentence."""


class TextTokenizer(Protocol):
    async def spans(self, text: str) -> list[tuple[int, int]]:
        """Where in an ASCII text each of its tokens stands; tokens that stand for no text are empty."""
        ...


class LocalTokenizer:
    """A `tokenizers.Tokenizer` in this process."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    async def spans(self, text: str) -> list[tuple[int, int]]:
        return [(start, stop) for start, stop in self._tokenizer.encode(text).offsets]


def story(choice: random.Random, num_words: int) -> str:
    """English sentences of at least so many words."""
    sentences: list[str] = []
    words = 0
    while words < num_words:
        sentences.append(" ".join(choice.choice(part) for part in _PARTS) + ".")
        words += sentences[-1].count(" ") + 1
    return " ".join(sentences)


def prompt_ids(tokenizer: Tokenizer, num_tokens: int, vocab_size: int) -> list[int]:
    """The ids of a prompt of ``num_tokens``, special tokens included where the tokenizer puts them in front.

    Raises: BenchmarkError, when the tokenizer knows ids that the model does not.
    """
    ids: list[int] = tokenizer.encode(story(random.Random(0), num_tokens + 8)).ids[:num_tokens]
    if len(ids) < num_tokens:  # a tokenizer with whole phrases as tokens
        ids = (ids * num_tokens)[:num_tokens]
    if not ids or max(ids) >= vocab_size:
        raise BenchmarkError(
            f"the tokenizer's ids go up to {max(ids, default=0)}, the model has {vocab_size}: this is not the model's "
            "tokenizer; leave --tokenizer-name out"
        )
    return ids


async def exact_prompts(tokenizer: TextTokenizer, num_tokens: int, choice: random.Random) -> AsyncIterator[str]:
    """Endless texts of exactly ``num_tokens`` tokens, special ones included. None comes twice while there are others.

    Distinct, because a server that keeps the keys and values of earlier prompts would skip the prefill.
    Raises: BenchmarkError, when none can be made.
    """
    seen: set[str] = set()
    while True:
        found = await _exact_prompt(tokenizer, num_tokens, choice, seen)
        seen.add(found)
        yield found


async def _exact_prompt(tokenizer: TextTokenizer, num_tokens: int, choice: random.Random, seen: set[str]) -> str:
    repeated: str | None = None
    for _ in range(MAX_TRIES):
        text = story(choice, num_tokens + 16)
        spans = await tokenizer.spans(text)
        real = [span for span in spans if span[1] > span[0]]
        wanted = num_tokens - (len(spans) - len(real))
        if wanted < 1:
            raise BenchmarkError(
                f"the tokenizer puts {num_tokens - wanted} special tokens around every prompt: `--sequence-length` "
                f"must be at least {num_tokens - wanted + 1}"
            )
        start = choice.randrange(max(1, min(len(real) - wanted, 16)))
        candidate = text[real[start][0] : real[min(start + wanted, len(real)) - 1][1]].strip()
        # Text cut out of its place may join up into other tokens: only what survives counts.
        if not candidate or len(await tokenizer.spans(candidate)) != num_tokens:
            continue
        if candidate not in seen:
            return candidate
        repeated = candidate
    if repeated is None:
        raise BenchmarkError(
            f"no text of exactly {num_tokens} tokens could be made for this tokenizer; choose another "
            "`--sequence-length`"
        )
    return repeated
