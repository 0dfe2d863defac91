"""Every way to say what an answer has to obey, and what no grammar may be."""

from __future__ import annotations

import json
from typing import Any

import pytest
from text_generation_proto.grammars import Grammar, GrammarKind
from text_generation_router.errors import ValidationError
from text_generation_router.guidance.formats import native_grammar, response_format

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
AS_SCHEMA = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA))
ANY_OBJECT = Grammar(GrammarKind.JSON_SCHEMA, '{"type": "object"}')


@pytest.mark.parametrize(
    ("given", "grammar"),
    [
        ({"type": "json", "value": SCHEMA}, AS_SCHEMA),
        ({"type": "json_object", "value": SCHEMA}, AS_SCHEMA),
        ({"type": "json", "value": json.dumps(SCHEMA)}, AS_SCHEMA),
        ({"type": "json_schema", "value": {"name": "x", "schema": SCHEMA}}, AS_SCHEMA),
        ({"type": "regex", "value": "[ab]+"}, Grammar(GrammarKind.REGEX, "[ab]+")),
    ],
)
def test_tgis_forms(given: dict[str, Any], grammar: Grammar) -> None:
    assert native_grammar(given) == grammar
    assert response_format(given) == grammar, "which its chat route takes as well"


@pytest.mark.parametrize(
    ("given", "grammar"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, ANY_OBJECT),
        ({"type": "json_object", "schema": SCHEMA}, AS_SCHEMA),
        ({"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}, AS_SCHEMA),
    ],
)
def test_openais_forms(given: dict[str, Any], grammar: Grammar | None) -> None:
    assert response_format(given) == grammar


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"type": "json", "value": 5}, "grammar is not supported"),
        ({"type": "json", "value": "{"}, "grammar is not valid: "),
        ({"type": "json", "value": {"type": "object"}}, "grammar is not valid: Grammar must have a 'properties' field"),
        ({"type": "json_schema", "value": SCHEMA}, "`value.schema`"),
        ({"type": "regex", "value": {}}, "grammar is not supported"),
        ({"type": "xml", "value": ""}, "`type` must be json"),
        ({"value": ""}, "`type` must be json"),
        ([], "grammar is not supported"),
        ({"type": "regex", "value": "a" * 70_000}, "more than 65536 bytes"),
        ({"type": "json", "value": {"properties": {"a": {"const": "x" * 70_000}}}}, "more than 65536 bytes"),
    ],
)
def test_what_is_no_native_grammar(given: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=f"^Input validation error: .*{message}"):
        native_grammar(given)


def test_a_schema_that_is_too_deep_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(40):
        schema = {"properties": {"a": schema}}
    with pytest.raises(ValidationError, match="more than 32 levels"):
        native_grammar({"type": "json", "value": schema})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("json", "must be an object"),
        ({"type": "json_schema"}, "must have `json_schema.schema`"),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, "must have `json_schema.schema`"),
        ({"type": "xml"}, "'xml' is not supported"),
    ],
)
def test_what_is_no_response_format(given: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        response_format(given)
