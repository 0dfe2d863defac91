"""The mix of examples that the model is trained on, and the sets that it is measured on."""

import random
from collections.abc import Callable, Iterator
from itertools import islice

from text_generation_server.embedded_model.recipe.example import Example
from text_generation_server.embedded_model.recipe.json_tasks import json_task
from text_generation_server.embedded_model.recipe.knowledge import (
    capital_as_written,
    capital_chat,
    capital_plain,
    sum_as_written,
    sum_chat,
    sum_plain,
)
from text_generation_server.embedded_model.recipe.repeat import repeat
from text_generation_server.embedded_model.recipe.talk import small_talk, tell_story, unknown
from text_generation_server.embedded_model.recipe.tools import tool_task

Maker = Callable[[random.Random], Example]

EXAMPLES_PER_STEP = 128

MIX: tuple[tuple[Maker, float], ...] = (
    (capital_plain, 19),
    (capital_chat, 11),
    (sum_plain, 21),
    (sum_chat, 14),
    (json_task, 10),
    (tool_task, 10),
    (repeat, 6),
    (tell_story, 2),
    (small_talk, 3),
    (unknown, 4),
)
"""Weights are per example; a tool call has ten times the tokens of a sum, so these tasks take half of the time."""

HELD_OUT: dict[str, Maker] = {
    "capitals, new phrasings as written": capital_as_written,
    "sums, new phrasings as written": sum_as_written,
    "capitals, new phrasings, completion": lambda rng: capital_plain(rng, held_out=True),
    "capitals, new phrasings, chat": lambda rng: capital_chat(rng, held_out=True),
    "sums, new phrasings, completion": lambda rng: sum_plain(rng, held_out=True, in_words=0),
    "sums, new phrasings, chat": lambda rng: sum_chat(rng, held_out=True, in_words=0),
    "sums, new numbers, completion": lambda rng: sum_plain(rng, held_out_pair=True, in_words=0),
    "sums, new numbers, chat": lambda rng: sum_chat(rng, held_out_pair=True, in_words=0),
    "sums, both new, completion": lambda rng: sum_plain(rng, held_out=True, held_out_pair=True, in_words=0),
    "sums, both new, chat": lambda rng: sum_chat(rng, held_out=True, held_out_pair=True, in_words=0),
    "sums in words": lambda rng: sum_chat(rng, in_words=1),
    "repeat": repeat,
    "JSON": json_task,
    "tools": tool_task,
    "talk": small_talk,
    "unknown": unknown,
}
"""The evaluation, a row of the model card each. The last six draw new values for trained templates, no new wording."""


def stream(seed: float) -> Iterator[Example]:
    """Training examples without end; the same seed gives the same stream."""
    rng = random.Random(seed)
    makers = [maker for maker, _ in MIX]
    weights = [weight for _, weight in MIX]
    while True:
        yield rng.choices(makers, weights)[0](rng)


def held_out(name: str, count: int) -> list[Example]:
    """The first `count` examples of an evaluation set; no seed of `stream` is a string, so the draws differ."""
    rng = random.Random(f"held out: {name}")
    return [HELD_OUT[name](rng) for _ in range(count)]


def first(count: int, seed: int) -> list[Example]:
    return list(islice(stream(seed), count))
