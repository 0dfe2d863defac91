"""Grammars that hung, crashed or filled other servers: each is to end in a refusal, or in an answer that obeys it."""

from __future__ import annotations

import json
from typing import Any


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"anyOf": [schema, {"type": "string"}]}
    return schema


def _value(schema: Any) -> dict[str, Any]:
    return {"type": "json", "value": {"type": "object", "properties": {"a": schema}, "required": ["a"]}}


def _regex(pattern: str) -> dict[str, Any]:
    return {"type": "regex", "value": pattern}


HOSTILE: dict[str, dict[str, Any]] = {
    "no such type": _value({"type": "something"}),
    "half a pattern": _value({"type": "string", "pattern": "("}),
    "half a group": _regex("(?:"),
    "a loop of references": {"type": "json", "value": {"properties": {}, "$ref": "#/$defs/a",
                             "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}},
    "a reference to elsewhere": _value({"$ref": "http://169.254.169.254/latest"}),
    "a thousand million items": _value({"type": "array", "items": {"type": "integer"}, "minItems": 10**9}),
    "many optional letters": _regex("(a?){1000}a{1000}"),
    "a long count": _regex("[a-z]{1,100000}"),
    "stars in stars": _regex("((a+)+)+b"),
    "any texts in a row": _regex(".*.*.*.*=x"),
    "a class of unicode": _regex(r"\p{L}{0,5000}"),
    "counts in counts": _regex("((a{0,200}){0,200}){0,200}"),
    "64 levels": _value(_nested(64)),
    "20 levels": _value(_nested(20)),
    "10,000 values": _value({"enum": [f"value number {number}" for number in range(10_000)]}),
    "2,000 values": _value({"enum": [f"value number {number}" for number in range(2_000)]}),
    "a megabyte": _value({"const": "x" * 10**6}),
    "50,000 characters": _value({"const": "x" * 50_000}),
    "300 patterns": _value({"anyOf": [{"type": "string", "pattern": f"^.*{n}.*{n + 1}$"} for n in range(300)]}),
    "a pattern of alternatives": _regex("|".join(f"(.*{number}.*)" for number in range(200))),
    "300 optional members": _value({"type": "object", "properties": {f"m{n}": {"type": "string"} for n in range(300)}}),
    "itself": {"type": "json", "value": {"properties": {"next": {"$ref": "#"}}, "required": ["next"]}},
    "all of 200": _value({"allOf": [{"type": "object", "properties": {f"m{n}": {}}} for n in range(200)]}),
}  # fmt: skip


def obeys(text: str, grammar: dict[str, Any]) -> bool:
    """Whether a finished answer is one of the grammar's."""
    import re

    import jsonschema

    if grammar["type"] == "regex":
        return re.fullmatch(grammar["value"].replace(r"\p{L}", r"[^\W\d_]"), text, re.S) is not None
    try:
        jsonschema.validate(json.loads(text), grammar["value"])
    except (ValueError, jsonschema.ValidationError):
        return False
    return True
