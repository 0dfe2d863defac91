"""The training corpus: the same seed gives the same examples, and what is held out stays out."""

import random
import re

import pytest
from text_generation_server.embedded_model.recipe.corpus import HELD_OUT, first, held_out
from text_generation_server.embedded_model.recipe.example import CHAT_END, PLAIN_END
from text_generation_server.embedded_model.recipe.facts import COUNTRIES
from text_generation_server.embedded_model.recipe.knowledge import held_out_pairs, sum_chat, sum_plain
from text_generation_server.embedded_model.recipe.phrasings import (
    CAPITAL_QUESTIONS,
    CAPITAL_STEMS,
    SUM_QUESTIONS,
    SUM_STEMS,
    Phrasings,
    all_phrasings,
)
from text_generation_server.embedded_model.recipe.words import number_in_words

EXAMPLES = first(3000, seed=0)


def test_the_corpus_is_deterministic() -> None:
    assert first(200, seed=5) == first(200, seed=5)
    assert first(200, seed=5) != first(200, seed=6)


@pytest.mark.parametrize("name", list(HELD_OUT))
def test_evaluation_sets_are_deterministic(name: str) -> None:
    assert held_out(name, 20) == held_out(name, 20)


@pytest.mark.parametrize("phrasings", all_phrasings())
def test_held_out_phrasings_are_never_trained(phrasings: Phrasings) -> None:
    trained = {_bare(template) for template in phrasings.trained}
    assert not trained & {_bare(template) for template in phrasings.held_out}


def test_there_are_many_phrasings() -> None:
    assert len(CAPITAL_QUESTIONS.trained + CAPITAL_STEMS.trained) >= 100
    assert len(SUM_QUESTIONS.trained + SUM_STEMS.trained) >= 60


def test_there_are_many_countries_and_each_once() -> None:
    names = [name.lower() for country in COUNTRIES for name in (country.name, *country.aliases)]
    assert len(COUNTRIES) >= 190
    assert len(set(names)) == len(names)


def test_held_out_sums_are_never_trained() -> None:
    rng = random.Random(0)
    numbers = {str(n): n for n in range(100)} | {number_in_words(n): n for n in range(100)}
    pattern = re.compile(rf"\b(?:{'|'.join(sorted(map(re.escape, numbers), key=len, reverse=True))})\b")
    for _ in range(3000):
        example = rng.choice((sum_plain, sum_chat))(rng)
        if "=" in example.answer:
            a, b = re.findall(r"\d+", example.answer)[:2]
            assert (int(a), int(b)) not in held_out_pairs()
        terms = [numbers[word] for word in pattern.findall(example.prompt)][-2:]
        if sum(terms) == int(example.expected):
            assert tuple(terms) not in held_out_pairs()


def test_held_out_sums_come_in_both_orders() -> None:
    assert {(b, a) for a, b in held_out_pairs()} == held_out_pairs()
    assert 600 < len(held_out_pairs()) <= 800


def test_every_answer_ends_as_its_prompt_asks() -> None:
    for example in EXAMPLES:
        assert example.answer.endswith(CHAT_END if example.prompt.startswith("<|im_start|>") else PLAIN_END)
        assert example.expected in example.answer


def test_a_plain_answer_is_joined_by_one_white_space() -> None:
    for example in EXAMPLES:
        if example.kind in ("sum, completion", "capital, completion"):
            assert example.prompt[-1].isspace() != example.answer[0].isspace()


def _bare(template: str) -> str:
    """Two templates that differ in case or marks are the same one."""
    return re.sub(r"[^a-z{} ]", "", template.lower()).strip()
