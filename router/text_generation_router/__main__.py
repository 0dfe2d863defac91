"""Entry point of `text-generation-router`."""

from __future__ import annotations

import asyncio
import logging
import os
import sys

import uvloop
from text_generation_proto.lifeline import hold_lifeline
from text_generation_proto.logs import configure_logging

from text_generation_router import cli
from text_generation_router.backend import StartError
from text_generation_router.config import RouterFlags
from text_generation_router.listening import BindError
from text_generation_router.serving import serve

logger = logging.getLogger("text_generation_router")


def main() -> None:
    hold_lifeline()
    flags = cli.parse(sys.argv[1:])
    configure_logging(os.environ.get("LOG_LEVEL") or "info")
    # A prompt is one text: the library's own thread pool has nothing to share out, and would spin beside ours.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(run(flags))


def run(flags: RouterFlags) -> int:
    """Serve until the end; the exit code. A failed start is one line of log and code 1."""
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(serve(flags))
    except (StartError, BindError) as error:
        logger.error("%s", error)
        return 1


if __name__ == "__main__":
    main()
