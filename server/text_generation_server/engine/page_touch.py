"""Has the operating system bring pages of a cache before they are needed: the first at the start, more in idle time.

Memory that was never written has no pages yet. A step that writes there waits for them, and in a virtual machine whose
host has to find memory first that takes long. Measured in one, 135M parameters: a step of 500 prompt tokens took 116 ms
in new blocks and 90 ms in used ones.
"""

from __future__ import annotations

import ctypes
import os
import platform
import threading
import time
from collections.abc import Sequence

from torch import Tensor

AHEAD_BYTES = 2**30
"""Of the cache, behind the last slot that was used."""
LEAST_BYTES = 2**30
"""A smaller cache is left alone: it is soon used."""
PIECE_BYTES = 2**21
"""A huge page: asked for at once."""
IDLE_S = 0.2
"""Since the last step, before anything is touched: the system lets nobody else compute while it brings a page."""

_POPULATE_WRITE = 23  # of Linux 5.14
_LOWEST_PRIORITY = 19


class PageTouch:
    """A thread that stays ahead of the slots in use. It has the lowest priority, and changes no content."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """``tensors`` [heads, slots, width], contiguous. They are held until `stop`."""
        self._tensors = tensors
        self._num_slots = min(tensor.shape[1] for tensor in tensors)
        num_bytes = sum(tensor.nbytes for tensor in tensors)
        self._ahead = AHEAD_BYTES * self._num_slots // num_bytes
        self._wanted = self._ahead
        self._used_at = 0.0
        self._wake = threading.Event()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="touching pages", daemon=True)
        if platform.system() == "Linux" and num_bytes >= LEAST_BYTES:
            self._thread.start()

    def follow(self, slot: int) -> None:
        """Tell which slot a step uses; the highest one counts."""
        self._used_at = time.monotonic()
        if slot + self._ahead > self._wanted:
            self._wanted = slot + self._ahead
            self._wake.set()

    def stop(self) -> None:
        """Return once the memory is not touched any more."""
        self._stopped = True
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._tensors = ()

    def _run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        heads = [(head.data_ptr(), head.nbytes // head.shape[0]) for tensor in self._tensors for head in tensor]
        piece = max(1, PIECE_BYTES // max(slot_bytes for _, slot_bytes in heads))
        first = 0
        while first < self._num_slots:
            if first >= self._wanted:
                self._wake.wait()
                self._wake.clear()
            while (
                first >= self._ahead and not self._stopped and (left := self._used_at + IDLE_S - time.monotonic()) > 0
            ):
                time.sleep(left)
            # All heads advance together: a block has a part in each.
            stop = min(first + piece, self._num_slots)
            for address, slot_bytes in heads:
                if self._stopped or not _populate(address + first * slot_bytes, (stop - first) * slot_bytes):
                    return
            first = stop


def _populate(address: int, num_bytes: int) -> bool:
    """Whether the system could: an older one does not know how, and then pages come as they are used."""
    page = os.sysconf("SC_PAGE_SIZE")
    begin = address // page * page
    result: int = ctypes.CDLL(None).madvise(
        ctypes.c_void_p(begin), ctypes.c_size_t(address + num_bytes - begin), _POPULATE_WRITE
    )
    return result == 0
