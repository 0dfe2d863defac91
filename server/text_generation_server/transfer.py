"""From the host to a device without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Numbers = (
    Sequence[int] | Sequence[float] | Sequence[tuple[int, ...]] | np.ndarray[tuple[int, ...], np.dtype[np.generic]]
)


def to_device(numbers: Numbers, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers on ``device``, in stream order there. On a CPU it may be an array's own memory.

    Out of ordinary memory, CUDA copies only after all that was launched before: ``torch.tensor(..., device=device)`` in
    the middle of a step makes the host wait for its forward pass. Out of pinned memory it does not, and torch keeps
    that memory until the copy is done.
    """
    host = torch.as_tensor(numbers, dtype=dtype)
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def put(numbers: Numbers, target: Tensor) -> None:
    """The same into a tensor that is there."""
    host = torch.as_tensor(numbers, dtype=target.dtype)
    target.copy_(host.pin_memory() if target.device.type == "cuda" else host, non_blocking=True)
