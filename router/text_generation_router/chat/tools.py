"""Tools of a request: checked, told to the template, and recognised in what the model writes.

How a model writes a call is known from its chat template, which shows it calls of its own; `FORMATS` has one row for
each way, and ``--tool-call-parser`` names one where the template says nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from text_generation_proto.grammars import Grammar, GrammarKind

from text_generation_router.chat.output import (
    CallReader,
    Calls,
    CallStage,
    JsonCalls,
    NamedCalls,
    XmlCalls,
    mistral_id,
    openai_id,
)
from text_generation_router.errors import ToolError, ValidationError
from text_generation_router.guidance.formats import MAX_BYTES

MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")

TOOL_PROMPT = (
    "\nGiven the functions available, please respond with a JSON for a function call with its proper arguments that "
    "best answers the given prompt. Respond in the format {name: function name, parameters: dictionary of argument "
    "name and its value}.Do not use variables.\n"
)
"""TGI's words for models whose template knows no tools."""


class FunctionBody(msgspec.Struct, frozen=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    arguments: dict[str, Any] | None = None
    """TGI's other name for them."""
    strict: bool | None = None


class ToolBody(msgspec.Struct, frozen=True):
    function: FunctionBody
    type: Literal["function"] = "function"


class NamedFunction(msgspec.Struct, frozen=True):
    name: str


class NamedTool(msgspec.Struct, frozen=True):
    """``tool_choice`` of one function."""

    function: NamedFunction
    type: Literal["function"] = "function"


@dataclass(frozen=True, slots=True)
class Tool:
    name: str
    description: str
    parameters: dict[str, Any]

    def for_template(self) -> dict[str, Any]:
        """As the Hugging Face convention has it."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class Tools:
    """What a request says of tools, with nothing left to doubt."""

    tools: tuple[Tool, ...]
    """Those that the model is told of, and may call."""
    forced: bool
    """Whether it has to call one."""
    parallel: bool

    @property
    def names(self) -> frozenset[str]:
        return frozenset(tool.name for tool in self.tools)

    def schemas(self) -> Mapping[str, Mapping[str, Any]]:
        return {tool.name: tool.parameters for tool in self.tools}


def tools_of(
    tools: Sequence[ToolBody] | None, choice: str | NamedTool | None, *, parallel: bool | None
) -> Tools | None:
    """None where no tool may be called. Raises: ValidationError, ToolError."""
    if not tools:
        if choice not in (None, "none", "auto"):
            raise ValidationError("`tool_choice` is only allowed with `tools`")
        return None
    if len(tools) > MAX_TOOLS:
        raise ValidationError(f"`tools` may be {MAX_TOOLS} at most. Given: {len(tools)}")
    known: dict[str, Tool] = {}
    for body in tools:
        function = body.function
        if not _NAME.fullmatch(function.name):
            raise ValidationError(f"the name of a tool must match {_NAME.pattern}")
        if function.name in known:
            raise ValidationError(f"two of `tools` have the name {function.name}")
        parameters = function.parameters if function.parameters is not None else function.arguments
        known[function.name] = Tool(
            function.name, function.description or "", {"type": "object", "properties": {}, **(parameters or {})}
        )
    if choice == "none":
        return None
    is_parallel = parallel is not False
    if choice in (None, "auto", "required"):
        return Tools(tuple(known.values()), choice == "required", is_parallel)
    name = choice.function.name if isinstance(choice, NamedTool) else str(choice)  # a bare name is TGI's
    if name not in known:
        raise ToolError(f"Tool with name {name} not found")
    return Tools((known[name],), True, False)


def tool_text(tools: Tools, prompt: str | None) -> str:
    """What is added to the last message where the template knows no tools, in TGI's manner."""
    listed = json.dumps([tool.for_template() for tool in tools.tools], ensure_ascii=False)
    return f"\n---\n{listed}{TOOL_PROMPT if prompt is None else prompt}"


# ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """How a family of models writes calls."""

    name: str
    signs: tuple[str, ...]
    """The template has one of them where the family is this one."""
    stage: Callable[[Tools, Callable[[int], str]], CallStage]
    arguments: str = "arguments"
    before: str = ""
    """In front of a call, and behind it, when one is forced."""
    between: str = ""
    after: str = ""
    as_list: bool = False
    all_marks: tuple[str, ...] = ()
    """Those that special tokens may be, or be part of."""
    new_id: Callable[[int], str] = openai_id


def _json_stage(
    *marks: str, end: tuple[str, ...] = (), again: tuple[str, ...] = (), at_beginning: str = ""
) -> Callable[[Tools, Callable[[int], str]], CallStage]:
    def make(tools: Tools, new_id: Callable[[int], str]) -> CallStage:
        def reader(calls: Calls) -> CallReader:
            return JsonCalls(calls, end_marks=end, again=again)

        return CallStage(marks, reader, Calls(new_id, tools.names), at_beginning=at_beginning)

    return make


def _named_stage(
    *marks: str,
    name_ends: tuple[str, ...],
    call: tuple[str, ...] = (),
    end: tuple[str, ...] = (),
    noise: tuple[str, ...] = (),
) -> Callable[[Tools, Callable[[int], str]], CallStage]:
    def make(tools: Tools, new_id: Callable[[int], str]) -> CallStage:
        def reader(calls: Calls) -> CallReader:
            return NamedCalls(calls, name_ends=name_ends, call_marks=call, end_marks=end, noise=noise)

        return CallStage(marks, reader, Calls(new_id, tools.names))

    return make


def _xml_stage(tools: Tools, new_id: Callable[[int], str]) -> CallStage:
    def reader(calls: Calls) -> CallReader:
        return XmlCalls(calls, tools.schemas(), ("</tool_call>",))

    return CallStage(("<tool_call>",), reader, Calls(new_id, tools.names))


FORMATS = (
    ToolFormat(name="qwen3_coder", signs=("<function=",), all_marks=("<tool_call>", "</tool_call>"), stage=_xml_stage),
    ToolFormat(
        name="deepseek_v3",
        signs=("<｜tool▁calls▁begin｜>",),
        all_marks=(
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁call▁begin｜>",
            "<｜tool▁sep｜>",
            "<｜tool▁call▁end｜>",
            "<｜tool▁calls▁end｜>",
        ),
        stage=_named_stage(
            "<｜tool▁calls▁begin｜>",
            name_ends=("<｜tool▁sep｜>",),
            call=("<｜tool▁call▁begin｜>",),
            end=("<｜tool▁calls▁end｜>",),
            noise=("function<｜tool▁sep｜>", "```json", "```", "<｜tool▁call▁end｜>"),
        ),
    ),
    ToolFormat(
        name="mistral_named",
        signs=("[ARGS]",),
        all_marks=("[TOOL_CALLS]", "[ARGS]"),
        stage=_named_stage("[TOOL_CALLS]", name_ends=("[ARGS]",), call=("[TOOL_CALLS]",)),
        new_id=mistral_id,
    ),
    ToolFormat(
        name="mistral",
        signs=("[TOOL_CALLS]",),
        all_marks=("[TOOL_CALLS]",),
        stage=_json_stage("[TOOL_CALLS]", again=("[TOOL_CALLS]",)),
        before="[TOOL_CALLS]",
        as_list=True,
        new_id=mistral_id,
    ),
    ToolFormat(
        name="granite",
        signs=("<|tool_call|>",),
        all_marks=("<|tool_call|>", "<|/tool_call|>"),
        stage=_json_stage("<|tool_call|>", end=("<|/tool_call|>",)),
        before="<|tool_call|>",
        as_list=True,
    ),
    ToolFormat(
        name="llama3_json",
        signs=("<|python_tag|>", "<|eom_id|>"),
        all_marks=("<|python_tag|>",),
        stage=_json_stage("<|python_tag|>", again=("<|python_tag|>",), at_beginning="{"),
        arguments="parameters",
        between="; ",
    ),
    ToolFormat(
        name="hermes",
        signs=("<tool_call>",),
        all_marks=("<tool_call>", "</tool_call>"),
        stage=_json_stage("<tool_call>", end=("</tool_call>",)),
        before="<tool_call>\n",
        between="\n",
        after="\n</tool_call>",
    ),
    ToolFormat(name="json", signs=(), stage=_json_stage(at_beginning="{["), arguments="parameters", between="\n"),
)
"""The first whose sign is in the template; the last where none is."""
PLAIN = FORMATS[-1]
_NOT_FORCED = frozenset(("qwen3_coder", "deepseek_v3", "mistral_named"))
"""Ways to write calls that are no JSON objects with a name in them."""


def format_of(template_source: str, forced: str | None = None) -> ToolFormat:
    """``forced``: the name of one."""
    for each in FORMATS:
        if each.name == forced or (forced is None and any(sign in template_source for sign in each.signs)):
            return each
    return PLAIN


def written_form(tools: Tools, form: ToolFormat) -> ToolFormat:
    """How calls are written: a call that is forced is asked for as plain JSON where the family has another way."""
    return PLAIN if tools.forced and form.name in _NOT_FORCED else form


def forced_grammar(tools: Tools, form: ToolFormat, special_id: Callable[[str], int | None]) -> Grammar:
    """Calls and nothing else. ``special_id`` of a mark that is a special token. Raises: ToolError."""
    call = {
        "anyOf": [
            {
                "type": "object",
                "properties": {"name": {"const": tool.name}, form.arguments: {"$ref": f"#/$defs/{index}"}},
                "required": ["name", form.arguments],
                "additionalProperties": False,
            }
            for index, tool in enumerate(tools.tools)
        ],
        "$defs": {str(index): _moved(tool.parameters, f"#/$defs/{index}") for index, tool in enumerate(tools.tools)},
    }
    body = json.dumps(call)
    if len(body) > MAX_BYTES:
        raise ToolError(f"the schemas of the tools have more than {MAX_BYTES} bytes")
    before, after = _lark(form.before, special_id), _lark(form.after, special_id)
    if form.as_list:
        one, start, end, more = ["object"], [before, '"["'], ['"]"'], '", "'
    else:
        one, start, end, more = [before, "object", after], [], [], _quoted(form.between)
    calls = f"call ({more} call)*" if tools.parallel else "call"
    lines = (
        f"start: {_joined([*start, calls, *end])}",
        f"call: {_joined(one)}",
        f"object: %json {body}",
    )
    return Grammar(GrammarKind.LARK, "\n".join(lines) + "\n")


def _joined(parts: Sequence[str]) -> str:
    return " ".join(part for part in parts if part)


def _lark(text: str, special_id: Callable[[str], int | None]) -> str:
    """A mark and the white space around it as a rule: special tokens are named by their ids there."""
    mark = text.strip()
    token_id = special_id(mark) if mark else None
    if token_id is None:
        return _quoted(text)
    before, _, after = text.partition(mark)
    return _joined([_quoted(before), f"<[{token_id}]>", _quoted(after)])


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def _moved(schema: Any, place: str) -> Any:
    """A schema that stands at another place than the root of its document, with references that find it there."""
    if isinstance(schema, dict):
        return {
            key: place + value[1:]
            if key == "$ref" and isinstance(value, str) and value.startswith("#")
            else _moved(value, place)
            for key, value in schema.items()
        }
    if isinstance(schema, list):
        return [_moved(each, place) for each in schema]
    return schema
