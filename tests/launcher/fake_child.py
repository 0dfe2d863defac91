"""A child process without a model: does what its arguments say, in order. Run as a program.

``--`` and what follows, the real command line of a shard or router, is ignored.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

from text_generation_proto.lifeline import hold_lifeline
from text_generation_proto.logs import configure_logging, send_event


def on_sigterm(order: str, delay_s: float) -> None:
    """End on SIGTERM after ``delay_s``, and add this process's name to the file of endings."""
    name, _, file = order.partition("@")

    def handler(number: int, frame: FrameType | None) -> None:
        time.sleep(delay_s)
        with Path(file).open("a") as endings:
            endings.write(name + "\n")
        os._exit(0)

    signal.signal(signal.SIGTERM, handler)


def end(code: int) -> NoReturn:
    logging.shutdown()
    sys.stderr.flush()
    os._exit(code)


def last_words(go: Path) -> None:
    """On SIGTERM wait for ``go``, say something, and end."""

    def handler(number: int, frame: FrameType | None) -> None:
        log = logging.getLogger("fake.child")
        log.info("asked to end")
        while not go.exists():
            time.sleep(0.01)
        log.info("last words")
        end(0)

    signal.signal(signal.SIGTERM, handler)


def perform(action: str, argument: str) -> None:
    log = logging.getLogger("fake.child")
    match action:
        case "info":
            log.info(argument)
        case "error":
            log.error(argument)
        case "raw":
            sys.stderr.write(argument + "\n")
        case "out":
            sys.stdout.write(argument + "\n")
        case "flood":
            for _ in range(int(argument)):
                log.info("x" * 1000)
        case "progress":
            done, total = argument.split("/")
            send_event("progress", "loading", stage="load", done=int(done), total=int(total), unit="layers")
        case "resolved":
            sha, _, tag = argument.partition(" ")
            send_event("resolved", "resolved", folder="/nowhere", sha=sha, pipeline_tag=tag)
        case "ready":
            send_event("ready", "ready", seconds={argument or "load": 0.25})
        case "pid":
            Path(argument).write_text(str(os.getpid()))
        case "environment":
            variables = [f"{name}={value}" for name, value in os.environ.items()]
            Path(argument).write_text("\n".join([*sys.argv[1:], "", *variables]))
        case "grandchild":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            Path(argument).write_text(str(child.pid))
        case "ends":
            on_sigterm(argument, 0.0)
        case "ends-slowly":
            on_sigterm(argument, 0.3)
        case "last-words":
            last_words(Path(argument))
        case "never-ends":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        case "until":
            while not Path(argument).exists():
                time.sleep(0.01)
        case "first":
            if os.environ.get("TGI_INCARNATION", "1") != argument:
                time.sleep(600)
        case "hangs":
            if os.environ.get("TGI_INCARNATION", "1") == argument:
                time.sleep(600)
        case "lost":
            send_event("shards_lost", "shards are lost: a shard hangs", incarnation=int(argument))
        case "told":
            # Not a handler in Python, which a SIGTERM behind it would interrupt.
            faulthandler.register(signal.SIGUSR1, file=os.open(argument, os.O_WRONLY | os.O_CREAT))
        case "stacks":
            faulthandler.register(signal.SIGUSR1)
        case "sleep":
            until = time.monotonic() + float(argument)
            while (left_s := until - time.monotonic()) > 0:
                time.sleep(min(left_s, 0.05))  # a signal that comes just ahead of a sleep waits for its end
        case "exit":
            end(int(argument))
        case "die":
            os.kill(os.getpid(), int(argument))
        case _:
            raise ValueError(action)


if __name__ == "__main__":
    hold_lifeline()
    configure_logging(os.environ.get("LOG_LEVEL", "info"))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # no child dies of it
    for word in os.environ.get("FAKE_ACTIONS", "\n".join(sys.argv[1:])).split("\n"):
        if word == "--":
            break
        perform(*word.partition("=")[::2])
