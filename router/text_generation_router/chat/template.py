"""The chat template of a model: messages -> the text of a prompt.

Templates are programs of whoever made the model. They run in jinja's immutable sandbox, on threads of their own, with a
limit on what they write and how long they take.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import datetime
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError as JinjaError
from jinja2 import meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from text_generation_router.config import ConfigError
from text_generation_router.errors import TemplateFailed

MAX_CHARACTERS = 16 * 2**20
"""Of a text that a template makes on the way to the prompt."""
ROOM_FOR_TEMPLATE = 64 * 2**10
"""Characters that a template may add to the longest body that is taken."""
MAX_SECONDS = 5.0

Message = Mapping[str, Any]
"""A message as templates know it: role, content, and what the Hugging Face convention adds for tools."""

_OURS = frozenset(("messages", "tools", "add_generation_prompt", "raise_exception", "strftime_now"))
"""Variables that a request cannot set."""


_END = "\ufdd2"
"""Behind an answer that is to be continued. No character, by Unicode's word, and free for such uses."""


class ChatTemplate:
    """Compiled once. ``variables`` are those that it reads."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        *,
        max_characters: int = MAX_CHARACTERS,
        num_workers: int = 1,
    ) -> None:
        """``max_characters`` of a prompt. Raises: ConfigError if it is no template."""
        environment = _Environment()
        try:
            self._template = environment.from_string(source)
            self.variables = frozenset(meta.find_undeclared_variables(environment.parse(source)))
        except JinjaError as error:
            raise ConfigError(f"the chat template cannot be compiled: {error}") from None
        self.source = source
        self._max_characters = max_characters
        self._special_tokens = dict(special_tokens)
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="template")

    @property
    def knows_tools(self) -> bool:
        """Whether it tells the model which tools there are."""
        return "tools" in self.variables

    @property
    def options(self) -> frozenset[str]:
        """What a request may set with ``chat_template_kwargs``."""
        return self.variables - _OURS - self._special_tokens.keys()

    async def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt, in which all special tokens are written out. An assistant's message at the end is one to go on
        with. Raises: TemplateFailed."""
        last = messages[-1] if messages else {}
        continues = last.get("role") == "assistant" and bool(last.get("content")) and not last.get("tool_calls")
        if continues:  # marked, since what stands behind it may hold the same text
            messages = [*messages[:-1], {**last, "content": f"{last['content']}{_END}"}]
        variables = {
            **self._special_tokens,
            **(options or {}),
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": not continues,
        }
        run = _Run(lambda: self._render(variables))
        future = asyncio.get_running_loop().run_in_executor(self._threads, run)
        try:
            async with asyncio.timeout(MAX_SECONDS):
                text = await asyncio.shield(future)
        except TimeoutError:
            run.interrupt()
            future.add_done_callback(lambda done: done.cancelled() or done.exception())
            raise TemplateFailed(f"rendering took more than {MAX_SECONDS:g} s") from None
        except asyncio.CancelledError:
            run.interrupt()
            future.add_done_callback(lambda done: done.cancelled() or done.exception())
            raise
        return _up_to_mark(text) if continues else text

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _render(self, variables: Mapping[str, Any]) -> str:
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(variables):
                size += len(piece)
                if size > self._max_characters:
                    raise TemplateFailed(f"the prompt would have more than {self._max_characters} characters")
                pieces.append(piece)
        except (TemplateFailed, _Interrupted):
            raise
        except RecursionError:
            raise TemplateFailed("it calls itself too often") from None
        except JinjaError as error:
            raise TemplateFailed(error.message or type(error).__name__) from None
        except Exception as error:  # a template can do with a message whatever Python can
            raise TemplateFailed(f"{type(error).__name__}: {error}") from None
        return "".join(pieces)


@dataclass(frozen=True, slots=True)
class ChatTemplates:
    """Those of one model."""

    default: ChatTemplate
    tool_use: ChatTemplate
    """For conversations with tools; most models have one for all."""

    def close(self) -> None:
        self.default.close()
        self.tool_use.close()


def load_template(
    folder: Path,
    tokenizer_config_path: str | None = None,
    *,
    max_characters: int = MAX_CHARACTERS,
    num_workers: int = 1,
) -> ChatTemplates | None:
    """The templates of the model in ``folder``, or of ``tokenizer_config_path``: a ``tokenizer_config.json``, another
    JSON file like it, or a bare template. None if there is none.

    Raises: ConfigError for one that cannot be read.
    """
    config = _json_file(folder / "tokenizer_config.json")
    special = {**_special_tokens(_json_file(folder / "special_tokens_map.json")), **_special_tokens(config)}
    if tokenizer_config_path is not None:
        path = Path(tokenizer_config_path)
        sources = _sources_of(path)
        if path.suffix != ".jinja":
            special |= _special_tokens(_json_file(path))
    else:
        sources = _sources_in(folder, config)

    def make(source: str) -> ChatTemplate:
        return ChatTemplate(source, special, max_characters=max_characters, num_workers=num_workers)

    # One alone serves all. Of several that have other names, the first.
    source = sources.get(_DEFAULT, next(iter(sources.values()), None))
    if source is None:
        return None
    default = make(source)
    return ChatTemplates(default, make(sources[_TOOL_USE]) if _TOOL_USE in sources else default)


