"""Start the processes, wait until they are ready, watch them, and stop them in order.

A launch downloads, starts, serves and stops. Each phase waits on futures of its children and on nothing else, so an
idle launcher takes no CPU time.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable

from text_generation_launcher.errors import (
    DownloadError,
    LauncherError,
    ShardCannotStart,
    ShardFailed,
    WebserverFailed,
)
from text_generation_launcher.logs import LogSink
from text_generation_launcher.plan import HubModel, Plan, ProcessSpec
from text_generation_launcher.process import Child, Seconds

WAITING_S = 10.0
"""How often a launch that takes long says that it is still waiting."""
SHORT_GRACE_S = 8.0
"""For a process that has no request to finish; a shard gives its running step 5 seconds."""
FAILURE_GRACE_S = 10.0
"""For a router whose shards are gone: enough to answer its clients with an error."""
LAST_WORD_S = 2.0
"""For the router after a second signal."""
SETTLE_S = 0.3
"""How much later than the router's end the end of a shard may be seen that caused it."""


def stop_signals() -> list[signal.Signals]:
    """Signals that ask for an end. One that is ignored already stays so: `nohup` means it."""
    asking = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    return [number for number in asking if signal.getsignal(number) is not signal.SIG_IGN]


class Supervisor:
    """Owns the children of one launch."""

    def __init__(
        self,
        plan: Plan,
        sink: LogSink,
        *,
        grace_s: float,
        settle_s: float = SETTLE_S,
        on_ready: Callable[[Seconds], None] = lambda _: None,
    ) -> None:
        self._plan = plan
        self._sink = sink
        self._grace_s = grace_s
        self._settle_s = settle_s
        self._on_ready = on_ready
        self._serving = False
        """Whether everything was ready once; there may be requests to finish then."""
        self._children: list[Child] = []
        self._shards: list[Child] = []
        self._router: Child | None = None
        self._num_signals = 0
        self._second_signal: int | None = None
        # The write end is ours alone and never written to: when we are gone, the children read end-of-file.
        self._lifeline, self._lifeline_held = os.pipe()

    async def run(self) -> int:
        """Serve until a signal asks to stop; returns the exit code: 0, or 128 + n when signal n came twice.

        Raises: LauncherError, when a process ended that should not have.
        """
        loop = asyncio.get_running_loop()
        life = asyncio.create_task(self._live())
        handled = stop_signals()
        for number in handled:
            loop.add_signal_handler(number, self._on_signal, number, life)
        try:
            await asyncio.wait([life])
            if life.cancelled():
                await self._stop()
                self._sink.info("Stopped")
                return 0 if self._second_signal is None else 128 + self._second_signal
            await self._stop_after_failure()
            await life
            return 0
        finally:
            for child in self._children:
                if child.alive:
                    await child.kill()
            for number in handled:
                loop.remove_signal_handler(number)
                # It is over: a signal may not cut short what the caller cleans up.
                signal.signal(number, signal.SIG_IGN)
            os.close(self._lifeline)
            os.close(self._lifeline_held)

    def _on_signal(self, number: int, life: asyncio.Task[None]) -> None:
        self._num_signals += 1
        if self._num_signals == 1:
            self._sink.info(f"Received {signal.Signals(number).name}, stopping{self._how_long()}")
            life.cancel()  # does nothing after a failure: then the end has begun already
            return
        self._sink.warning(f"Received {signal.Signals(number).name} again, stopping at once")
        self._second_signal = number
        for child in self._children:
            if child is not self._router:
                child.kill_group()
        if self._router is not None:
            # It drains already: asked again it ends its streams with an error instead of a broken connection.
            self._router.signal(signal.SIGTERM)
            asyncio.get_running_loop().call_later(LAST_WORD_S, self._router.kill_group)

    def _how_long(self) -> str:
        if not self._serving:
            return ""
        return f": running requests may end within {self._grace_s:g} s, the same signal again stops at once"

    # -- the phases ---------------------------------------------------------------------------------

    async def _live(self) -> None:
        started = time.monotonic()
        seconds: Seconds = {}
        if self._plan.download is not None:
            model = await self._download(self._plan.download)
            seconds["download"] = time.monotonic() - started
            self._plan = self._plan.pinned(model)
        seconds |= await self._start()
        self._serving = True
        self._on_ready(seconds | {"total": time.monotonic() - started})
        await self._serve()

    async def _download(self, spec: ProcessSpec) -> HubModel:
        self._sink.info("Starting check and download process", spec.span)
        child = await self._spawn(spec)
        if await child.exited != 0:
            child.log_end()
            raise DownloadError(f"Download encountered an error: {child.reason}")
        self._sink.info("Successfully downloaded weights", spec.span)
        return child.resolved

    async def _start(self) -> Seconds:
        """Start the shards and the router at once, and wait until all are ready."""
        started = time.monotonic()
        for spec in self._plan.shards:
            self._sink.info("Starting shard", spec.span)
            self._shards.append(await self._spawn(spec))
        self._sink.info("Starting Webserver")
        self._router = await self._spawn(self._plan.router)
        waiting = set(self._children_of_the_group())
        while waiting:
            futures = [child.ready for child in waiting] + [child.exited for child in self._children_of_the_group()]
            await asyncio.wait(futures, timeout=WAITING_S, return_when=asyncio.FIRST_COMPLETED)
            if any(child.exited.done() for child in self._children_of_the_group()):
                raise await self._failure_while_starting()
            became_ready = {child for child in waiting if child.ready.done()}
            for child in became_ready & set(self._shards):
                self._sink.info(f"Shard ready in {time.monotonic() - started:.2f}s", child.spec.span)
            waiting -= became_ready
            if not became_ready:
                for child in waiting & set(self._shards) or waiting:
                    self._sink.info(f"Waiting for {child.name} to be ready...", child.spec.span)
        return self._steps()

    def _steps(self) -> Seconds:
        """Duration of each step of the start: of several ranks the slowest, and then the router's."""
        assert self._router is not None
        seconds: Seconds = {}
        for shard in self._shards:
            for step, spent in shard.ready.result().items():
                seconds[step] = max(spent, seconds.get(step, 0.0))
        router = self._router.ready.result()
        if "connect" in router:
            # It has waited for the shards meanwhile, which is their time.
            waited = max(shard.ready_time for shard in self._shards) - self._router.start_time
            router["connect"] = max(0.0, router["connect"] - waited)
        return seconds | router

    async def _serve(self) -> None:
        """Wait for the first end, which nobody asked for."""
        await asyncio.wait(self._exits(), return_when=asyncio.FIRST_COMPLETED)
        child = await self._first_dead()
        child.log_end()
        if child is self._router:
            raise WebserverFailed(f"Webserver Crashed: {child.reason}")
        raise ShardFailed(f"Shard {child.spec.rank} crashed: {child.reason}")

    async def _failure_while_starting(self) -> LauncherError:
        child = await self._first_dead()
        child.log_end()
        if child is self._router:
            return WebserverFailed(f"Webserver failed to start: {child.reason}")
        return ShardCannotStart(f"Shard {child.spec.rank} failed to start: {child.reason}")

    async def _first_dead(self) -> Child:
        """The child whose end explains the others': a shard before the router, and of several the first."""
        if all(child.alive for child in self._shards):
            # A router that ends because it lost a shard may be seen to end first.
            await asyncio.wait([child.exited for child in self._shards], timeout=self._settle_s)
        dead = [child for child in self._children_of_the_group() if not child.alive]
        first = min(dead, key=lambda child: (child is self._router, child.exit_time))
        await first.exited
        return first

    # -- the end ------------------------------------------------------------------------------------

    async def _stop(self) -> None:
        """On request: the router first, which finishes its requests, then the shards."""
        if self._router is not None:
            # The router ends by itself when its grace is over; it gets a little more to say so to its clients.
            await self._router.terminate(self._grace_s + SHORT_GRACE_S if self._serving else SHORT_GRACE_S)
        await self._stop_shards()
        others = [child for child in self._children if child.alive]
        await asyncio.gather(*(child.terminate(FAILURE_GRACE_S) for child in others))

    async def _stop_after_failure(self) -> None:
        """The rest of a rank group hangs in a collective: it is killed at once. The router may tell its clients."""
        if any(child.exited.done() for child in self._shards):
            for child in self._shards:
                if child.alive:
                    await child.kill()
        if self._router is not None:
            await self._router.terminate(min(self._grace_s, FAILURE_GRACE_S) if self._serving else SHORT_GRACE_S)
        await self._stop_shards()

    async def _stop_shards(self) -> None:
        if any(child.alive for child in self._shards):
            self._sink.info("Shutting down shards")
        await asyncio.gather(*(child.terminate(SHORT_GRACE_S) for child in self._shards))

    # -- children -----------------------------------------------------------------------------------

    async def _spawn(self, spec: ProcessSpec) -> Child:
        try:
            child = await Child.start(spec, self._sink, self._lifeline)
        except OSError as error:
            raise LauncherError(f"Cannot start {spec.role.value}: {error.strerror or error}") from error
        self._children.append(child)
        return child

    def _children_of_the_group(self) -> list[Child]:
        return [*self._shards, *([self._router] if self._router is not None else [])]

    def _exits(self) -> list[asyncio.Future[int]]:
        return [child.exited for child in self._children_of_the_group()]
