"""The start of one shard: what can go wrong is looked for in the order of what it costs.

Finding the model and checking its files needs no torch, so a wrong id or a broken file is told at once.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from typing import NoReturn

from text_generation_proto.logs import send_event

from text_generation_server.config import ShardConfig
from text_generation_server.weights.checks import check_folder
from text_generation_server.weights.hub import find_model

ALIVE_EVERY_S = 2.0


def serve(config: ShardConfig, env: Mapping[str, str]) -> NoReturn:
    """Serve until SIGTERM, then end the process. Raises: ConfigError if it cannot start."""
    _handle_signals(config)
    loaded = threading.Event()
    if config.launcher_nonce:
        threading.Thread(target=_say_alive, args=(loaded,), name="alive", daemon=True).start()
    seconds: dict[str, float] = {}
    try:
        # Loading is cut off in the middle by a signal: what it made for itself lies in here, and goes with it.
        with tempfile.TemporaryDirectory(prefix="text-generation-shard-", ignore_cleanup_errors=True) as folder:
            tempfile.tempdir = folder
            with timed(seconds, "find"):
                source = find_model(config.model_id, config.revision, env, trust_remote_code=config.trust_remote_code)
                check_folder(source.folder)
            with timed(seconds, "import"):
                gc.disable()  # modules stay: looking through a million of their objects was a tenth of the start
                from text_generation_server.shard import run_shard
            code = run_shard(config, source, env, seconds, loaded.set)
    except SystemExit:  # of a signal
        code = 0
    end_process(code)


def _say_alive(loaded: threading.Event) -> None:
    """Tell a launcher, as long as nobody else can ask, that this process runs."""
    while not loaded.wait(ALIVE_EVERY_S):
        send_event("alive", "loading")


def end_process(code: int) -> NoReturn:
    """Exit at once: the interpreter would wait for the thread that computes, and for a second to take torch apart."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _handle_signals(config: ShardConfig) -> None:
    """End with code 0 on SIGTERM from the first moment on, also while loading."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(0)

    if hasattr(signal, "SIGUSR1"):
        # Of a process that hangs somebody wants to know where. It works while other code holds the interpreter's lock.
        faulthandler.register(signal.SIGUSR1, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in stop_signals(config):
        signal.signal(number, end)


def stop_signals(config: ShardConfig) -> tuple[signal.Signals, ...]:
    # Ctrl-C reaches the whole foreground group: a launcher decides what it means to its children.
    return (signal.SIGTERM,) if config.launcher_nonce else (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[step] = seconds.get(step, 0.0) + time.monotonic() - started
