"""Which number format a model runs in."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from text_generation_server.config import ConfigError, Dtype, KvCacheDtype

logger = logging.getLogger(__name__)

BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16", "avx_ne_convert"})
"""In /proc/cpuinfo: x86 and arm names for bfloat16 products."""
FP16_FLAGS = frozenset({"avx512_fp16", "amx_fp16", "asimdhp"})


def resolve_kv_dtype(asked: KvCacheDtype | None) -> torch.dtype | None:
    """Of the KV cache; None: that of the weights."""
    return None if asked is None else getattr(torch, asked.value.replace("fp8", "float8"))


def resolve_dtype(asked: Dtype | None, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """What was asked, else the checkpoint's own, else float32 where the processor has no instructions for that."""
    if asked is not None:
        dtype: torch.dtype = getattr(torch, asked.value)
        return dtype
    if stored not in (torch.float32, torch.bfloat16, torch.float16):
        if stored == torch.float64:
            return torch.float32
        raise ConfigError(f"the checkpoint's dtype {stored} cannot be computed with: choose one with --dtype")
    needed = {torch.bfloat16: BF16_FLAGS, torch.float16: FP16_FLAGS}.get(stored)
    if device.type != "cpu" or needed is None or needed & cpu_flags():
        return stored
    logger.warning("this processor has no %s instructions: running in float32, at twice the memory", stored)
    return torch.float32


def cpu_flags() -> frozenset[str]:
    """Instruction set names of the first processor; empty where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        name, _, flags = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(flags.split())
    return frozenset()
