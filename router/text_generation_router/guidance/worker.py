"""The process in which a grammar of a client is compiled for the first time: one that may hang, grow, or crash.

    python -m text_generation_router.guidance.worker TOKENIZER VOCAB_SIZE [EOS_TOKEN_ID ...]

A line of JSON on standard input is a grammar, ``{"kind": …, "source": …}``; the line that answers it is
``{"error": …}``, null if it is good. The first line of all says that the tokenizer is loaded.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

from text_generation_proto.grammars import Grammar, GrammarError, GrammarKind, load_tokenizer, new_matcher
from text_generation_proto.lifeline import die_with_parent

from text_generation_router.guidance.limits import MAX_CPU_S

MAX_MEMORY_BYTES = 2 * 2**30
"""Address space, beyond what the process has once the tokenizer is loaded."""
TRIED_TOKENS = 32
"""Steps through the grammar, at random: what is small to compile may be large to walk."""
MAX_REASON = 1000
"""Characters: the library quotes the grammar."""
MAX_MASK_S = 0.05
"""For one step. Every running stream waits for the mask of a guided one."""


def main(argv: list[str]) -> None:
    die_with_parent()
    tokenizer = load_tokenizer(Path(argv[0]), int(argv[1]), [int(each) for each in argv[2:]])
    _limit_memory()
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stderr.fileno())  # what a library prints while it crashes
    print(json.dumps({"ready": True}), flush=True)  # noqa: T201  # its answers are its output
    for line in sys.stdin:
        given = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, MAX_CPU_S)  # counts processor time, and its signal ends the process
        answer = verdict(tokenizer, given)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps({"error": answer}), flush=True)  # noqa: T201


def verdict(tokenizer: Any, given: dict[str, str]) -> str | None:
    """What is wrong with a grammar, or None."""
    try:
        matcher = new_matcher(tokenizer, Grammar(GrammarKind(given["kind"]), given["source"]))
        return _walk(matcher)
    except GrammarError as error:
        return str(error)[:MAX_REASON]
    except MemoryError:
        return "it needs too much memory"


def _walk(matcher: Any) -> str | None:
    choice = random.Random(0)
    for _ in range(TRIED_TOKENS):
        started = time.process_time()
        allowed = int.from_bytes(matcher.compute_bitmask(), "little")
        if time.process_time() - started > MAX_MASK_S:
            return "it is too complex: finding out what may come next takes too long"
        if matcher.is_error():
            return str(matcher.get_error())[:MAX_REASON]
        if not allowed:
            return "nothing obeys it"
        if matcher.is_stopped() or not matcher.consume_token(_any_bit(allowed, choice)):
            break
    return str(matcher.get_error())[:MAX_REASON] if matcher.is_error() else None


def _any_bit(bits: int, choice: random.Random) -> int:
    """The number of a set bit: the first behind a random place."""
    start = choice.randrange(bits.bit_length())
    rest = bits >> start
    return start + (rest & -rest).bit_length() - 1


def _limit_memory() -> None:
    with contextlib.suppress(OSError, ValueError):  # not everywhere
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MAX_MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main(sys.argv[1:])
