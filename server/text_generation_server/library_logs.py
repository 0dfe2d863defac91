"""One log: libraries that print through handlers of their own are made to use ours."""

from __future__ import annotations

import importlib
import logging


def route_library_logs(*libraries: str) -> None:
    """Send the log of Hugging Face libraries through the root logger, as JSON lines like everything else."""
    for library in libraries:
        importlib.import_module(f"{library}.utils.logging").get_logger()  # which installs the handler
        logger = logging.getLogger(library)
        logger.handlers.clear()
        logger.propagate = True