_DEFAULT, _TOOL_USE = "default", "tool_use"
"""Names of templates that mean something."""


def _sources_of(path: Path) -> dict[str, str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"`tokenizer_config_path` {path} cannot be read: {error}") from None
    if path.suffix == ".jinja":
        return {_DEFAULT: text}
    try:
        sources = _by_name(json.loads(text).get("chat_template"))
    except (ValueError, AttributeError):
        raise ConfigError(f"`tokenizer_config_path` {path} is no JSON object") from None
    if not sources:
        raise ConfigError(f"`tokenizer_config_path` {path} has no `chat_template`")
    return sources


def _sources_in(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """As transformers looks for them: files of their own go before a field of another."""
    files = {_DEFAULT: folder / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    sources: dict[str, str] = {}
    for name, file in files.items():
        with contextlib.suppress(OSError, UnicodeDecodeError):
            sources[name] = file.read_text(encoding="utf-8")
    if _DEFAULT in sources:
        return sources
    return _by_name(_json_file(folder / "chat_template.json").get("chat_template")) or _by_name(
        config.get("chat_template")
    )


def _by_name(templates: object) -> dict[str, str]:
    """A field `chat_template` holds a template, or a list of named ones."""
    if isinstance(templates, str):
        return {_DEFAULT: templates}
    named = templates if isinstance(templates, list) else []
    return {
        str(each.get("name")): each["template"]
        for each in named
        if isinstance(each, dict) and isinstance(each.get("template"), str)
    }


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    tokens: dict[str, str] = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            tokens[name] = text
    return tokens


def _json_file(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _up_to_mark(text: str) -> str:
    kept, mark, _ = text.rpartition(_END)
    if not mark:
        raise TemplateFailed("it leaves out the assistant's message at the end, which was to be continued")
    return kept.rstrip()


# ---------------------------------------------------------------------------------------------------


class _Interrupted(BaseException):
    """Raised in a rendering thread that has taken too long. No template can catch it."""


class _Run:
    """A function that can be interrupted while it runs on another thread, as far as it runs Python code."""

    def __init__(self, function: Callable[[], str]) -> None:
        self._function = function
        self._lock = threading.Lock()
        self._thread: int | None = None
        self._too_late = False

    def __call__(self) -> str:
        try:
            with self._lock:
                if self._too_late:
                    raise _Interrupted
                self._thread = threading.get_ident()
            try:
                return self._function()
            finally:
                with self._lock:
                    self._thread = None
        except _Interrupted:
            raise TemplateFailed("rendering was stopped") from None

    def interrupt(self) -> None:
        with self._lock:
            self._too_late = True
            if self._thread is not None:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), ctypes.py_object(_Interrupted))


_PADDING = frozenset(("center", "expandtabs", "ljust", "rjust", "zfill"))
"""Methods of a text that make a long one of a number."""


class _Environment(ImmutableSandboxedEnvironment):
    """What the Hugging Face convention gives templates, within limits."""

    intercepted_binops = frozenset(("*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag])
        self.filters["tojson"] = _to_json
        for name in ("center", "indent"):
            self.filters[name] = _limited(self.filters[name])
        self.globals["raise_exception"] = _raise
        self.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        for one, other in ((left, right), (right, left)):
            if operator == "*" and isinstance(one, int) and hasattr(other, "__len__"):
                _check_size(one * len(other))
        if operator == "**" and isinstance(left, int | float) and isinstance(right, int | float):
            _check_size(abs(right) * max(int(left).bit_length(), 1) if isinstance(left, int) else abs(right))
        if operator == "%" and isinstance(left, str):
            _check_widths(left)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # as jinja calls it
        if getattr(__obj, "__name__", "") in _PADDING:
            _check_arguments(args, kwargs)
        return super().call(__context, __obj, *args, **kwargs)


class _GenerationTag(Extension):
    """``{% generation %}`` marks the assistant's text for training; here only its content counts."""

    tags = {"generation"}  # noqa: RUF012  # jinja declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without the escapes for HTML that jinja's own filter adds."""
    if indent is not None:
        _check_arguments((indent,), {})
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise JinjaError(message)


def _limited(function: Callable[..., Any]) -> Callable[..., Any]:
    def limited(*args: Any, **kwargs: Any) -> Any:
        _check_arguments(args[1:], kwargs)
        return function(*args, **kwargs)

    return limited


def _check_arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, int):
            _check_size(value * 16)


def _check_widths(form: str) -> None:
    digits = "".join(character if character.isdigit() else " " for character in form)
    for width in digits.split():
        _check_size(int(width[:12]))


def _check_size(size: float) -> None:
    if size > MAX_CHARACTERS:
        raise SecurityError(f"it would make a text of more than {MAX_CHARACTERS} characters")
