"""Guided rows: whatever the logits say, the answer obeys, and what is not allowed has no probability."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from builders import byte_tokenizer
from text_generation_proto.grammars import Grammar, GrammarError, GrammarKind
from text_generation_server.generation.guidance import Guidance
from text_generation_server.generation.parameters import SamplingParameters
from text_generation_server.generation.sampler import SamplingRow, sample

VOCAB = 320
EOS = 256


@pytest.fixture(scope="module")
def guidance(tmp_path_factory: pytest.TempPathFactory) -> Guidance:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    byte_tokenizer().save(str(path))
    return Guidance(path, VOCAB, [EOS])


def answer(guidance: Guidance, grammar: Grammar, seed: int, most: int = 400) -> tuple[str, bool]:
    """A text by random logits under a grammar, and whether it came to its end."""
    guide = guidance.guide(grammar, [])
    tokenizer = byte_tokenizer()
    ids: list[int] = []
    generator = torch.Generator().manual_seed(seed)
    for index in range(most):
        logits = torch.randn(1, VOCAB, generator=generator) * 2
        # Answers have to come to an end: closing characters, and the end itself, are likely.
        for character in '"]}':
            logits[0, tokenizer.token_to_id(character)] += 3
        logits[0, EOS] += 6
        row = SamplingRow(SamplingParameters(do_sample=True, seed=seed), index, allowed=guide.allowed())
        token = int(sample(logits, [row]).ids_S)
        assert token >= 0
        assert guide.allowed()[token]
        if token == EOS:
            return tokenizer.decode(ids), True
        ids.append(token)
        guide.advance([token])
    return tokenizer.decode(ids), False


SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "boolean"}}, "required": ["a"],
     "additionalProperties": False},
    {"type": "array", "items": {"enum": ["x", "y", 3, None]}, "minItems": 1, "maxItems": 4},
    {"type": "string", "pattern": "^[a-c]{2,5}-[0-9]+$", "maxLength": 20},
    {"$defs": {"n": {"type": "object", "properties": {"v": {"type": "number"}, "next": {"anyOf": [{"$ref": "#/$defs/n"},
     {"type": "null"}]}}, "required": ["v", "next"], "additionalProperties": False}}, "$ref": "#/$defs/n"},
    {"const": {"k": [1, 2]}},
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(SCHEMAS)))
def test_finished_answers_obey_the_schema(guidance: Guidance, index: int) -> None:
    schema = SCHEMAS[index]
    grammar = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema))
    finished = 0
    for seed in range(8):
        text, ended = answer(guidance, grammar, seed)
        if ended:
            finished += 1
            jsonschema.validate(json.loads(text), schema)
    assert finished >= 4


@pytest.mark.parametrize("pattern", ["[ab]{3}", "(yes|no)", r"\d{4}-\d{2}-\d{2}", "x+y*z?", "[äöü]+!"])
def test_finished_answers_match_the_regex(guidance: Guidance, pattern: str) -> None:
    for seed in range(4):
        text, ended = answer(guidance, Grammar(GrammarKind.REGEX, pattern), seed)
        assert not ended or re.fullmatch(pattern, text)


def test_a_guide_that_begins_later_goes_on_where_the_answer_was(guidance: Guidance) -> None:
    grammar = Grammar(GrammarKind.REGEX, "abc[de]f")
    ids = byte_tokenizer().encode("abcd").ids
    whole, late = guidance.guide(grammar, []), guidance.guide(grammar, ids)
    whole.advance(ids)
    assert (whole.allowed() == late.allowed()).all()
    assert late.allowed().nonzero()[0].tolist() == byte_tokenizer().encode("f").ids


def test_behind_the_end_there_is_only_the_end(guidance: Guidance) -> None:
    guide = guidance.guide(Grammar(GrammarKind.REGEX, "a"), byte_tokenizer().encode("a").ids)
    assert guide.allowed().nonzero()[0].tolist() == [EOS]
    guide.advance([EOS])
    assert guide.allowed().nonzero()[0].tolist() == [EOS], "where the end is ignored, nothing else comes"


def test_guided_and_free_rows_share_a_step(guidance: Guidance) -> None:
    chooser = random.Random(0)
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(1))
    guide = guidance.guide(Grammar(GrammarKind.REGEX, "[0-9]+"), [])
    parameters = [SamplingParameters(do_sample=chooser.random() < 0.5, seed=i) for i in range(6)]
    rows = [
        SamplingRow(each, 0, 2, allowed=guide.allowed() if index % 2 else None) for index, each in enumerate(parameters)
    ]
    together = sample(logits.clone(), rows)
    digits = set(byte_tokenizer().encode("0123456789").ids)
    for index, row in enumerate(rows):
        alone = sample(logits[index : index + 1].clone(), [row])
        assert int(alone.ids_S) == int(together.ids_S[index])
        if index % 2:
            assert int(alone.ids_S) in digits
            allowed = torch.tensor(row.allowed)
            expected = torch.log_softmax(logits[index].masked_fill(~allowed, -torch.inf), -1)[int(alone.ids_S)]
            assert alone.logprobs_S.item() == pytest.approx(expected.item(), abs=1e-5)


def test_what_cannot_be_compiled_says_why(guidance: Guidance) -> None:
    for grammar in (Grammar(GrammarKind.REGEX, "("), Grammar(GrammarKind.JSON_SCHEMA, '{"type": "x"}')):
        with pytest.raises(GrammarError, match=r"\w+"):
            guidance.compile(grammar)


def test_grammars_are_compiled_once(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    byte_tokenizer().save(str(path))
    guidance = Guidance(path, VOCAB, [EOS])
    grammar = Grammar(GrammarKind.REGEX, "a+")
    assert guidance.compile(grammar) is guidance.compile(Grammar(GrammarKind.REGEX, "a+"))
