"""How people type: case, missing question marks, typing errors, politeness, surroundings."""

import random
from collections.abc import Sequence

from text_generation_server.embedded_model.recipe.phrasings import (
    HELD_OUT_PREFIXES,
    PLAIN_FRAMES,
    POLITE_PREFIXES,
    POLITE_SUFFIXES,
)
from text_generation_server.embedded_model.recipe.words import (
    ANIMALS,
    COLOURS,
    JOBS,
    NAMES,
    THINGS,
    invented_word,
    words,
)

_ANY_WORDS = (*ANIMALS, *COLOURS, *JOBS, *THINGS)
_MEANING = frozenset(words("capital country city government plus sum add more together total is"))
_JOINTS = ("\n", "\n", "\n\n", " ")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def vary(question: str, rng: random.Random, *, held_out: bool) -> str:
    """The same question as another person would type it."""
    if rng.random() < 0.05:
        question = typing_error(question, rng)
    return change_case(polite(question, rng, HELD_OUT_PREFIXES if held_out else POLITE_PREFIXES), rng)


def polite(question: str, rng: random.Random, prefixes: Sequence[str] = POLITE_PREFIXES) -> str:
    """Words before or after the question now and then, or its last mark left out; names and values keep their case."""
    if rng.random() < 0.15 and question[-1] in "?.":
        question = question[:-1]
    if rng.random() < 0.18:
        question = rng.choice(prefixes) + (question if rng.random() < 0.5 else question[0].lower() + question[1:])
    if rng.random() < 0.08:
        question += rng.choice(POLITE_SUFFIXES)
    return question


def change_case(text: str, rng: random.Random) -> str:
    """Lower case for one text in eight, upper case for one in twelve."""
    draw = rng.random()
    if draw < 0.125:
        return text.lower()
    return text.upper() if draw < 0.21 else text


def typing_error(text: str, rng: random.Random) -> str:
    """Swap, drop, double or replace one letter inside a word; digits and ends of words stay."""
    inner = [i for i in range(1, len(text) - 1) if text[i - 1 : i + 2].isalpha()]
    if not inner:
        return text
    i = rng.choice(inner)
    replacement = rng.choice(
        (text[i + 1] + text[i], text[i + 1], text[i] * 2 + text[i + 1], rng.choice(_LETTERS) + text[i + 1])
    )
    return text[:i] + replacement + text[i + 2 :]


def unknown_word(template: str, rng: random.Random) -> str:
    """The template with a word put in or exchanged, so that a phrase with words never seen still is what it looks like.

    Placeholders and the words that carry the meaning stay.
    """
    pieces = template.split(" ")
    at = rng.randrange(len(pieces))
    word = rng.choice(_ANY_WORDS) if rng.random() < 0.6 else invented_word(rng)
    if pieces[at].isalpha() and pieces[at].lower() not in _MEANING and at and rng.random() < 0.6:
        pieces[at] = word
    else:
        pieces.insert(at, word)
    return " ".join(pieces)


def _label(rng: random.Random) -> str:
    word = rng.choice((*NAMES, *_ANY_WORDS)) if rng.random() < 0.6 else invented_word(rng)
    return word.capitalize() if rng.random() < 0.8 else word


def frame(question: str, rng: random.Random, *, held_out: bool) -> str:
    """The question as the prompt of a plain completion: mostly bare, else as `Q: ... A:` and the like."""
    draw = rng.random()
    if draw < 0.55:
        return question
    if draw < 0.65:
        return question + rng.choice(("\n", "\n\n", " ", "\n"))
    if draw < 0.75 and not held_out:
        asks, answers = _label(rng), _label(rng)
        return f"{asks}: {question}{rng.choice(_JOINTS)}{answers}:"
    return PLAIN_FRAMES.choose(rng, held_out=held_out).replace("{q}", question)
