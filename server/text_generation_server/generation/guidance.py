"""Grammars at work: which tokens may come next in an answer.

What clients send was tried out by the router in a process that it can kill: here a grammar is one that compiles, in a
time that is known.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
from text_generation_proto.grammars import Grammar, load_tokenizer, new_matcher

MAX_COMPILED = 256
"""Grammars that are kept compiled, the most recently used ones. Their size is bounded where they are tried out."""

NICENESS = 10
"""Of a thread that compiles: a tenth of a processor that is wanted for steps as well."""
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

Allowed = np.ndarray[tuple[int], np.dtype[np.bool_]]


class GuidanceFailed(Exception):
    """A grammar came to its limits while an answer was generated."""


class Guide:
    """How far one answer has come in its grammar."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self.num_tokens = 0
        """Of the answer, that it has seen."""

    def advance(self, token_ids: Sequence[int]) -> None:
        """Take the next tokens of the answer. Raises: GuidanceFailed."""
        if token_ids and not self._matcher.is_stopped():
            self._matcher.consume_tokens(list(token_ids))
            self._check()
        self.num_tokens += len(token_ids)

    def allowed(self) -> Allowed:
        """Which tokens may come next; bool [V], at least one is true. Raises: GuidanceFailed."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        allowed: Allowed = np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)
        return allowed

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GuidanceFailed(f"the grammar came to its limits: {self._matcher.get_error()}")


def _step_back() -> None:
    if sys.platform == "linux":  # where each thread has a priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


class Guidance:
    """The compiled grammars of a model. Every method may be called from any thread."""

    def __init__(self, tokenizer_path: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._path = tokenizer_path
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._tokenizer: Any = None
        self._compiled: OrderedDict[Grammar, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._loading = threading.Lock()
        self._background = ThreadPoolExecutor(1, thread_name_prefix="grammars", initializer=_step_back)
        self._steps = ThreadPoolExecutor(1, thread_name_prefix="guided steps")

    def prepare(self) -> None:
        """Begin to load the tokenizer, on a thread: while it is read, half a second, no other Python code runs."""
        self._background.submit(self._ready_tokenizer)

    def submit(
        self, work: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Future[Result]:
        """Work of a step, to be done while the model computes."""
        return self._steps.submit(work, *args, **kwargs)

    def compile_ahead(self, grammar: Grammar) -> Future[Any]:
        """The same as `compile` on a thread that steps back behind whoever computes."""
        with self._lock:
            if (matcher := self._compiled.get(grammar)) is not None:
                self._compiled.move_to_end(grammar)
                done: Future[Any] = Future()
                done.set_result(matcher)
                return done
        return self._background.submit(self.compile, grammar)

    def compile(self, grammar: Grammar) -> Any:
        """A matcher at its beginning, which is to be copied. Raises: GrammarError."""
        with self._lock:
            matcher = self._compiled.get(grammar)
            if matcher is not None:
                self._compiled.move_to_end(grammar)
                return matcher
        matcher = new_matcher(self._ready_tokenizer(), grammar)  # others go on meanwhile
        with self._lock:
            self._compiled[grammar] = matcher
            while len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        return matcher

    def guide(self, grammar: Grammar, token_ids: Sequence[int]) -> Guide:
        """The guide of an answer that has come as far as ``token_ids``. Raises: GrammarError, GuidanceFailed."""
        guide = Guide(self.compile(grammar).deep_copy(), self._vocab_size)
        guide.advance(token_ids)
        return guide

    def _ready_tokenizer(self) -> Any:
        with self._loading:
            if self._tokenizer is None:
                self._tokenizer = load_tokenizer(self._path, self._vocab_size, self._eos_token_ids)
            return self._tokenizer
