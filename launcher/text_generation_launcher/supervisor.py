"""Start the processes, wait until they are ready, watch them, and stop them in order.

A launch downloads, starts, serves and stops. Each phase waits on futures of its children and on nothing else, so an
idle launcher takes no CPU time.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from text_generation_proto.logs import UNKNOWN

from text_generation_launcher.errors import (
    DownloadError,
    LauncherError,
    ShardCannotStart,
    ShardFailed,
    WebserverFailed,
)
from text_generation_launcher.logs import LogSink
from text_generation_launcher.plan import HubModel, Plan, ProcessSpec
from text_generation_launcher.process import Child, Loss, Seconds

WAITING_S = 10.0
"""How often a launch that takes long says that it is still waiting."""
SHORT_GRACE_S = 8.0
"""For a process that has no request to finish; a shard gives its running step 5 seconds."""
FAILURE_GRACE_S = 10.0
"""For a router whose shards are gone: enough to answer its clients with an error."""
LAST_WORD_S = 2.0
"""For the router after a second signal."""
RESTART_WINDOW_S = 600.0
"""So many restarts of the shards are allowed within it, and no more."""
LOADING_SILENCE_S = 30.0
"""A shard that loads says every few seconds that it lives; one that was started again and says nothing so long hangs.
The first start has no such limit: libraries may come over a slow network, and who waits for it sees that it waits."""
STACKS_S = 0.5
"""For shards that hang to write down where, before they are killed."""
SETTLE_S = 0.3
"""How much later than the router's end the end of a shard may be seen that caused it."""


def stop_signals() -> list[signal.Signals]:
    """Signals that ask for an end. One that is ignored already stays so: `nohup` means it."""
    asking = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    return [number for number in asking if signal.getsignal(number) is not signal.SIG_IGN]


class _Drained(Exception):
    """The router has ended as it was asked to."""


