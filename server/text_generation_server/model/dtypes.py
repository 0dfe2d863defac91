"""Which number format a model runs in."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from text_generation_server.config import ConfigError, Dtype, KvCacheDtype, ShardConfig
from text_generation_server.cpu_kernels import compiler, panels
from text_generation_server.cpu_kernels.language import LANES

logger = logging.getLogger(__name__)

BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16", "avx_ne_convert"})
"""In /proc/cpuinfo: x86 and arm names for bfloat16 products."""
FP16_FLAGS = frozenset({"avx512_fp16", "amx_fp16", "asimdhp"})
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Names of configurations for how many there are."""


def resolve_kv_dtype(asked: KvCacheDtype | None) -> torch.dtype | None:
    """Of the KV cache; None: that of the weights."""
    return None if asked is None else getattr(torch, asked.value.replace("fp8", "float8"))


def resolve_dtype(asked: Dtype | None, stored: torch.dtype, device: torch.device, *, has_products: bool) -> torch.dtype:
    """What was asked, else the checkpoint's own, else float32 where the processor has no instructions for that.

    ``has_products``: bfloat16 numbers are multiplied by kernels of ours, which do without such instructions.
    """
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
    if stored == torch.bfloat16 and has_products:
        return stored
    logger.warning("this processor has no %s instructions: running in float32, at twice the memory", stored)
    return torch.float32


def has_products(config: ShardConfig, text_config: Any) -> bool:
    """Whether kernels of ours multiply what is large in such a model. Experts are torch's, and where attention is, so
    is all the rest: torch's products of bfloat16 numbers take ten times as long without instructions for them."""
    if not config.swaps or config.kv_cache_dtype is not None or config.attention not in (None, "llvm"):
        return False
    width = getattr(text_config, "hidden_size", None) or 0
    heads = getattr(text_config, "num_attention_heads", None) or 1
    head_dim = getattr(text_config, "head_dim", None) or width // heads
    has_experts = any(getattr(text_config, name, None) for name in EXPERTS)
    fits = width > 0 and width % panels.STEP == 0 and head_dim % LANES == 0
    return fits and not has_experts and compiler.reason_unavailable() is None


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
