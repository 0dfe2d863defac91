"""``plan``: what fits, for people as a table or for programs as JSON, before anything is loaded."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TextIO

import torch
from text_generation_proto import limits as derive
from text_generation_proto.limits import Limit

from text_generation_server.config import ConfigError, ShardConfig
from text_generation_server.device_memory import DeviceMemory, amount, cpu_device, named_device
from text_generation_server.distributed import local_device
from text_generation_server.engine.memory import MemoryPlan
from text_generation_server.library_logs import route_library_logs
from text_generation_server.model.footprint import Footprint
from text_generation_server.planning import plan_unloaded, read_device
from text_generation_server.weights.hub import find_config

EXAMPLE_TOKENS = (1024, 4096, 16384)
"""Lengths of requests, prompt and output together, whose number at once is shown beside that of the longest."""


@dataclass(frozen=True, slots=True)
class Report:
    """A plan and the limits that follow from it."""

    model_id: str
    world_size: int
    footprint: Footprint
    plan: MemoryPlan
    limits: Mapping[str, Limit]
    """TGI's four token limits by their names; empty where nothing fits, or nothing is known."""

    @property
    def concurrency(self) -> dict[int, int]:
        """Tokens of one request -> how many such requests hold their blocks at once."""
        longest = self.plan.context
        lengths = [*(tokens for tokens in EXAMPLE_TOKENS if tokens < longest), longest] if longest else []
        return {tokens: self.plan.concurrency(tokens) for tokens in lengths}


def report(config: ShardConfig, device_name: str | None, env: Mapping[str, str]) -> Report:
    """Plan for a device: ``cpu``, a GPU's name, a size, or None for what this machine has.

    Raises: ConfigError.
    """
    device = _device(config, device_name)  # what costs nothing is refused first
    source = find_config(config.model_id, config.revision, env, trust_remote_code=config.trust_remote_code)
    footprint, plan = plan_unloaded(config, source.folder, device)
    return Report(config.model_id, config.world_size, footprint, plan, _limits(config, plan))


def _device(config: ShardConfig, name: str | None) -> DeviceMemory:
    if name is not None and name.strip().lower() != "cpu":
        return named_device(name, cuda_memory_fraction=config.cuda_memory_fraction)
    if name is not None:
        return cpu_device(config.world_size)
    return read_device(config, local_device(0))


def _limits(config: ShardConfig, plan: MemoryPlan) -> dict[str, Limit]:
    capacity = plan.cache_tokens
    if plan.problem or not capacity:
        return {}
    rows = derive.most_rows(config.max_concurrent_requests, config.max_batch_size)
    prefill = derive.batch_prefill_tokens(
        config.max_batch_prefill_tokens, device_type=plan.device.kind, rows=rows, block_size=config.block_size
    )
    if prefill.value > capacity:
        prefill = Limit(capacity, "all tokens of the KV cache")
    total = derive.total_tokens(
        config.max_total_tokens, capacity=capacity, positions=plan.sizes.max_position_embeddings
    )
    return {
        "max_input_tokens": derive.input_tokens(config.max_input_tokens, total.value),
        "max_total_tokens": total,
        "max_batch_prefill_tokens": prefill,
        "max_batch_total_tokens": Limit(capacity, f"{plan.num_blocks} blocks of {plan.block_size}: {plan.why}"),
    }


def to_json(made: Report) -> str:
    """One object; sizes in bytes, null where only the loaded model can tell."""
    plan, sizes = made.plan, made.plan.sizes
    known = sizes.kv_bytes_per_token is not None
    content: dict[str, Any] = {
        "fits": not plan.problem,
        "problem": plan.problem or None,
        "unknown_until_loaded": made.footprint.unknown or None,
        "model": {
            "id": made.model_id,
            "type": made.footprint.architecture.model_type,
            "dtype": str(made.footprint.dtype).removeprefix("torch."),
            "parameters": made.footprint.num_parameters,
            "positions": sizes.max_position_embeddings or None,
        },
        "num_shard": made.world_size,
        "device": {"kind": plan.device.kind, "name": plan.device.name, "usable_bytes": plan.device.usable_bytes},
        "bytes_on_each_shard": {
            "weights": sizes.weight_bytes,
            "overhead": plan.device.overhead_bytes,
            "kept_free": plan.kept_free_bytes,
            "activations": plan.activation_bytes,
            "attention": plan.attention_bytes,
            "logits": plan.logits_bytes,
            "prompt_logprobs": plan.prompt_logprobs_bytes,
            "cuda_graphs": plan.graph_bytes,
            "kv_cache": plan.cache_bytes if known else None,
        },
        "kv_cache": {
            "bytes_per_token": sizes.kv_bytes_per_token,
            "block_size": plan.block_size,
            "blocks": plan.num_blocks if known else None,
            "tokens": plan.cache_tokens if known else None,
            "fitting_blocks": plan.fitting_blocks if known else None,
        },
        "step": {"tokens": plan.step_tokens, "rows": plan.rows},
        "longest_request_tokens": plan.context or None,
        "concurrency": [{"tokens": tokens, "requests": count} for tokens, count in made.concurrency.items()],
        "limits": {name: {"value": limit.value, "why": limit.why} for name, limit in made.limits.items()},
    }
    return json.dumps(content, ensure_ascii=False)


