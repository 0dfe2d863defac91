"""Values at and beyond every bound, for every field of every body, made from the OpenAPI document that is served."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
import scripted
from text_generation_router.api.openapi import document

DOCUMENT = document("test")
NUMBERS = [-1, 0, 1, 2**31 - 1, 2**31, 2**32, 2**53, 2**63, 2**64, -(2**63), 0.0, -0.0, 1e-320, 1e308, 0.999999999]
NO_NUMBERS: list[Any] = ["5", True, None, [], {}, "NaN"]
TEXTS: list[Any] = ["", "x" * 300, "x" * 70_000, "\x00", "\ud800", "\uffff", "🦊", 5, None, ["x"], {"a": 1}]
LISTS: list[Any] = [[], [[]], [None], ["x"] * 2000, [{}] * 200, {}, "x", 5, None, [1e308] * 100]
OBJECTS: list[Any] = [{}, {"x": {"y": []}}, {"": ""}, [], "x", 5, None, {str(i): i for i in range(3000)}]
RAW = ["NaN", "Infinity", "-Infinity", "1e400", "01", "9" * 5000, "1.0", "-0"]
MARK = "@@raw@@"

CHAT = [{"role": "user", "content": "hi"}]
SMALLEST: dict[str, dict[str, Any]] = {
    "/": {"inputs": "hi"},
    "/generate": {"inputs": "hi"},
    "/generate_stream": {"inputs": "hi"},
    "/tokenize": {"inputs": "hi"},
    "/chat_tokenize": {"messages": CHAT},
    "/v1/chat/completions": {"messages": CHAT},
    "/v1/completions": {"prompt": "hi"},
    "/v1/responses": {"input": "hi"},
    "/v1/messages": {"model": "tgi", "messages": CHAT, "max_tokens": 4},
    "/v1/messages/count_tokens": {"model": "tgi", "messages": CHAT},
    "/v1/embeddings": {"input": "hi"},
    "/embed": {"inputs": "hi"},
    "/vertex": {"instances": [{"inputs": "hi"}]},
    "/invocations": {"inputs": "hi"},
}


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in schema:
        schema = DOCUMENT["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return schema


def alternatives(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    schema = resolved(schema)
    for key in ("anyOf", "oneOf"):
        if key in schema:
            for each in schema[key]:
                yield from alternatives(each)
            return
    yield schema


def fields(schema: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], set[str]]]:
    """Every member of an object, and of the objects in it, with the JSON types that it may have."""
    for each in alternatives(schema):
        for name, member in each.get("properties", {}).items():
            forms = list(alternatives(member))
            kinds = {kind for form in forms for kind in _kinds(form)}
            yield (*path, name), kinds
            if len(path) < 2:
                yield from fields(member, (*path, name))


def _kinds(form: dict[str, Any]) -> list[str]:
    kind = form.get("type", "any")
    return kind if isinstance(kind, list) else [kind]


def values_for(kinds: set[str]) -> list[Any]:
    values: list[Any] = [MARK]
    if kinds & {"integer", "number", "any"}:
        values += [*NUMBERS, *NO_NUMBERS]
    if kinds & {"string", "any"}:
        values += TEXTS
    if kinds & {"array", "any"}:
        values += LISTS
    if kinds & {"object", "any"}:
        values += OBJECTS
    if "boolean" in kinds:
        values += [True, False, 1, "true", None]
    return values


def bodies(path: str) -> Iterator[bytes]:
    content = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]
    for names, kinds in fields(content["application/json"]["schema"]):
        for value in values_for(kinds):
            body = copy.deepcopy(SMALLEST[path])
            place: Any = body
            for name in names[:-1]:
                if not isinstance(place.get(name), dict):
                    place[name] = {}
                place = place[name]
            place[names[-1]] = value
            text = json.dumps(body)
            if value == MARK:
                yield from (text.replace(f'"{MARK}"', raw).encode() for raw in RAW)
            else:
                yield text.encode()


PATHS = sorted(path for path, methods in DOCUMENT["paths"].items() if "requestBody" in methods.get("post", {}))


def test_every_path_has_a_smallest_body() -> None:
    assert set(PATHS) == set(SMALLEST)


@pytest.mark.parametrize("path", PATHS)
async def test_no_value_is_too_much(path: str) -> None:
    """422 with words, or an answer; what is no JSON is 400. Nothing that a client sends is a defect of the server."""
    operation = DOCUMENT["paths"][path]["post"]
    documented = {int(status) for status in operation["responses"]}
    sent = 0
    async with scripted.running() as router:
        for content in bodies(path):
            response = await router.client.post(path, content=content, headers={"content-type": "application/json"})
            assert response.status_code in documented - {500, 503, 424}, (content[:500], response.text[:500])
            if response.status_code != 200:
                assert 0 < len(response.content) < 2000, "it says why, and quotes no megabytes"
            sent += 1
        await router.idle()
    assert sent > 10 or path == "/invocations", "whose bodies are those of other routes"
