"""Grammars are tried out in a process that may die, and nobody else's work waits for it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from builders import byte_tokenizer
from text_generation_proto.grammars import Grammar, GrammarKind
from text_generation_router.errors import Overloaded, ValidationError
from text_generation_router.guidance import guidance as module
from text_generation_router.guidance.guidance import Guidance

NUMBER = Grammar(GrammarKind.JSON_SCHEMA, json.dumps({"type": "integer"}))


class Shard:
    def __init__(self) -> None:
        self.compiled: list[Grammar] = []

    async def compile(self, grammar: Grammar) -> None:
        self.compiled.append(grammar)


@pytest.fixture
def shard() -> Shard:
    return Shard()


@pytest_asyncio.fixture
async def guidance(tmp_path: Path, shard: Shard) -> AsyncIterator[Guidance]:
    path = tmp_path / "tokenizer.json"
    byte_tokenizer().save(str(path))
    made = Guidance(str(path), 320, [256], shard.compile)
    yield made
    await made.close()


def workers(guidance: Guidance) -> list[int]:
    return [worker._process.pid for worker in guidance._free]


async def test_a_good_grammar_is_compiled_on_the_shard_too(guidance: Guidance, shard: Shard) -> None:
    await guidance.admit(NUMBER)
    assert shard.compiled == [NUMBER]


def schema(value: object) -> Grammar:
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(value))


def regex(value: str) -> Grammar:
    return Grammar(GrammarKind.REGEX, value)


@pytest.mark.parametrize(
    "grammar",
    [
        schema({"type": "something"}),
        schema({"$ref": "http://example.com/x.json"}),
        schema({"$ref": "#/$defs/nothing"}),
        schema({"type": "string", "pattern": "("}),
        schema({"allOf": [{"type": "string"}, {"type": "integer"}]}),
        regex("("),
        regex("[z-a]"),
        Grammar(GrammarKind.LARK, "no lark"),
    ],
    ids=lambda grammar: grammar.source[:30],
)
async def test_one_that_cannot_be_obeyed_is_refused(grammar: Grammar, guidance: Guidance, shard: Shard) -> None:
    with pytest.raises(ValidationError, match="grammar is not valid: "):
        await guidance.admit(grammar)
    assert shard.compiled == []
    await guidance.admit(NUMBER)


HOSTILE = {
    "many options": regex("(a?){1000}a{1000}"),
    "many repetitions": regex("[a-z]{1,100000}"),
    "nested repetitions": regex("((a+)+)+b"),
    "many wildcards": regex(".*.*.*.*=x"),
    "large classes": regex(r"\p{L}{0,5000}"),
    "deep choices": schema(
        {"anyOf": [{"type": "object", "properties": {f"a{i}": {"anyOf": [{"type": "string"}] * 8}}} for i in range(64)]}
    ),
    "many values": schema({"enum": [f"value {i}" for i in range(3000)]}),
    "a long value": schema({"const": "x" * 60_000}),
    "many items": schema({"type": "array", "items": {"type": "integer"}, "minItems": 1_000_000_000}),
    "itself": schema({"$ref": "#"}),
    "itself again": schema({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}),
    "endless": schema({"properties": {"a": {"$ref": "#"}}, "required": ["a"], "type": "object"}),
}


@pytest.mark.parametrize("grammar", HOSTILE.values(), ids=HOSTILE)
async def test_a_hostile_grammar_ends_in_time_and_others_are_admitted_after_it(
    grammar: Grammar, guidance: Guidance
) -> None:
    try:
        await guidance.admit(grammar)
    except ValidationError as error:
        assert "grammar is not valid: " in str(error)
    await guidance.admit(NUMBER)


@pytest.mark.fault("F24", "a grammar worker that loops", "422 for its request, another takes its place")
async def test_a_worker_that_is_stuck_is_replaced(guidance: Guidance, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COMPILE_S", 0.5)
    await guidance.admit(NUMBER)
    (stuck,) = workers(guidance)
    os.kill(stuck, signal.SIGSTOP)
    with pytest.raises(Overloaded):  # nothing is known of the grammar
        await guidance.admit(regex("a"))
    await guidance.prepared()
    await guidance.admit(regex("a"))
    (new,) = workers(guidance)
    assert new != stuck


async def test_a_grammar_that_takes_too_much_of_a_processor_is_refused_for_good(
    guidance: Guidance, shard: Shard
) -> None:
    """The signal of the worker's own clock is what ends it then."""
    await guidance.admit(NUMBER)
    (stuck,) = workers(guidance)
    os.kill(stuck, signal.SIGSTOP)
    asyncio.get_running_loop().call_later(0.1, os.kill, stuck, signal.SIGPROF)
    asyncio.get_running_loop().call_later(0.2, os.kill, stuck, signal.SIGCONT)
    for _ in range(2):
        with pytest.raises(ValidationError, match="takes more than 2 s of a processor"):
            await guidance.admit(regex("a"))
    assert shard.compiled == [NUMBER]


@pytest.mark.fault("F24", "SIGKILL of the grammar worker", "another takes its place")
async def test_a_worker_that_died_is_replaced(guidance: Guidance) -> None:
    await guidance.admit(NUMBER)
    os.kill(workers(guidance)[0], signal.SIGKILL)
    async with asyncio.timeout(5):
        while guidance._free[0].is_alive:  # noqa: ASYNC110  # nobody is told
            await asyncio.sleep(0.01)
    await guidance.admit(regex("a"))


async def test_a_verdict_is_remembered(guidance: Guidance, shard: Shard) -> None:
    await guidance.admit(NUMBER)
    os.kill(workers(guidance)[0], signal.SIGKILL)
    await guidance.admit(NUMBER)
    assert shard.compiled == [NUMBER] * 2


async def test_many_at_once_are_tried_out_by_few(guidance: Guidance) -> None:
    await asyncio.gather(*(guidance.admit(regex(f"a{{{n}}}")) for n in range(1, 30)))
    assert len(workers(guidance)) <= module.NUM_WORKERS
