"""Watches the event loop of a router from a thread: on ``PYTHONPATH``, Python runs this before the program.

Fifty times a second the thread asks the loop to call it back, and measures how much processor time the loop's thread
uses until it does: all callbacks in between, so no single one has taken more. Time that the thread waited for a
processor does not count. The largest is written to the file that ``LOOP_WATCH`` names, from when there is one on: the
start imports and compiles, and nobody is served yet. Once a second the number of tasks is written to that of
``LOOP_TASKS``.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from pathlib import Path

EVERY_S = 0.02


def watch(loop: asyncio.AbstractEventLoop, file: Path) -> None:
    clock = time.pthread_getcpuclockid(threading.main_thread().ident or 0)
    longest = 0.0
    tasks = Path(os.environ["LOOP_TASKS"]) if "LOOP_TASKS" in os.environ else None
    told_at = time.monotonic()
    while not loop.is_closed():
        time.sleep(EVERY_S)
        if tasks is not None and time.monotonic() - told_at > 1:
            told_at = time.monotonic()
            fresh = tasks.with_suffix(".new")
            fresh.write_text(str(len(asyncio.all_tasks(loop))))
            fresh.replace(tasks)  # who reads it finds a whole number
        called = threading.Event()
        used: list[float] = []
        before = time.clock_gettime(clock)

        def note(called: threading.Event = called, used: list[float] = used) -> None:
            used.append(time.clock_gettime(clock))
            called.set()

        try:
            loop.call_soon_threadsafe(note)
        except RuntimeError:  # it is closed
            return
        if not called.wait(60):
            continue
        if used[0] - before > longest and file.exists():
            longest = used[0] - before
            file.write_text(f"{longest:.6f}")


if "text_generation_router" in sys.orig_argv and "LOOP_WATCH" in os.environ:
    import uvloop

    new_event_loop = uvloop.new_event_loop

    def watched() -> uvloop.Loop:
        loop = new_event_loop()
        threading.Thread(target=watch, args=(loop, Path(os.environ["LOOP_WATCH"])), daemon=True).start()
        return loop

    uvloop.new_event_loop = watched
