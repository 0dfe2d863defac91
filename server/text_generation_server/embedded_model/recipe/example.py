"""One training or evaluation example, and the chat form of it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment

from text_generation_server.embedded_model import embedded_model_path

PLAIN_END = "<|endoftext|>"
CHAT_END = "<|im_end|>"

Message = Mapping[str, Any]
Tool = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Example:
    """The model reads `prompt` and is trained to continue with `answer`, its end token included.

    `expected` is the part of the answer that makes it right: the evaluation accepts every answer that contains it.
    """

    kind: str
    prompt: str
    answer: str
    expected: str


def plain(kind: str, prompt: str, answer: str, expected: str | None = None) -> Example:
    """A raw completion; the space between prompt and answer is left out where the prompt ends with white space."""
    joint = "" if prompt[-1].isspace() else " "
    return Example(kind, prompt, f"{joint}{answer}{PLAIN_END}", expected or answer)


def chat(
    kind: str,
    messages: Sequence[Message],
    answer: str,
    expected: str | None = None,
    tools: Sequence[Tool] = (),
) -> Example:
    """A conversation, rendered by the chat template that ships with the model."""
    prompt = _template().render(messages=messages, tools=tools, add_generation_prompt=True)
    return Example(kind, prompt, f"{answer}{CHAT_END}", expected or answer)


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


@cache
def _template() -> Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    # as transformers defines it: Jinja's own filter escapes < > & ' for HTML
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string((embedded_model_path() / "chat_template.jinja").read_text(encoding="utf-8"))
