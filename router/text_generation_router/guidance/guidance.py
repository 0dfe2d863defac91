"""Grammars of requests, tried out before anybody has to obey them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import signal
import sys
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from text_generation_proto.grammars import Grammar, GrammarError

from text_generation_router.errors import NO_SHARD, GenerationFailed, Overloaded, ValidationError
from text_generation_router.guidance.limits import MAX_CPU_S

logger = logging.getLogger(__name__)

COMPILE_S = 5.0
"""For one grammar, in which it may take `worker.MAX_CPU_S` of a processor. Those of real schemas take milliseconds."""
START_S = 60.0
"""Until a worker has loaded the tokenizer: a second, if the machine is not busy."""
WAIT_S = 10.0
"""For a worker that is free."""
PREPARED_S = 5.0
"""Of a server's start, at most."""
NUM_WORKERS = 2
"""One that is at odds with a grammar, and one for everybody else."""
MAX_KNOWN = 4096
"""Grammars whose verdict is kept; a hash and a line each."""

Compile = Callable[[Grammar], Awaitable[None]]


class Guidance:
    """Says which grammars may be obeyed. One worker is started ahead, and another when one has died."""

    def __init__(
        self, tokenizer_path: str, vocab_size: int, eos_token_ids: Sequence[int], compile_on_shard: Compile
    ) -> None:
        self._arguments = (tokenizer_path, str(vocab_size), *map(str, eos_token_ids))
        self._compile_on_shard = compile_on_shard
        self._verdicts: OrderedDict[bytes, str | None] = OrderedDict()
        self._free: list[_Worker] = []
        self._places = asyncio.Semaphore(NUM_WORKERS)
        self._preparing: asyncio.Task[None] | None = None

    async def admit(self, grammar: Grammar) -> None:
        """Try the grammar out here, and have the shard compile it.

        Raises: ValidationError for one that cannot be obeyed, Overloaded while others are tried out.
        """
        key = hashlib.sha256(f"{grammar.kind.value}\0{grammar.source}".encode(errors="surrogatepass")).digest()
        if key in self._verdicts:
            self._verdicts.move_to_end(key)
            reason = self._verdicts[key]
        else:
            # Raises where there is none: another time there may be.
            reason = self._verdicts[key] = await self._try_out(grammar)
            while len(self._verdicts) > MAX_KNOWN:
                self._verdicts.popitem(last=False)
        if reason is not None:
            raise ValidationError(f"grammar is not valid: {reason}")
        try:
            await self._compile_on_shard(grammar)
        except GrammarError as error:
            raise ValidationError(f"grammar is not valid: {error}") from None
        except TimeoutError:
            raise Overloaded from None
        except Exception as error:
            raise GenerationFailed(NO_SHARD) from error

    def prepare(self) -> None:
        """Begin to start a worker, which takes a second of a processor: streams would feel it later."""
        if self._preparing is None or self._preparing.done():
            self._preparing = asyncio.create_task(self._prepare(), name="starting a grammar worker")

    async def prepared(self) -> None:
        """Wait for that worker, if one is starting, and not for long."""
        if self._preparing is not None:
            await asyncio.wait((self._preparing,), timeout=PREPARED_S)

    async def close(self) -> None:
        """End the workers."""
        if self._preparing is not None:
            self._preparing.cancel()
            await asyncio.wait((self._preparing,))
        for worker in self._free:
            await worker.kill()
        self._free.clear()

    async def _prepare(self) -> None:
        async with self._places:
            worker = await _Worker.start(self._arguments)
            if worker is not None:
                self._free.append(worker)

    async def _try_out(self, grammar: Grammar) -> str | None:
        try:
            async with asyncio.timeout(WAIT_S):
                await self._places.acquire()
        except TimeoutError:
            raise Overloaded from None
        worker: _Worker | None = None
        try:
            self._free = [worker for worker in self._free if worker.is_alive]
            worker = self._free.pop() if self._free else await self._start()
            reason = await worker.verdict(grammar)
            if worker.is_alive:
                self._free.append(worker)
            else:
                self.prepare()
            return reason
        except BaseException:
            if worker is not None:
                await worker.kill()
                self.prepare()
            raise
        finally:
            self._places.release()

    async def _start(self) -> _Worker:
        for _ in range(2):  # one may be killed by whoever makes room in memory
            worker = await _Worker.start(self._arguments)
            if worker is not None:
                return worker
        raise GenerationFailed("Server error: grammars cannot be compiled on this server")


NICENESS = 10
"""A tenth of a processor that others want as well: a start takes seconds then, a grammar of 30 ms a third of one."""


def _step_back(pid: int) -> None:
    """Let those who generate go first. A session is one group to Linux's scheduler, where there are such groups:
    between groups only theirs counts."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, NICENESS)
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(str(NICENESS))


class _Worker:
    """One process of `worker.py`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._ended = False

    @property
    def is_alive(self) -> bool:
        return not self._ended and self._process.returncode is None

    @classmethod
    async def start(cls, arguments: Sequence[str]) -> _Worker | None:
        """None: it could not be started; the log has what it said."""
        started = time.perf_counter()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "text_generation_router.guidance.worker", *arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,  # until it is ready
            start_new_session=True,  # signals of a terminal are the router's
        )
        _step_back(process.pid)
        worker = cls(process)
        try:
            answer = await worker._answer(START_S)
        except asyncio.CancelledError:
            await worker.kill()
            raise
        if answer is None:
            assert process.stderr is not None
            said = (await process.stderr.read()).decode(errors="replace").strip().rpartition("\n")[2]
            logger.error("The process that compiles grammars ended with code %s: %s", process.returncode, said)
            return None
        logger.info("Grammars are compiled in process %d, ready in %.1f s", process.pid, time.perf_counter() - started)
        return worker

    async def verdict(self, grammar: Grammar) -> str | None:
        """What is wrong with the grammar, or None. Raises: Overloaded, where it cannot be said now."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has died meanwhile: it answers nothing
            self._process.stdin.write(
                json.dumps({"kind": grammar.kind.value, "source": grammar.source}).encode() + b"\n"
            )
            await self._process.stdin.drain()
        answer = await self._answer(COMPILE_S)
        if answer is None:
            code = self._process.returncode
            if code == -signal.SIGPROF:
                return f"compiling it takes more than {MAX_CPU_S:g} s of a processor"
            if code == -signal.SIGKILL:  # ours, because the machine had no time, or the system's, for want of memory
                raise Overloaded
            return "it needs more memory than there is for it, or is more than the compiler can take"
        reason = answer["error"]
        return None if reason is None else str(reason)

    async def kill(self) -> None:
        self._ended = True
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        await self._process.wait()

    async def _answer(self, limit_s: float) -> dict[str, object] | None:
        """The next line; None, and the process is gone, if there is none in time."""
        assert self._process.stdout is not None
        line = b""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                line = await self._process.stdout.readline()
        if not line.endswith(b"\n"):
            if self._process.stdout.at_eof():  # it ends by itself: its exit code says why
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1):
                        await self._process.wait()
            await self.kill()
            return None
        answer: dict[str, object] = json.loads(line)
        return answer
