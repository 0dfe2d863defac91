"""Bringing small results from the device to the host without stopping the device."""

from __future__ import annotations

import time

import torch
from torch import Tensor


class Readback:
    """A copy under way: started in stream order, waited for only when the values are needed."""

    def __init__(self, *tensors: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = tensors
        if tensors and tensors[0].device.type == "cuda":
            self._host = tuple(_pinned_copy(tensor) for tensor in tensors)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def get(self) -> tuple[Tensor, ...]:
        if self._event is not None:
            self._event.synchronize()
        return self._host


class Stopwatch:
    """Nanoseconds from ``start`` to ``stop`` on the device's own clock; the host's where it computes in line."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._laps: list[tuple[int | torch.cuda.Event, int | torch.cuda.Event]] = []
        self._started: int | torch.cuda.Event = 0

    def start(self) -> None:
        self._started = self._now()

    def stop(self) -> None:
        self._laps.append((self._started, self._now()))

    def total_ns(self) -> int:
        """All laps; on CUDA only after the work in them has ended."""
        return sum(_between_ns(begin, end) for begin, end in self._laps)

    def since_ns(self, other: Stopwatch) -> int:
        """From the last lap of ``other`` to the first of this one; 0 where one has none."""
        if not self._laps or not other._laps:
            return 0
        return max(0, _between_ns(other._laps[-1][1], self._laps[0][0]))

    def _now(self) -> int | torch.cuda.Event:
        if not self._cuda:
            return time.monotonic_ns()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def _between_ns(begin: int | torch.cuda.Event, end: int | torch.cuda.Event) -> int:
    if isinstance(begin, int) or isinstance(end, int):
        assert isinstance(begin, int) and isinstance(end, int), "one clock for both"
        return end - begin
    return int(begin.elapsed_time(end) * 1e6)


def _pinned_copy(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
