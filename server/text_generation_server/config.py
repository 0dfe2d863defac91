"""Shard configuration: resolved once by the command line, then frozen."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path


class ConfigError(ValueError):
    """The shard cannot be started as asked; the text says why and what to change, in one line."""


class Dtype(enum.StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardConfig:
    model_id: str
    """As given on the launcher's command line; shown to clients."""
    revision: str | None = None
    dtype: Dtype | None = None
    """None: the checkpoint's own, or float32 where the device has no instructions for it."""
    trust_remote_code: bool = False
    uds_path: Path
    """Socket of rank r: ``{uds_path}-{r}``."""
    attention: str | None = None
    """Name in the attention registry; None picks by device."""
    block_size: int = 16
    max_input_tokens: int | None = None
    prefill_logprobs: bool = False
    cuda_memory_fraction: float = 1.0
    swaps: bool = True
    """Replace modules by their faster equals; off runs the library's own modules (for tests and for diagnosis)."""
    launcher_nonce: str = ""
    incarnation: int = 1
    rank: int = 0
    world_size: int = 1
    master_addr: str = "localhost"
    master_port: int = 29500
