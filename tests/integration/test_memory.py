"""The plan against what the operating system counts: a real shard, its weights, and its largest step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from integration.launched import Launched, serving
from text_generation_server.config import PlanFlags, resolve_plan
from text_generation_server.engine.memory import MemoryPlan
from text_generation_server.memory_report import report

MakeModel = Callable[..., Path]

FLAGS = {"max_batch_prefill_tokens": 2048, "max_concurrent_requests": 8, "max_batch_total_tokens": 8192}
POSITIONS = {"max_position_embeddings": 4096}
LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "vocab_size": 8192,
    **POSITIONS,
}
TOLERANCE = 0.1
"""Of the weights."""
KEPT_BYTES = 32 * 2**20
"""What the C library keeps of the copies that packing makes; measured: 24 MiB, whatever the size of the model."""
TYPES = [
    pytest.param("llama", torch.float32, id="llama in float32", marks=pytest.mark.slow),
    pytest.param("llama", torch.bfloat16, id="llama in bfloat16", marks=pytest.mark.slow),
    pytest.param("mistral", torch.float32, id="a window, in float32", marks=pytest.mark.slow),
    pytest.param("mixtral", torch.float32, id="experts, in float32", marks=pytest.mark.slow),
]


def read_status(pid: int, name: str) -> int:
    """A size in bytes that the system tells of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    pytest.skip(f"this system does not tell {name}")


def planned(folder: Path) -> MemoryPlan:
    return report(resolve_plan(PlanFlags(model_id=str(folder), **FLAGS), {}), "cpu", {}).plan  # type: ignore[arg-type]


def arguments(folder: Path) -> list[str]:
    flags = [word for name, value in FLAGS.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return ["--model-id", str(folder), *flags]


def loaded_bytes(server: Launched) -> int:
    """Memory of the shard that no file stands behind: pages of the checkpoint are given back when others need them."""
    return read_status(server.processes()["shard 0"].pid, "RssAnon")


@pytest.mark.parametrize(("model_type", "dtype"), TYPES)
def test_a_shard_takes_what_was_planned_and_no_more(model_type: str, dtype: torch.dtype, tiny_model: MakeModel) -> None:
    small, large = tiny_model(model_type, dtype=dtype, **POSITIONS), tiny_model(model_type, dtype=dtype, **LARGE)
    with serving(*arguments(small)) as server:
        without_weights = loaded_bytes(server) - planned(small).sizes.weight_bytes
    plan = planned(large)
    with serving(*arguments(large)) as server:
        weights = loaded_bytes(server) - without_weights
        # Its table of embeddings may be read where it lies, row by row.
        table = LARGE["vocab_size"] * LARGE["hidden_size"] * dtype.itemsize
        assert weights >= plan.sizes.weight_bytes * (1 - TOLERANCE) - table
        assert weights <= plan.sizes.weight_bytes * (1 + TOLERANCE) + KEPT_BYTES
        assert f"KV-cache blocks: {plan.num_blocks}, " in server.text
        pid = server.processes()["shard 0"].pid
        before = read_status(pid, "VmRSS")
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak counts from here
        sampling = {"do_sample": True, "top_p": 0.9, "typical_p": 0.9, "repetition_penalty": 1.1, "top_n_tokens": 5}
        body = {"inputs": "a" * 4000, "parameters": {"max_new_tokens": 4, "details": True, **sampling}}
        for _ in range(2):
            assert server.client.post("/generate", json=body).status_code == 200
        # Pages of the cache come when they are first written.
        written = 4016 * (plan.sizes.kv_bytes_per_token or 0)
        growth = read_status(pid, "VmHWM") - before
        assert growth <= plan.step_bytes + written
        assert growth >= plan.activation_bytes / 4, "a plan that is far too large hides mistakes"
