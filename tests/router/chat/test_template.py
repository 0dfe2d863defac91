"""Chat templates: found where models have them, rendered as transformers does, stopped where they go wild."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from text_generation_router.chat import template as templates
from text_generation_router.chat.template import ChatTemplate, load_template
from text_generation_router.config import ConfigError
from text_generation_router.errors import TemplateFailed

CHATML = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
HELLO = [{"role": "user", "content": "Hello"}]


async def render(source: str, messages: list[dict[str, Any]] = HELLO, **options: Any) -> str:
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    try:
        return await template.render(messages, **options)
    finally:
        template.close()


async def test_a_prompt_ends_where_the_answer_begins() -> None:
    assert await render(CHATML) == "<|user|>Hello</s>\n<|assistant|>"


async def test_an_answer_at_the_end_is_continued() -> None:
    messages = [*HELLO, {"role": "assistant", "content": "Hello, how "}]
    assert await render(CHATML, messages) == "<|user|>Hello</s>\n<|assistant|>Hello, how"


@pytest.mark.parametrize("begun", ["|", "<", "end", "im_end|>", "  indented", "</s>"])
async def test_an_answer_is_continued_behind_itself_and_not_behind_its_like(begun: str) -> None:
    chatml = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    prompt = await render(chatml, [*HELLO, {"role": "assistant", "content": begun}])
    assert prompt == f"<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n{begun}"


async def test_an_answer_that_the_template_leaves_out_cannot_be_continued() -> None:
    with pytest.raises(TemplateFailed, match="leaves out the assistant's message"):
        await render("{{ messages[0].content }}", [*HELLO, {"role": "assistant", "content": "Well"}])


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ bos_token }}{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}x{% endfor %}", "<s>"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "Hello"),
        ("{{ {'a': 'ä<'} | tojson }}", '{"a": "ä<"}'),
        ("{{ {'b': 1, 'a': [2]} | tojson(indent=2) }}", json.dumps({"b": 1, "a": [2]}, indent=2)),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ tools is none }}{{ unknown is defined }}", "TrueFalse"),
        ("{{ messages[0].content.upper()[::-1] }}", "OLLEH"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = 7 %}{% endfor %}{{ ns.n }}", "7"),
        ("  {% if true %}\n  x\n  {% endif %}\n", "  x\n"),
    ],
)
async def test_what_templates_use(source: str, text: str) -> None:
    assert await render(source) == text


async def test_a_template_that_refuses_says_why() -> None:
    with pytest.raises(TemplateFailed, match=r"^Template error: Roles must alternate$"):
        await render("{{ raise_exception('Roles must alternate') }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'a': 1}) }}",
        "{{ 'a' * 10**9 }}",
        "{{ [0] * 2**40 }}",
        "{{ 9**(9**9) }}",
        "{{ '%999999999d' % 1 }}",
        "{{ 'a'.ljust(999999999) }}",
        "{{ 'a' | center(999999999) }}",
        "{{ {'a': 1} | tojson(indent=99999999) }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[5].content.text }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
async def test_what_is_not_allowed_or_makes_no_sense_is_refused(source: str) -> None:
    with pytest.raises(TemplateFailed):
        await render(source)


@pytest.mark.parametrize("body", ["", "x"])
async def test_an_endless_template_is_stopped(body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "MAX_SECONDS", 0.3)
    endless = f"{{% for i in range(99999) %}}{{% for j in range(99999) %}}{body}{{% endfor %}}{{% endfor %}}"
    template = ChatTemplate("{% if messages[0].content == 'Hello' %}" + endless + "{% else %}ok{% endif %}", {})
    started = time.perf_counter()
    with pytest.raises(TemplateFailed, match="more than"):
        await template.render(HELLO)
    # The thread is free again for the next request.
    assert await template.render([{"role": "user", "content": "Bye"}]) == "ok"
    assert time.perf_counter() - started < 60
    template.close()


def test_what_a_request_may_set_is_what_the_template_reads() -> None:
    template = ChatTemplate("{{ messages }}{{ eos_token }}{{ enable_thinking }}{{ strftime_now }}", {"eos_token": ""})
    assert template.options == {"enable_thinking"}
    assert not template.knows_tools
    template.close()


@pytest.mark.parametrize(
    ("files", "source"),
    [
        ({"tokenizer_config.json": {"chat_template": "a"}}, "a"),
        ({"tokenizer_config.json": {"chat_template": "a"}, "chat_template.jinja": "b"}, "b"),
        ({"tokenizer_config.json": {"chat_template": "a"}, "chat_template.json": {"chat_template": "c"}}, "c"),
        (
            {
                "tokenizer_config.json": {
                    "chat_template": [
                        {"name": "tool_use", "template": "t"},
                        {"name": "default", "template": "d"},
                    ]
                }
            },
            "d",
        ),
        ({"tokenizer_config.json": {"chat_template": None}}, None),
        ({}, None),
    ],
)
def test_where_templates_are_found(files: dict[str, Any], source: str | None, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    templates = load_template(tmp_path)
    assert (templates.default.source if templates else None) == source
    if templates:
        templates.close()


@pytest.mark.parametrize("as_files", [False, True])
def test_a_template_for_tools_is_used_with_tools(as_files: bool, tmp_path: Path) -> None:
    if as_files:
        (tmp_path / "chat_template.jinja").write_text("plain")
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    else:
        named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools }}"}]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    templates = load_template(tmp_path)
    assert templates is not None
    assert (templates.default.source, templates.tool_use.source) == ("plain", "{{ tools }}")


async def test_a_file_of_the_users_choice_goes_first(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "a", "eos_token": "</s>"}))
    chosen = tmp_path / "other.json"
    chosen.write_text(json.dumps({"chat_template": "{{ bos_token }}{{ eos_token }}", "bos_token": {"content": "<b>"}}))
    templates = load_template(tmp_path, str(chosen))
    assert templates is not None
    assert await templates.default.render(HELLO) == "<b></s>"
    bare = tmp_path / "bare.jinja"
    bare.write_text("bare")
    assert (templates := load_template(tmp_path, str(bare))) is not None
    assert templates.default.source == "bare"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("[]", "no JSON object"),
        ("{}", "has no `chat_template`"),
        ("no JSON", "no JSON object"),
    ],
)
def test_a_file_that_is_no_template_is_an_error_at_start(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_template(tmp_path, str(path))


def test_a_template_that_cannot_be_compiled_is_an_error_at_start() -> None:
    with pytest.raises(ConfigError, match="cannot be compiled"):
        ChatTemplate("{% for %}", {})