def rows_of(made: Report) -> Iterator[tuple[str, str, str]]:
    """The table: what, how much, and why."""
    plan, sizes, found = made.plan, made.plan.sizes, made.footprint
    yield "memory", amount(plan.device.usable_bytes), plan.device.derivation
    copied = f", {amount(found.head_copy_bytes)} of it a packed copy of the tied output layer"
    yield (
        "weights",
        amount(sizes.weight_bytes),
        f"{found.num_parameters:,} parameters {sizes.weights}{copied if found.head_copy_bytes else ''}",
    )
    if plan.device.overhead_bytes:
        yield "driver, libraries", amount(plan.device.overhead_bytes), "context, kernels and workspaces: an estimate"
    if plan.kept_free_bytes:
        whose = "for the router and other programs" if plan.device.kind == "cpu" else "gaps of the allocator"
        yield "kept free", amount(plan.kept_free_bytes), f"{1 - plan.device.share:.0%} of the rest: {whose}"
    yield "activations", amount(plan.activation_bytes), f"a step of {plan.step_tokens} tokens"
    yield "attention", amount(plan.attention_bytes), "its copies and scores beside the cache"
    yield "logits", amount(plan.logits_bytes), f"{plan.rows} rows of {sizes.logits_width}, and sampling"
    if plan.prompt_logprobs_bytes:
        yield "prompt logprobs", amount(plan.prompt_logprobs_bytes), "`--enable-prefill-logprobs`"
    if plan.graph_bytes:
        yield "CUDA graphs", amount(plan.graph_bytes), "private pool and outputs"
    if sizes.kv_bytes_per_token is None:
        yield "KV cache", "unknown", f"until the model is loaded: {found.unknown}"
        return
    per_token = f"{amount(sizes.kv_bytes_per_token)} a token"
    if not plan.num_blocks or plan.problem:
        yield "KV cache", "does not fit", f"{plan.fitting_blocks} blocks of {plan.block_size} tokens fit, {per_token}"
        return
    yield (
        "KV cache",
        amount(plan.cache_bytes),
        f"{plan.cache_tokens:,} tokens ({plan.num_blocks:,} blocks of {plan.block_size}, {per_token}): {plan.why}",
    )
    total = made.limits["max_total_tokens"]
    yield "longest request", f"{total.value:,} tokens", f"prompt and output: {total.why}"
    for tokens, count in made.concurrency.items():
        yield f"of {tokens:,} tokens", f"{count:,} at once", _served(count, plan)


def _served(count: int, plan: MemoryPlan) -> str:
    most = plan.limits.max_concurrent_requests
    return f"`--max-concurrent-requests` admits {most}" if 0 < most < count else ""


def print_table(made: Report, stream: TextIO) -> None:
    from rich.console import Console
    from rich.table import Table

    plan = made.plan
    shards = f", each of {made.world_size} shards" if made.world_size > 1 else ""
    table = Table(
        title=f"{made.model_id} on {plan.device.name}{shards}", title_justify="left", box=None, show_header=False
    )
    table.add_column("", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for row in rows_of(made):
        table.add_row(*row)
    console = Console(file=stream, highlight=False, markup=False, width=None if stream.isatty() else 110)
    console.print(table)
    for name, limit in made.limits.items():
        console.print(f"--{name.replace('_', '-')} {limit.value} ({limit.why})", soft_wrap=True)


def run(config: ShardConfig, device_name: str | None, env: Mapping[str, str], *, as_json: bool) -> None:
    """Print the plan. Raises: ConfigError, where it does not fit as well."""
    route_library_logs("huggingface_hub", "transformers")
    torch.set_num_threads(1)  # nothing is computed here
    made = report(config, device_name, env)
    if as_json:
        sys.stdout.write(to_json(made) + "\n")
    else:
        print_table(made, sys.stdout)
    sys.stdout.flush()
    if made.plan.problem:
        raise ConfigError(f"not enough memory on {made.plan.device.name}: {made.plan.problem}")
