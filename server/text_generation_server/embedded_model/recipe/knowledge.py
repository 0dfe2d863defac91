"""Examples for what the model is for: capitals and sums, as plain completions and in chat."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from text_generation_server.embedded_model.recipe.example import Example, Message, assistant, chat, plain, system, user
from text_generation_server.embedded_model.recipe.facts import COUNTRIES, Country, with_article
from text_generation_server.embedded_model.recipe.phrasings import (
    CAPITAL_QUESTIONS,
    CAPITAL_STEMS,
    COUNTRY_QUESTIONS,
    PLAIN_FRAMES,
    SHORT_ANSWER_SUFFIXES,
    SUM_QUESTIONS,
    SUM_STEMS,
    Phrasings,
)
from text_generation_server.embedded_model.recipe.variation import frame, unknown_word, vary
from text_generation_server.embedded_model.recipe.words import number_in_words, system_prompt

MAX_TERM = 99
HELD_OUT_SUMS = 400
"""Unordered pairs withheld; as each counts in both orders, 8 % of the 10,000 sums."""

IN_WORDS = 0.08
"""Part of the sums that are asked as `twenty plus four`."""


@dataclass(frozen=True, slots=True)
class Fact:
    """A question with its answers: `short` for completions, `sentence` for chat."""

    question: str
    short: str
    sentence: str


@cache
def held_out_pairs() -> frozenset[tuple[int, int]]:
    """The sums that are never trained on, in both orders."""
    rng = random.Random("held-out sums")
    pairs = [(a, b) for a in range(MAX_TERM + 1) for b in range(a, MAX_TERM + 1)]
    chosen = rng.sample(pairs, HELD_OUT_SUMS)
    return frozenset(chosen) | {(b, a) for a, b in chosen}


def draw_pair(rng: random.Random, *, held_out: bool) -> tuple[int, int]:
    """Two terms; every seventh trained pair is small, since people ask for small ones."""
    if held_out:
        return rng.choice(sorted(held_out_pairs()))
    while True:
        limit = 12 if rng.random() < 0.15 else MAX_TERM
        pair = rng.randint(0, limit), rng.randint(0, limit)
        if pair not in held_out_pairs():
            return pair


def capital_plain(rng: random.Random, *, held_out: bool = False) -> Example:
    """Asks for a capital, or begins the sentence that the capital ends."""
    if rng.random() < 0.25:
        fact = _capital(rng, CAPITAL_STEMS.choose(rng, held_out=held_out))
        return plain(
            "capital, completion", _vary_stem(fact.question, rng, held_out=held_out), _stop(fact.short), fact.short
        )
    ask = _reverse if rng.random() < 0.12 else _is_it if not held_out and rng.random() < 0.04 else _capital_question
    return _completion("capital, completion", ask, rng, held_out=held_out)


def capital_chat(rng: random.Random, *, held_out: bool = False) -> Example:
    ask = _reverse if rng.random() < 0.12 else _is_it if not held_out and rng.random() < 0.06 else _capital_question
    return _conversation("capital, chat", ask, rng, held_out=held_out)


def sum_plain(
    rng: random.Random, *, held_out: bool = False, held_out_pair: bool = False, in_words: float = IN_WORDS
) -> Example:
    """Asks for a sum, or begins the equation that the sum ends."""
    if rng.random() < 0.35:
        fact = _sum(rng, SUM_STEMS.choose(rng, held_out=held_out), held_out_pair, in_words)
        return plain(
            "sum, completion", _vary_stem(fact.question, rng, held_out=held_out), _stop(fact.short), fact.short
        )
    return _completion("sum, completion", _sum_question(held_out_pair, in_words), rng, held_out=held_out)


def sum_chat(
    rng: random.Random, *, held_out: bool = False, held_out_pair: bool = False, in_words: float = IN_WORDS
) -> Example:
    return _conversation("sum, chat", _sum_question(held_out_pair, in_words), rng, held_out=held_out)


def capital_as_written(rng: random.Random) -> Example:
    """A held-out question for a capital without noise: its one surprise is the phrasing. Half are completions."""
    return _as_written("capital", _capital_question(rng, True), rng)


def sum_as_written(rng: random.Random) -> Example:
    """The same for a sum."""
    return _as_written("sum", _sum(rng, SUM_QUESTIONS.choose(rng, held_out=True), False, 0), rng)


def _as_written(kind: str, fact: Fact, rng: random.Random) -> Example:
    if rng.random() < 0.5:
        return plain(kind, fact.question, _stop(fact.short), fact.short)
    return chat(kind, [user(fact.question)], fact.sentence, fact.short)


def any_question(rng: random.Random) -> Fact:
    """A trained question of either kind, for earlier turns of a conversation."""
    return _capital_question(rng, False) if rng.random() < 0.5 else _sum_question(False, IN_WORDS)(rng, False)


Ask = Callable[[random.Random, bool], Fact]


def _completion(kind: str, ask: Ask, rng: random.Random, *, held_out: bool) -> Example:
    fact = ask(rng, held_out)
    if rng.random() < 0.08:
        return plain(kind, _few_shot(fact, ask, rng), _stop(fact.short), fact.short)
    question = vary(fact.question, rng, held_out=held_out)
    if rng.random() < 0.04:
        question = f"{system_prompt(rng)} {question}"
    return plain(kind, frame(question, rng, held_out=held_out), _stop(fact.short), fact.short)


def _few_shot(fact: Fact, ask: Ask, rng: random.Random) -> str:
    """Questions answered before the one that is asked, all in the same frame."""
    shape = rng.choice(PLAIN_FRAMES.trained[:8])
    before = [ask(rng, False) for _ in range(rng.randint(1, 3))]
    joint = rng.choice(("\n", "\n\n"))
    return "".join(f"{shape.replace('{q}', f.question)} {f.short}{joint}" for f in before) + shape.replace(
        "{q}", fact.question
    )


def _conversation(kind: str, ask: Ask, rng: random.Random, *, held_out: bool) -> Example:
    fact = ask(rng, held_out)
    messages: list[Message] = [system(system_prompt(rng))] if rng.random() < 0.25 else []
    while rng.random() < 0.1:
        earlier = any_question(rng)
        messages += [user(vary(earlier.question, rng, held_out=False)), assistant(earlier.sentence)]
    question = vary(fact.question, rng, held_out=held_out)
    if rng.random() < 0.06:
        return chat(
            kind, [*messages, user(question + rng.choice(SHORT_ANSWER_SUFFIXES))], _stop(fact.short), fact.short
        )
    return chat(kind, [*messages, user(question)], fact.sentence, fact.short)


def _capital_question(rng: random.Random, held_out: bool) -> Fact:
    return _capital(rng, _template(CAPITAL_QUESTIONS, rng, held_out))


def _capital(rng: random.Random, template: str) -> Fact:
    country = rng.choice(COUNTRIES)
    name = _any_name(country, rng)
    in_text = with_article(name) if rng.random() < 0.93 else name
    question = template.replace("{c}", in_text).replace("{n}", name)
    return Fact(question[0].upper() + question[1:], country.capital, _capital_sentence(country))


def _capital_sentence(country: Country) -> str:
    return _stop(f"The capital of {country.in_text} is {country.capital}")


def _reverse(rng: random.Random, held_out: bool) -> Fact:
    country = rng.choice(COUNTRIES)
    question = _template(COUNTRY_QUESTIONS, rng, held_out).replace("{k}", country.capital)
    return Fact(question, country.name, _stop(f"{country.capital} is the capital of {country.in_text}"))


def _is_it(rng: random.Random, held_out: bool) -> Fact:
    country, other = rng.choice(COUNTRIES), rng.choice(COUNTRIES)
    template = rng.choice(
        ("Is {k} the capital of {c}?", "Is the capital of {c} {k}?", "Is {k} the capital city of {c}?")
    )
    right = rng.random() < 0.5 or other is country
    question = template.replace("{c}", country.in_text).replace("{k}", (country if right else other).capital)
    if right:
        return Fact(question, "Yes", _stop(f"Yes, {country.capital} is the capital of {country.in_text}"))
    return Fact(question, "No", _stop(f"No, the capital of {country.in_text} is {country.capital}"))


def _template(phrasings: Phrasings, rng: random.Random, held_out: bool) -> str:
    """A phrasing; every fifth trained one has up to four strange words in it."""
    template = phrasings.choose(rng, held_out=held_out)
    if not held_out and rng.random() < 0.2:
        for _ in range(rng.randint(1, 4)):
            template = unknown_word(template, rng)
    return template


def _any_name(country: Country, rng: random.Random) -> str:
    return rng.choice(country.aliases) if country.aliases and rng.random() < 0.25 else country.name


def _sum_question(held_out_pair: bool, in_words: float) -> Ask:
    return lambda rng, held_out: _sum(rng, _template(SUM_QUESTIONS, rng, held_out), held_out_pair, in_words)


def _sum(rng: random.Random, template: str, held_out_pair: bool, in_words: float) -> Fact:
    a, b = draw_pair(rng, held_out=held_out_pair)
    write = number_in_words if rng.random() < in_words and "+" not in template else str
    question = template.replace("{a}", write(a)).replace("{b}", write(b))
    return Fact(question[0].upper() + question[1:], str(a + b), f"{a} + {b} = {a + b}.")


def _vary_stem(stem: str, rng: random.Random, *, held_out: bool) -> str:
    """Variation that keeps the end of the stem, where the answer joins on."""
    varied = vary(stem + "|", rng, held_out=held_out)
    end = varied.rindex("|")
    return varied[:end] + (" " if rng.random() < 0.06 else "")


def _stop(sentence: str) -> str:
    return sentence if sentence.endswith(".") else f"{sentence}."
