"""Children die with their launcher, even when it is killed outright.

Two ropes, because each can be missing: the kernel's parent-death signal (Linux), and a pipe whose write end
only the launcher holds. When the launcher is gone the pipe reads end-of-file and the child exits at once.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading

LIFELINE_FD = "TGI_LIFELINE_FD"
"""Environment variable that holds the number of the pipe's read end in a child."""

_PR_SET_PDEATHSIG = 1


def hold_lifeline() -> None:
    """Tie this process to the launcher that started it; does nothing in a process started by hand."""
    fd = os.environ.pop(LIFELINE_FD, None)
    if fd is None:
        return
    die_with_parent()
    # The launcher may have died before prctl took effect: the pipe covers that gap.
    threading.Thread(target=_exit_on_eof, args=(int(fd),), name="lifeline", daemon=True).start()


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends, where there is a way to say so."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _exit_on_eof(fd: int) -> None:
    os.set_inheritable(fd, False)
    while True:
        try:
            if os.read(fd, 1) == b"":
                os._exit(1)
        except InterruptedError:
            continue
        except OSError:
            os._exit(1)
