"""Grammars that answers have to obey, and how llguidance compiles them; the router tries them out, a shard obeys."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from text_generation_proto.v1 import generate_pb2 as pb


class GrammarKind(enum.Enum):
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK = "lark"
    """llguidance's own language, for what the router puts together itself."""


@dataclass(frozen=True, slots=True)
class Grammar:
    kind: GrammarKind
    source: str


def to_proto(grammar: Grammar) -> pb.Grammar:
    return pb.Grammar(kind=grammar.kind.name, source=grammar.source)


def from_proto(message: pb.Grammar) -> Grammar:
    return Grammar(GrammarKind[pb.Grammar.Kind.Name(message.kind)], message.source)


class GrammarError(Exception):
    """The grammar cannot be compiled; the text says why."""


def load_tokenizer(path: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> Any:
    """llguidance's view of a ``tokenizer.json``, or of the folder that holds one. Takes about a second.

    ``vocab_size`` is the width of the logits, and of the masks.
    """
    import llguidance

    file = path / "tokenizer.json" if path.is_dir() else path
    return llguidance.LLTokenizer(
        file.read_text(encoding="utf-8"), n_vocab=vocab_size, eos_token=list(eos_token_ids) or None
    )


def new_matcher(tokenizer: Any, grammar: Grammar) -> Any:
    """An ``LLMatcher`` at the beginning of the grammar. Raises: GrammarError."""
    import llguidance

    source = _llguidance_source(llguidance.LLMatcher, grammar)
    matcher = llguidance.LLMatcher(tokenizer, source, log_level=0)
    if matcher.is_error():
        raise GrammarError(matcher.get_error())
    return matcher


def _llguidance_source(matcher: Any, grammar: Grammar) -> str:
    if grammar.kind is GrammarKind.REGEX:
        return str(matcher.grammar_from_regex(grammar.source))
    if grammar.kind is GrammarKind.LARK:
        return str(matcher.grammar_from_lark(grammar.source))
    try:
        return str(matcher.grammar_from_json_schema(grammar.source, defaults=JSON_DEFAULTS))
    except ValueError as error:
        raise GrammarError(str(error)) from None


JSON_DEFAULTS = {"whitespace_flexible": True, "whitespace_pattern": r"[ ]?|\n[ ]{0,16}"}
"""White space between tokens as models write it, on one line or many, but no endless run of it."""
