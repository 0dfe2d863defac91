"""The memory plan of a shard: what its configuration asks, what its model takes, and what its device has, put together.

The same before anything is loaded, for this machine or any other device, and again once the weights are there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from text_generation_proto import limits as derive

from text_generation_server.attention.interface import LayerSpec
from text_generation_server.config import ConfigError, ShardConfig
from text_generation_server.device_memory import DeviceMemory, cpu_device, cuda_device
from text_generation_server.engine.memory import MemoryPlan, ModelSizes, WarmupLimits, plan_memory
from text_generation_server.model import footprint
from text_generation_server.model.dtypes import resolve_kv_dtype
from text_generation_server.model.footprint import Footprint
from text_generation_server.model.runner import ModelInfo


def expected_limits(config: ShardConfig, device_type: str) -> WarmupLimits:
    """What the router will ask for: derived from the same flags, by the same rules."""
    rows = derive.most_rows(config.max_concurrent_requests, config.max_batch_size)
    prefill = derive.batch_prefill_tokens(
        config.max_batch_prefill_tokens, device_type=device_type, rows=rows, block_size=config.block_size
    )
    return WarmupLimits(
        max_batch_prefill_tokens=derive.largest_step_tokens(prefill.value, rows),
        max_batch_total_tokens=config.max_batch_total_tokens or 0,
        max_batch_size=config.max_batch_size or 0,
        max_total_tokens=config.max_total_tokens or 0,
        max_concurrent_requests=config.max_concurrent_requests,
    )


def read_device(config: ShardConfig, device: torch.device) -> DeviceMemory:
    """What is free for this shard at this moment."""
    if device.type != "cuda":
        return cpu_device(config.world_size)
    free, total = torch.cuda.mem_get_info(device)
    name = torch.cuda.get_device_name(device)
    return cuda_device(name, free=free, total=total, fraction=config.cuda_memory_fraction)


def plan_unloaded(config: ShardConfig, folder: Path, device: DeviceMemory) -> tuple[Footprint, MemoryPlan]:
    """The plan with the weights still to be loaded. Raises: ConfigError if the model cannot be served."""
    found = footprint.survey(config, folder, device.kind, kv_dtype=resolve_kv_dtype(config.kv_cache_dtype))
    return found, _plan(found.sizes, device, expected_limits(config, device.kind), config)


def require_room(config: ShardConfig, folder: Path, device: DeviceMemory) -> Footprint:
    """Raises: ConfigError where the device is too small, before a weight is read."""
    found, plan = plan_unloaded(config, folder, device)
    if plan.problem:
        raise ConfigError(f"not enough memory on {device.name}: {plan.problem}")
    return found


def plan_loaded(
    found: Footprint,
    info: ModelInfo,
    layers: Sequence[LayerSpec],
    device: DeviceMemory,
    limits: WarmupLimits,
    config: ShardConfig,
) -> MemoryPlan:
    """The plan once the weights are on the device, of which ``device`` has what they have left.

    Raises: DoesNotFit.
    """
    sizes = dataclasses.replace(
        found.sizes,
        weight_bytes=0,
        kv_bytes_per_token=info.kv_bytes_per_token,
        logits_width=info.vocab_size,
        layer_bytes_per_token=footprint.layer_bytes_per_token(layers, info.dtype),
        attention_bytes_per_token=footprint.attention_bytes_per_token(layers, info.dtype),
    )
    return _plan(sizes, device, limits, config).require_fit()


def _plan(sizes: ModelSizes, device: DeviceMemory, limits: WarmupLimits, config: ShardConfig) -> MemoryPlan:
    return plan_memory(
        sizes,
        device,
        limits,
        block_size=config.block_size,
        prefill_logprobs=config.prefill_logprobs,
        graph_batch_sizes=config.cuda_graphs if device.kind == "cuda" else (),
    )
