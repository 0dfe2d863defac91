"""A shard's plan: from its flags, and from what its device has."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from text_generation_router.config import RouterFlags, warmup_limits
from text_generation_server.config import ConfigError, ShardConfig
from text_generation_server.device_memory import DeviceMemory, named_device
from text_generation_server.engine.memory import DoesNotFit, WarmupLimits
from text_generation_server.model.loader import load_model
from text_generation_server.planning import expected_limits, plan_loaded, plan_unloaded, read_device, require_room

MakeModel = Callable[..., Path]
CONFIG = ShardConfig(model_id="tiny", uds_path=Path("unused"))


def cpu(usable_bytes: int) -> DeviceMemory:
    return DeviceMemory(kind="cpu", name="cpu", usable_bytes=usable_bytes, derivation="so much", share=0.5)


@dataclasses.dataclass
class Model:
    device_type: str
    block_size: int = 16
    vocab_size: int = 1000
    max_position_embeddings: int = 2048


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"max_concurrent_requests": 5000},
        {"max_batch_size": 7, "max_batch_prefill_tokens": 100, "max_batch_total_tokens": 1000, "max_total_tokens": 50},
        {"max_batch_prefill_tokens": 16},
    ],
)
def test_it_expects_what_the_router_will_ask_for(device_type: str, flags: dict[str, int]) -> None:
    asked = warmup_limits(RouterFlags(**flags), Model(device_type))  # type: ignore[arg-type]
    expected = expected_limits(dataclasses.replace(CONFIG, **flags), device_type)  # type: ignore[arg-type]
    assert dataclasses.asdict(expected) == dataclasses.asdict(asked)


def test_a_device_that_is_too_small_is_refused_with_numbers_and_a_flag(tiny_model: MakeModel) -> None:
    folder = tiny_model("llama")
    with pytest.raises(ConfigError) as refusal:
        require_room(CONFIG, folder, cpu(2**18))
    assert str(refusal.value) == (
        "not enough memory on cpu: the weights do not fit: 401.3 KiB in float32, where there are so much; "
        "`--dtype bfloat16` halves them; or free memory, or choose a smaller model"
    )
    with pytest.raises(ConfigError, match=r"decrease `--max-batch-prefill-tokens` to \d+ or less"):
        require_room(
            dataclasses.replace(CONFIG, max_batch_prefill_tokens=200_000, max_concurrent_requests=1), folder, cpu(2**29)
        )
    assert require_room(CONFIG, folder, cpu(2**30)).num_parameters > 0


def test_before_and_after_loading_it_is_the_same_plan(tiny_model: MakeModel) -> None:
    folder = tiny_model("llama")
    found, before = plan_unloaded(CONFIG, folder, cpu(2**30))
    runner = load_model(CONFIG, folder)
    left = cpu(2**30 - found.sizes.weight_bytes)
    after = plan_loaded(found, runner.info, runner.layers, left, expected_limits(CONFIG, "cpu"), CONFIG)
    for name in ("num_blocks", "fitting_blocks", "step_bytes", "kept_free_bytes", "context", "why"):
        assert getattr(before, name) == getattr(after, name), name


def test_what_was_unknown_is_known_once_it_is_loaded(tiny_model: MakeModel) -> None:
    folder = tiny_model("jetmoe")
    found, before = plan_unloaded(CONFIG, folder, cpu(2**30))
    assert (before.problem, before.num_blocks) == ("", 0)
    runner = load_model(CONFIG, folder)
    after = plan_loaded(found, runner.info, runner.layers, cpu(2**30), WarmupLimits(), CONFIG)
    assert after.num_blocks > 0
    with pytest.raises(DoesNotFit):
        plan_loaded(found, runner.info, runner.layers, cpu(2**20), WarmupLimits(), CONFIG)


def test_a_gpu_needs_no_gpu_to_be_planned_for(tiny_model: MakeModel) -> None:
    _, plan = plan_unloaded(CONFIG, tiny_model("llama"), named_device("L4"))
    assert plan.device.kind == "cuda"
    assert plan.step_tokens == 4096
    assert plan.num_blocks == 128 * 512 // 16


def test_this_machine() -> None:
    device = read_device(CONFIG, torch.device("cpu"))
    two = read_device(dataclasses.replace(CONFIG, world_size=2), torch.device("cpu"))
    assert device.usable_bytes > 2**20
    assert two.usable_bytes < device.usable_bytes
