"""A time of day that jumps: on ``PYTHONPATH``, Python runs this before the program.

The clock is off by the seconds that the file named by ``CLOCK_OFFSET`` holds, for all that asks Python's ``time``. C
code goes on with the real one: libfaketime (0.9.10), which would change that as well, hangs threads that wait with a
limit.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

NS_PER_S = 1_000_000_000

if "CLOCK_OFFSET" in os.environ:
    file = Path(os.environ["CLOCK_OFFSET"])
    real_ns = time.time_ns

    def time_ns() -> int:
        return real_ns() + int(file.read_text()) * NS_PER_S

    time.time_ns = time_ns
    time.time = lambda: time_ns() / NS_PER_S
