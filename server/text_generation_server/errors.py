"""What can go wrong inside a shard once it serves; `rpc.service` maps it to the contract.

Start-up errors are `config.ConfigError`: one line with cause and remedy, then exit 1.
"""

from __future__ import annotations


class ShardError(Exception):
    """Base of the errors that a peer is told about; the text is meant for it."""


class InvalidStep(ShardError):
    """A step that contradicts the contract or this shard's state: unknown sequence, block out of range, wild number."""


class StaleEpoch(ShardError):
    """A step or a reset of an epoch that this shard does not serve (any more)."""


class NotEnoughMemory(ShardError):
    """The KV cache for the asked limits does not fit; the text has the numbers and the flag that would help."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that an allocation failed, on any device torch runs on."""
    import torch  # here: a download reports errors as well, and needs no torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # The CPU allocator has no class of its own: only its name in the text tells.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def first_line(error: BaseException) -> str:
    """Class and first line of an error, for a sentence of ours: a library's text may go on for pages."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
