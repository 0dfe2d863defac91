"""What a process holds and uses, as the kernel tells it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

SETTLE_S = 60.0
POOL_SLACK = 2
"""Descriptors and threads of pools that grow to their size with the load: far fewer than one for each client."""
MEMORY_SLACK = 48 * 2**20
"""Of allocators, after a thousand requests: one that stays in memory for good shows as more."""


@dataclass(frozen=True, slots=True)
class Footprint:
    descriptors: int
    threads: int
    memory: int


def footprint(process: psutil.Process, *, at_most: Footprint | None = None) -> Footprint:
    """What it holds now; with ``at_most``, once it is back to that, which must be soon."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        now = Footprint(process.num_fds(), process.num_threads(), process.memory_info().rss)
        if at_most is None or (
            now.descriptors <= at_most.descriptors + POOL_SLACK
            and now.threads <= at_most.threads + POOL_SLACK
            and now.memory <= at_most.memory + MEMORY_SLACK
        ):
            return now
        assert time.monotonic() < deadline, f"{process.name()} held {at_most} before and holds {now} now"
        time.sleep(0.1)


def idle_cpu_s(processes: Mapping[str, psutil.Process], *, over_s: float) -> dict[str, float]:
    """Processor seconds that each process uses while nothing is asked of it."""
    before = {role: sum(process.cpu_times()[:2]) for role, process in processes.items()}
    time.sleep(over_s)
    return {role: round(sum(process.cpu_times()[:2]) - before[role], 3) for role, process in processes.items()}