class Supervisor:
    """Owns the children of one launch."""

    def __init__(
        self,
        plan: Plan,
        sink: LogSink,
        *,
        grace_s: float,
        max_shard_restarts: int = 0,
        stall_timeout_s: float = 60.0,
        loading_silence_s: float = LOADING_SILENCE_S,
        new_master_port: Callable[[], int] | None = None,
        settle_s: float = SETTLE_S,
        on_ready: Callable[[Seconds], None] = lambda _: None,
    ) -> None:
        self._plan = plan
        self._sink = sink
        self._grace_s = grace_s
        self._max_shard_restarts = max_shard_restarts
        self._stall_timeout_s = stall_timeout_s
        self._loading_silence_s = loading_silence_s
        self._new_master_port = new_master_port
        """Where the ranks meet; None: where they did before, or nowhere."""
        self._restarts: deque[float] = deque()
        """Times of those within the window."""
        self._incarnation = 1
        self._settle_s = settle_s
        self._on_ready = on_ready
        self._serving = False
        """Whether everything was ready once; there may be requests to finish then."""
        self._children: list[Child] = []
        self._shards: list[Child] = []
        self._router: Child | None = None
        self._draining: asyncio.Task[None] | None = None
        """Until the router has finished its requests and ended."""
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
            if life.cancelled() or life.exception() is None:
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
            if not self._serving:
                life.cancel()
            elif not life.done():  # after a failure the end has begun already
                self._draining = asyncio.create_task(self._drain())
            return
        self._sink.warning(f"Received {signal.Signals(number).name} again, stopping at once")
        self._second_signal = number
        life.cancel()
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
        await self._start_shards()
        self._sink.info("Starting Webserver")
        self._router = await self._spawn(self._plan.router)
        await self._until_ready(set(self._children_of_the_group()))
        return self._steps()

    async def _start_shards(self) -> None:
        self._shards = []
        for spec in self._plan.shards:
            self._sink.info("Starting shard", spec.span)
            self._shards.append(await self._spawn(spec))

    async def _until_ready(self, waiting: set[Child]) -> None:
        """Raises: LauncherError, when one of the group ends that was not asked to; _Drained."""
        started = time.monotonic()
        while waiting:
            futures = [child.ready for child in waiting] + [child.exited for child in self._children_of_the_group()]
            await asyncio.wait(
                futures, timeout=min(WAITING_S, self._loading_silence_s), return_when=asyncio.FIRST_COMPLETED
            )
            self._raise_if_drained()
            if any(child.exited.done() for child in self._children_of_the_group()):
                raise await self._failure_while_starting()
            became_ready = {child for child in waiting if child.ready.done()}
            for child in became_ready & set(self._shards):
                self._sink.info(f"Shard ready in {time.monotonic() - started:.2f}s", child.spec.span)
            waiting -= became_ready
            if self._serving:
                await self._find_hanging(waiting)
            if not became_ready:
                for child in waiting & set(self._shards) or waiting:
                    self._sink.info(f"Waiting for {child.name} to be ready...", child.spec.span)

    async def _find_hanging(self, loading: set[Child]) -> None:
        """Raises: ShardCannotStart."""
        for child in loading:
            silence_s = time.monotonic() - child.heard_time
            if silence_s > self._loading_silence_s:
                await self._dump_stacks()
                raise ShardCannotStart(
                    f"Shard {child.spec.rank} hangs: it loads, and said nothing for {silence_s:.0f} s"
                )

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
        """Wait for ends that nobody asked for; start shards anew as often as that is allowed. Returns once the router
        has drained: its last requests may need them as much as any other."""
        with contextlib.suppress(_Drained):
            while True:
                reason = await self._loss()
                while reason:
                    reason = await self._restart(reason)

    async def _loss(self) -> str:
        """Why the shards do not go on, once they do not. Raises: WebserverFailed, _Drained."""
        assert self._router is not None
        while True:
            said = asyncio.create_task(self._router.losses.get())
            ends: list[asyncio.Future[Any]] = [*self._exits(), said]
            try:
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            finally:
                said.cancel()
            loss = said.result() if said.done() else None
            if loss is not None and not self._concerns_running(loss):
                loss = None  # they have been started again since
            if loss is not None:
                # A rank that ends breaks its connection first.
                await asyncio.wait(self._exits(), timeout=self._settle_s, return_when=asyncio.FIRST_COMPLETED)
            if any(exited.done() for exited in self._exits()):
                self._raise_if_drained()
                child = await self._first_dead()
                if self._draining is not None and (child is self._router or child.exited.result() == 0):
                    # What asks all processes at once to end, as systemd does, has asked the shards too.
                    self._tell_of_lost_shards()
                    raise _Drained
                child.log_end()
                if child is self._router:
                    raise WebserverFailed(f"Webserver Crashed: {child.reason}")
                return f"Shard {child.spec.rank} crashed: {child.reason}"
            if loss is not None:
                await self._dump_stacks()
                return loss.reason[:1].upper() + loss.reason[1:]

    def _concerns_running(self, loss: Loss) -> bool:
        """Whether the shards that run now are meant. Of those that the router has not heard of it knows only that they
        do not answer, which is no wonder as long as they load."""
        if loss.incarnation != UNKNOWN:
            return loss.incarnation == self._incarnation
        return loss.at - max(shard.ready_time for shard in self._shards) > self._stall_timeout_s

    async def _dump_stacks(self) -> None:
        """Have the shards write into the log where they are."""
        for shard in self._shards:
            shard.signal(signal.SIGUSR1)
        await asyncio.sleep(STACKS_S)

    async def _restart(self, reason: str) -> str:
        """Start the whole rank group anew: the peers of a lost rank wait for it for ever. Returns why it did not start,
        empty if it did. Raises: ShardFailed where it may not be tried again, WebserverFailed, _Drained."""
        self._raise_if_drained()
        now = time.monotonic()
        while self._restarts and now - self._restarts[0] > RESTART_WINDOW_S:
            self._restarts.popleft()
        if len(self._restarts) >= self._max_shard_restarts:
            again = f" ({len(self._restarts)} restarts in the last 10 minutes)" if self._restarts else ""
            raise ShardFailed(reason + again)
        self._restarts.append(now)
        self._sink.error(f"{reason}. Restarting the shards, {len(self._restarts)} of {self._max_shard_restarts} times")
        await self._kill_shards()
        self._children = [child for child in self._children if child not in self._shards]
        self._incarnation += 1
        port = None if self._new_master_port is None else self._new_master_port()
        self._plan = self._plan.restarted(self._incarnation, port)
        await self._start_shards()
        try:
            await self._until_ready(set(self._shards))
        except ShardCannotStart as error:
            return str(error)
        self._sink.info(f"The shards are back after {time.monotonic() - now:.2f}s")
        return ""

    async def _failure_while_starting(self) -> LauncherError:
        child = await self._first_dead()
        child.log_end()
        if child is self._router:
            when = "Crashed" if self._serving else "failed to start"
            return WebserverFailed(f"Webserver {when}: {child.reason}")
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

    async def _drain(self) -> None:
        """Have the router finish its requests and end."""
        assert self._router is not None
        # It ends by itself when its grace is over; it gets a little more to say so to its clients.
        await self._router.terminate(self._grace_s + SHORT_GRACE_S)

    def _raise_if_drained(self) -> None:
        if self._draining is not None and self._router is not None and self._router.exited.done():
            raise _Drained

    async def _stop(self) -> None:
        """On request: the router first, which finishes its requests, then the shards."""
        if self._draining is not None:
            await self._draining
        elif self._router is not None:
            await self._router.terminate(SHORT_GRACE_S)
        await self._stop_shards()
        others = [child for child in self._children if child.alive]
        await asyncio.gather(*(child.terminate(FAILURE_GRACE_S) for child in others))

    async def _stop_after_failure(self) -> None:
        """The rest of a rank group hangs in a collective: it is killed at once. The router may tell its clients."""
        router_lives = self._router is not None and self._router.alive
        if router_lives or any(child.exited.done() for child in self._shards):
            await self._kill_shards()
        if self._router is not None:
            grace_s = min(self._grace_s, FAILURE_GRACE_S) if self._serving else SHORT_GRACE_S
            self._tell_of_lost_shards()
            if self._draining is None:
                await self._router.terminate(grace_s)
            else:  # a second SIGTERM would cut short what it has to say
                await asyncio.wait([self._draining], timeout=grace_s)
                await self._router.kill()
        await self._stop_shards()

    def _tell_of_lost_shards(self) -> None:
        """Requests that wait for shards to be restarted wait in vain."""
        if self._serving and self._router is not None:
            self._router.signal(signal.SIGUSR1)

    async def _kill_shards(self) -> None:
        await asyncio.gather(*(child.kill() for child in self._shards if child.alive))

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
