"""What clients send -> a grammar: TGI's `grammar`, OpenAI's `response_format`, and each where the other is expected.

Pure; nothing is compiled here, but what no grammar may be is refused: too large, too deep, of no known kind.
"""

from __future__ import annotations

import json
from typing import Any

from text_generation_proto.grammars import Grammar, GrammarKind

from text_generation_router.errors import ValidationError

MAX_BYTES = 64 * 2**10
"""Of a schema, written out, or of a regular expression."""
MAX_DEPTH = 32
ANY_OBJECT: dict[str, Any] = {"type": "object"}

_INVALID = "grammar is not valid: "


def native_grammar(given: Any) -> Grammar:
    """TGI's ``grammar``: ``{"type": "json" | "json_schema" | "regex", "value": …}``. Raises: ValidationError."""
    if not isinstance(given, dict):
        raise ValidationError("grammar is not supported")
    value = given.get("value")
    match given.get("type"):
        case "regex":
            return regex(value)
        case "json" | "json_object":
            if isinstance(value, str):
                value = _parsed(value)
            if not isinstance(value, dict):
                raise ValidationError("grammar is not supported")
            if "properties" not in value:
                raise ValidationError(f"{_INVALID}Grammar must have a 'properties' field")
            return schema(value)
        case "json_schema":
            if not isinstance(value, dict) or "schema" not in value:
                raise ValidationError(f"{_INVALID}`json_schema` must have `value.schema`")
            return schema(value["schema"])
        case other:
            raise ValidationError(f"{_INVALID}`type` must be json, json_object, json_schema or regex, not {other!r}")


def response_format(given: Any) -> Grammar | None:
    """OpenAI's ``response_format``, and TGI's forms of it; None where anything may be said. Raises: ValidationError."""
    if not isinstance(given, dict):
        raise ValidationError("`response_format` must be an object")
    kind = given.get("type")
    if kind == "text":
        return None
    if "value" in given:
        return native_grammar(given)
    if kind == "json_object":
        nested = given.get("schema")  # as other servers take it
        return schema(ANY_OBJECT if nested is None else nested)
    if kind == "json_schema":
        nested = given.get("json_schema")
        if not isinstance(nested, dict) or not isinstance(nested.get("schema"), dict):
            raise ValidationError("`response_format` of the type json_schema must have `json_schema.schema`")
        return schema(nested["schema"])
    if kind == "regex":
        return regex(given.get("regex", given.get("pattern")))
    raise ValidationError(f"`response_format` of the type {kind!r} is not supported: text, json_object or json_schema")


def schema(given: Any) -> Grammar:
    """Raises: ValidationError."""
    if not isinstance(given, dict | bool):
        raise ValidationError(f"{_INVALID}a schema must be an object")
    source = json.dumps(given)
    if len(source) > MAX_BYTES:
        raise ValidationError(f"{_INVALID}the schema has more than {MAX_BYTES} bytes")
    if _depth(given) > MAX_DEPTH:
        raise ValidationError(f"{_INVALID}the schema has more than {MAX_DEPTH} levels")
    return Grammar(GrammarKind.JSON_SCHEMA, source)


def regex(given: Any) -> Grammar:
    """Raises: ValidationError."""
    if not isinstance(given, str):
        raise ValidationError("grammar is not supported")
    if len(given.encode(errors="replace")) > MAX_BYTES:
        raise ValidationError(f"{_INVALID}the regular expression has more than {MAX_BYTES} bytes")
    return Grammar(GrammarKind.REGEX, given)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValidationError(f"{_INVALID}{error}") from None


def _depth(value: Any) -> int:
    """Levels of objects and arrays, counted without recursion."""
    deepest = 0
    left = [(value, 1)]
    while left:
        each, level = left.pop()
        children = each.values() if isinstance(each, dict) else each if isinstance(each, list) else ()
        if children:
            deepest = max(deepest, level)
            if deepest > MAX_DEPTH:
                break
            left += [(child, level + 1) for child in children]
    return deepest
