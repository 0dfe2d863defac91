"""What a request says of tools, and the grammar of a call that is forced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from builders import byte_tokenizer
from text_generation_proto.grammars import load_tokenizer, new_matcher
from text_generation_router.chat.output import CallArguments, CallBegins, counted_id
from text_generation_router.chat.tools import (
    FORMATS,
    FunctionBody,
    NamedFunction,
    NamedTool,
    Tool,
    ToolBody,
    ToolFormat,
    Tools,
    forced_grammar,
    format_of,
    tools_of,
    written_form,
)
from text_generation_router.errors import RouterError

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = ToolBody(FunctionBody("weather", "Tells the weather", CITY))
TIME = ToolBody(FunctionBody("time"))
BOTH = [WEATHER, TIME]


def names(tools: Tools | None) -> list[str]:
    return [tool.name for tool in tools.tools] if tools else []


@pytest.mark.parametrize(
    ("choice", "called", "forced"),
    [
        (None, ["weather", "time"], False),
        ("auto", ["weather", "time"], False),
        ("none", [], False),
        ("required", ["weather", "time"], True),
        (NamedTool(NamedFunction("time")), ["time"], True),
        ("time", ["time"], True),
    ],
)
def test_the_choice(choice: str | NamedTool | None, called: list[str], forced: bool) -> None:
    tools = tools_of(BOTH, choice, parallel=None)
    assert names(tools) == called
    assert bool(tools and tools.forced) == forced


def test_templates_get_tools_as_the_convention_has_them() -> None:
    tools = tools_of([WEATHER, ToolBody(FunctionBody("f", arguments={"properties": {"x": {}}}))], None, parallel=None)
    assert tools is not None
    assert [tool.for_template()["function"] for tool in tools.tools] == [
        {"name": "weather", "description": "Tells the weather", "parameters": CITY},
        {"name": "f", "description": "", "parameters": {"type": "object", "properties": {"x": {}}}},
    ]


@pytest.mark.parametrize(
    ("tools", "choice", "message"),
    [
        (BOTH, "unknown", "Tool error: Tool with name unknown not found"),
        ([TIME, TIME], None, "two of `tools` have the name time"),
        ([ToolBody(FunctionBody("no name"))], None, "the name of a tool must match"),
        ([ToolBody(FunctionBody(f"t{i}")) for i in range(129)], None, "128 at most"),
        ([], "required", "only allowed with `tools`"),
        (None, "time", "only allowed with `tools`"),
    ],
)
def test_what_does_not_fit_together(tools: list[ToolBody] | None, choice: str | None, message: str) -> None:
    with pytest.raises(RouterError, match=message):
        tools_of(tools, choice, parallel=None)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ('... <tool_call>\n{"name": ...', "hermes"),
        ("... <tool_call>\n<function=...", "qwen3_coder"),
        ("... <|python_tag|> ...", "llama3_json"),
        ("... [TOOL_CALLS] ...", "mistral"),
        ("... [TOOL_CALLS] ... [ARGS] ...", "mistral_named"),
        ("... <｜tool▁calls▁begin｜> ...", "deepseek_v3"),
        ("... <|tool_call|> ...", "granite"),
        ("nothing of it", "json"),
    ],
)
def test_the_template_says_how_calls_are_written(source: str, name: str) -> None:
    assert format_of(source).name == name
    assert format_of(source, "mistral").name == "mistral"


def complete(matcher: Any, tokenizer: Any, text: str) -> bool:
    """Whether the grammar takes the text, and may end behind it."""
    return bool(matcher.consume_tokens(tokenizer.tokenize_str(text)) and matcher.is_accepting())


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("has_special_tokens", [False, True])
def test_a_forced_call_is_what_the_reader_reads(form: ToolFormat, has_special_tokens: bool, tmp_path: Path) -> None:
    tools = tools_of(BOTH, "required", parallel=True)
    assert tools is not None
    form = written_form(tools, form)
    marks = tuple(sorted({mark.strip() for mark in (form.before, form.after) if mark.strip()}))
    hf = byte_tokenizer(("</s>", *marks) if has_special_tokens else ("</s>",))
    path = tmp_path / "tokenizer.json"
    hf.save(str(path))
    tokenizer = load_tokenizer(path, 320, [256])
    grammar = forced_grammar(tools, form, lambda mark: hf.token_to_id(mark) if has_special_tokens else None)

    arguments = {"city": "Paris"}
    calls = [{"name": "weather", form.arguments: arguments}, {"name": "time", form.arguments: {}}]
    for chosen in (calls[:1], calls):
        texts = [json.dumps(call) for call in chosen]
        if form.as_list:
            text = f"{form.before}[{', '.join(texts)}]"
        else:
            text = form.between.join(f"{form.before}{each}{form.after}" for each in texts)
        ids = hf.encode(text).ids
        matcher = new_matcher(tokenizer, grammar)
        assert matcher.consume_tokens(ids), (text, matcher.get_error())
        assert matcher.is_accepting()
        stage = form.stage(tools, counted_id)
        parts = [*stage.feed(text), *stage.end()]
        assert [part.name for part in parts if isinstance(part, CallBegins)] == [call["name"] for call in chosen]
        read = [
            "".join(p.text for p in parts if isinstance(p, CallArguments) and p.index == i) for i in range(len(chosen))
        ]
        assert [json.loads(each) for each in read] == [call[form.arguments] for call in chosen]


def test_one_call_is_one_call(tmp_path: Path) -> None:
    tools = tools_of(BOTH, "required", parallel=False)
    assert tools is not None
    form = format_of("", "json")
    path = tmp_path / "tokenizer.json"
    byte_tokenizer().save(str(path))
    tokenizer = load_tokenizer(path, 320, [256])
    matcher = new_matcher(tokenizer, forced_grammar(tools, form, lambda mark: None))
    assert matcher.consume_tokens(byte_tokenizer().encode('{"name": "time", "parameters": {}}').ids)
    assert matcher.is_stopped(), "nothing may follow"


def test_definitions_of_different_tools_stay_apart(tmp_path: Path) -> None:
    def tool(name: str, item: dict[str, Any]) -> Tool:
        properties = {"a": {"$ref": "#/$defs/Item"}, "more": {"$ref": "#"}}
        return Tool(name, "", {"type": "object", "properties": properties, "required": ["a"], "$defs": {"Item": item}})

    tools = Tools((tool("f", {"type": "integer"}), tool("g", {"type": "boolean"})), True, False)
    path = tmp_path / "tokenizer.json"
    byte_tokenizer().save(str(path))
    tokenizer = load_tokenizer(path, 320, [256])
    grammar = forced_grammar(tools, FORMATS[-1], lambda mark: None)
    for name, value, obeys in (("f", "1", True), ("g", "true", True), ("f", "true", False), ("g", "1", False)):
        for text in (
            f'{{"name": "{name}", "parameters": {{"a": {value}}}}}',
            f'{{"name": "{name}", "parameters": {{"a": {value}, "more": {{"a": {value}}}}}}}',
        ):
            taken = new_matcher(tokenizer, grammar).consume_tokens(byte_tokenizer().encode(text).ids)
            assert taken == obeys, text
