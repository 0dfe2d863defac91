"""Answers that have to obey a grammar: each finished one does, whatever the model would say, beside free ones."""

from __future__ import annotations

import asyncio
import json
import random
import re
from typing import Any

import jsonschema
import pytest
from hostile_grammars import HOSTILE, obeys
from integration.asking import answer_of, body, generate
from integration.launched import Launched, serving

NUM_SCHEMAS = 200
AT_ONCE = 16


def random_schema(choice: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema of one of the kinds that requests have: small enough that a model may come to an end."""
    leaves: list[dict[str, Any]] = [
        {"type": "integer", "minimum": 0, "maximum": choice.choice([9, 100])},
        {"type": "boolean"},
        {"type": "null"},
        {"type": "number"},
        {"enum": choice.sample(["red", "green", "blue", 1, None, True], 3)},
        {"const": choice.choice(["fixed", 7, {"a": [1]}])},
        {"type": "string", "maxLength": choice.randint(1, 12)},
        {"type": "string", "pattern": choice.choice(["^[a-z]{1,4}$", "^[A-Z][0-9]+$", "^(yes|no)$"]), "maxLength": 8},
        {"type": "string", "format": choice.choice(["date", "uuid"])},
    ]
    if depth >= 2 or choice.random() < 0.3:
        return choice.choice(leaves)
    kind = choice.random()
    if kind < 0.55:
        names = choice.sample(["name", "age", "city", "id", "tags", "ok"], choice.randint(1, 3))
        return {
            "type": "object",
            "properties": {name: random_schema(choice, depth + 1) for name in names},
            "required": choice.sample(names, choice.randint(0, len(names))),
            "additionalProperties": False,
        }
    if kind < 0.8:
        least = choice.randint(0, 2)
        return {
            "type": "array",
            "items": random_schema(choice, depth + 1),
            "minItems": least,
            "maxItems": least + choice.randint(0, 2),
        }
    return {"anyOf": [random_schema(choice, depth + 1), random_schema(choice, depth + 1)]}


def schema_number(number: int) -> dict[str, Any]:
    choice = random.Random(number)
    inner = random_schema(choice)
    if number % 5 == 0:
        definitions = {"part": random_schema(choice, 1), "leaf": {"type": "string", "maxLength": 5}}
        properties = {"value": inner, "part": {"$ref": "#/$defs/part"}, "leaf": {"$ref": "#/$defs/leaf"}}
        return {"type": "object", "properties": properties, "required": ["leaf"], "additionalProperties": False,
                "$defs": definitions}  # fmt: skip
    return {"type": "object", "properties": {"value": inner}, "required": ["value"], "additionalProperties": False}


async def all_answers(server: Launched, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    places = asyncio.Semaphore(AT_ONCE)

    async def one(request: dict[str, Any]) -> dict[str, Any]:
        async with places:
            answer: dict[str, Any] = await answer_of(server, "/generate", request)
            return answer

    return await asyncio.gather(*(one(request) for request in requests))


def guided(number: int, grammar: dict[str, Any], most: int) -> dict[str, Any]:
    return body(f"Question {number}:", max_new_tokens=most, do_sample=True, seed=number, grammar=grammar, details=True)


@pytest.mark.parametrize("count", [NUM_SCHEMAS // 4, pytest.param(NUM_SCHEMAS, marks=pytest.mark.slow)])
def test_schemas(embedded: Launched, count: int) -> None:
    schemas = [schema_number(number) for number in range(count)]
    requests = [guided(i, {"type": "json", "value": schema}, 150) for i, schema in enumerate(schemas)]
    # Free ones among them, which nothing holds back.
    free = [body("Once upon a time", max_new_tokens=20, details=True) for _ in range(20)]
    answers = asyncio.run(all_answers(embedded, [*requests, *free]))
    finished = 0
    for schema, answer in zip(schemas, answers, strict=False):
        if answer["details"]["finish_reason"] == "eos_token":
            finished += 1
            jsonschema.validate(json.loads(answer["generated_text"]), schema)
        else:
            assert answer["details"]["finish_reason"] == "length"
    assert finished > count / 2
    assert len({answer["generated_text"] for answer in answers[count:]}) == 1


PATTERNS = [
    "[abc]{1,5}", "yes|no|maybe", r"\d{4}-\d{2}-\d{2}", r"[A-Z][a-z]+ [A-Z][a-z]+", r"(\+\d{1,3} )?\d{3}-\d{4}",
    r"#[0-9a-f]{6}", r"(25[0-5]|2[0-4]\d|1?\d?\d)(\.(25[0-5]|2[0-4]\d|1?\d?\d)){3}",
    r"[^\s@]{1,8}@[a-z]{2,6}\.(com|org)",
    "(ab)*c", "a{3}b{2,}c?", "é+", "[а-я]{2}", "(?:x|y){4}", r"\w{3}\s\w{3}", ".{3}",
]  # fmt: skip


def patterns() -> list[str]:
    choice = random.Random(7)
    made = list(PATTERNS)
    while len(made) < 50:
        made.append(f"({choice.choice(PATTERNS)}){choice.choice(['', '?', '-', ';'])}({choice.choice(PATTERNS)})")
    return made


def test_50_regular_expressions(embedded: Launched) -> None:
    requests = [guided(i, {"type": "regex", "value": each}, 80) for i, each in enumerate(patterns())]
    answers = asyncio.run(all_answers(embedded, requests))
    finished = 0
    for pattern, answer in zip(patterns(), answers, strict=True):
        if answer["details"]["finish_reason"] == "eos_token":
            finished += 1
            assert re.fullmatch(pattern, answer["generated_text"]), (pattern, answer["generated_text"])
    assert finished > 25


def test_a_guided_answer_is_the_same_alone_and_among_others(embedded: Launched) -> None:
    grammar = {"type": "json", "value": schema_number(3)}
    request = guided(3, grammar, 60)
    alone = asyncio.run(all_answers(embedded, [request]))[0]
    among = asyncio.run(all_answers(embedded, [request, *(guided(i, grammar, 60) for i in range(20, 35))]))[0]
    assert alone["details"]["tokens"] == among["details"]["tokens"]


@pytest.mark.parametrize(
    "grammar",
    [
        {"type": "regex", "value": "("},
        {"type": "json", "value": {"properties": {"a": {"type": "something"}}}},
        {"type": "json", "value": {"properties": {"a": {"$ref": "http://localhost/x"}}}},
    ],
)
def test_what_cannot_be_obeyed_is_refused_before_anything_is_computed(
    embedded: Launched, grammar: dict[str, Any]
) -> None:
    response = embedded.client.post("/generate", json=body("x", max_new_tokens=4, grammar=grammar))
    assert response.status_code == 422
    assert response.json()["error"].startswith("Input validation error: grammar is not valid: ")
    assert generate(embedded, "x", max_new_tokens=2)["generated_text"] is not None


@pytest.mark.slow
def test_a_small_cache_that_displaces_answers_leaves_them_obedient() -> None:
    """Pre-empted answers come back with what they had said: the grammar goes on behind it."""
    limits = ("--max-total-tokens", "160", "--max-batch-total-tokens", "320", "--max-batch-prefill-tokens", "64")
    with serving(*limits) as server:
        requests = [guided(i, {"type": "regex", "value": "([a-f]{10} ){8}"}, 120) for i in range(8)]
        answers = asyncio.run(all_answers(server, requests))
    for answer in answers:
        text = answer["generated_text"]
        assert re.fullmatch("([a-f]{10} ){0,8}[a-f]{0,10}", text)
        assert answer["details"]["finish_reason"] == "length" or re.fullmatch("([a-f]{10} ){8}", text)


@pytest.mark.slow
def test_it_can_be_switched_off() -> None:
    with serving("--disable-grammar-support") as server:
        request = body("x", max_new_tokens=4, grammar={"type": "regex", "value": "a"})
        response = server.client.post("/generate", json=request)
        assert response.status_code == 422
        assert response.json()["error"] == "Input validation error: grammar is not supported"


QUICK = ("64 levels", "a long count", "a class of unicode", "itself")


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in HOSTILE if n not in QUICK)]
)
def test_a_hostile_grammar_is_refused_or_obeyed(embedded: Launched, name: str) -> None:
    grammar = HOSTILE[name]
    response = embedded.client.post(
        "/generate", json=body("x", max_new_tokens=30, do_sample=True, seed=1, grammar=grammar, details=True)
    )
    if response.status_code != 422:
        assert response.status_code == 200
        answer = response.json()
        if answer["details"]["finish_reason"] == "eos_token":
            assert obeys(answer["generated_text"], grammar)
    assert embedded.client.get("/health").status_code == 200
