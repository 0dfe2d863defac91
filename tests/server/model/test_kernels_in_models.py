"""Models that compute with kernels of ours, beside the same models without."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import paged_driver
import pytest
import tiny_models
import torch
from kernels_here import needs_kernels
from text_generation_server.attention.llvm_paged import LlvmPaged
from text_generation_server.config import Dtype, ShardConfig
from text_generation_server.cpu_kernels.compiler import Launch
from text_generation_server.model.loader import load_model
from text_generation_server.model.swaps import layers, mlp, norms
from text_generation_server.model.swaps.attention import FusedAttention
from text_generation_server.model.swaps.layer_kernels import Step
from text_generation_server.model.swaps.layer_stack import LayerStack
from text_generation_server.model.swaps.linears import KernelLinear, PackedLinear, can_pack
from text_generation_server.model.transformers_runner import TransformersRunner
from torch import nn

MakeModel = Callable[..., Path]

WIDE_HEADS = {"head_dim": 32}
needs_interpreter = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton's interpreter is off",
)


def load(folder: Path, dtype: Dtype, attention: str | None = None) -> TransformersRunner:
    config = ShardConfig(model_id="tiny", uds_path=Path("unused"), dtype=dtype, attention=attention)
    return load_model(config, folder)


def modules(runner: TransformersRunner, kind: type[nn.Module]) -> list[Any]:
    return [module for module in runner.model.modules() if isinstance(module, kind)]


@pytest.mark.parametrize("attention", ["llvm", "torch"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_tokens_in_float32_equal_generate(model_type: str, attention: str, tiny_model: MakeModel) -> None:
    import transformers

    folder = tiny_model(model_type, **WIDE_HEADS)
    prompts = paged_driver.random_prompts(6, lengths=(40, 7, 70))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    expected = paged_driver.generated(model, prompts, max_new_tokens=12, eos_ids=[tiny_models.EOS_ID])
    runner = load(folder, Dtype.FLOAT32, attention)
    assert runner.info.attention == attention
    rotating = [module.has_kernel for module in modules(runner, FusedAttention)]
    assert rotating == [attention == "llvm"] * 2
    for chunk_tokens in (16, 1 << 30):
        tokens = paged_driver.greedy(
            runner, prompts, max_new_tokens=12, eos_ids=[tiny_models.EOS_ID], arrive_within=4, chunk_tokens=chunk_tokens
        )
        assert tokens == expected


@needs_kernels
@pytest.mark.parametrize(
    ("model_type", "changes", "is_whole"),
    [
        pytest.param("llama", WIDE_HEADS, True, id="plain"),
        pytest.param("qwen2", {"num_attention_heads": 2}, True, id="biases"),
        pytest.param("qwen3", WIDE_HEADS, True, id="norms of heads"),
        pytest.param("llama", {}, False, id="heads too narrow for the rotation"),
        pytest.param("llama", {**WIDE_HEADS, "intermediate_size": 80}, False, id="a width that is no whole panel"),
        pytest.param("llama", {**WIDE_HEADS, "mlp_bias": True}, False, id="biases of the mlp"),
        pytest.param("granite", {**WIDE_HEADS, "residual_multiplier": 0.5}, False, id="scaled residuals"),
        pytest.param("gemma2", WIDE_HEADS, False, id="more norms"),
        pytest.param("qwen3_moe", WIDE_HEADS, False, id="experts"),
        pytest.param("gpt2", {}, False, id="nothing of the pattern"),
    ],
)
def test_logits_in_bfloat16(model_type: str, changes: dict[str, Any], is_whole: bool, tiny_model: MakeModel) -> None:
    """Whole layers or parts of them: the logits are those of the library's own modules, but for roundings."""
    folder = tiny_model(model_type, **{"initializer_range": 0.05, **changes})
    fast, exact = load(folder, Dtype.BFLOAT16), load(folder, Dtype.FLOAT32, attention="torch")
    whole = [layer.kernels is not None for layer in modules(fast, layers.FusedLayer)]
    assert whole == [True] * 2 if is_whole else not any(whole)
    prompts = paged_driver.random_prompts(5, lengths=(3, 33, 70))
    ours, expected = (paged_driver.last_logits(runner, prompts) for runner in (fast, exact))
    assert (ours - expected).norm() <= 0.05 * expected.norm()


@needs_kernels
@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        pytest.param("llama", {}, id="plain"),
        pytest.param("qwen3", {}, id="norms of heads"),
        pytest.param("mistral", {"sliding_window": 20}, id="windows"),
    ],
)
def test_a_layer_is_one_launch(
    model_type: str, changes: dict[str, Any], tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gives the tokens of a layer in pieces, to the bit, of decode rows, of prompts and of both."""
    runner = load(tiny_model(model_type, initializer_range=0.05, **WIDE_HEADS, **changes), Dtype.BFLOAT16)
    assert all(layer.kernels for layer in modules(runner, layers.FusedLayer))
    calls = {"attend": 0, "launches": 0}

    def count(name: str) -> None:
        method = getattr(LlvmPaged, name)

        def counting(*arguments: Any, **options: Any) -> Any:
            calls[name] += 1
            return method(*arguments, **options)

        monkeypatch.setattr(LlvmPaged, name, counting)

    count("attend")
    count("launches")
    prompts = paged_driver.random_prompts(6, lengths=(40, 7, 70))
    options = {"max_new_tokens": 12, "eos_ids": [tiny_models.EOS_ID], "arrive_within": 4, "chunk_tokens": 32}
    at_once = paged_driver.greedy(runner, prompts, **options)  # type: ignore[arg-type]
    assert calls["launches"] > 0
    assert calls["attend"] == 0
    runner.launching = None
    assert paged_driver.greedy(runner, prompts, **options) == at_once  # type: ignore[arg-type]
    assert calls["attend"] > 0


@needs_kernels
@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        pytest.param("llama", {}, id="plain"),
        pytest.param("mistral", {"sliding_window": 20}, id="windows"),
    ],
)
def test_the_layers_of_a_short_step_are_one_launch(
    model_type: str, changes: dict[str, Any], tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its arguments are made anew when rows come, end or grow into another part; the tokens are those of single layers,
    to the bit."""
    options = {"initializer_range": 0.05, "max_position_embeddings": 2048, **WIDE_HEADS, **changes}
    runner = load(tiny_model(model_type, **options), Dtype.BFLOAT16)
    stacks = {layer.kernels.stack for layer in modules(runner, layers.FusedLayer)}
    assert len(stacks) == 1
    filled: list[int] = []
    run: list[bool] = []
    fill, run_one = LayerStack._fill, LayerStack._run

    def filling(stack: LayerStack, launches: list[Launch]) -> None:
        filled.append(len(launches))
        fill(stack, launches)

    def running(stack: LayerStack, step: Step) -> bool:
        run.append(run_one(stack, step))
        return run[-1]

    monkeypatch.setattr(LayerStack, "_fill", filling)
    monkeypatch.setattr(LayerStack, "_run", running)
    prompts = paged_driver.random_prompts(4, lengths=(500, 7, 1020))
    driving = {"max_new_tokens": 24, "eos_ids": [tiny_models.EOS_ID], "arrive_within": 6, "chunk_tokens": 512}
    at_once = paged_driver.greedy(runner, prompts, **driving)  # type: ignore[arg-type]
    assert 1 < len(filled) < sum(run) < len(run)
    for layer in modules(runner, layers.FusedLayer):
        layer.kernels.stack = None
    count = len(run)
    assert paged_driver.greedy(runner, prompts, **driving) == at_once  # type: ignore[arg-type]
    assert len(run) == count


@needs_kernels
def test_weights_are_kept_once(tiny_model: MakeModel) -> None:
    runner = load(tiny_model("llama", **WIDE_HEADS), Dtype.BFLOAT16)
    (first, _) = modules(runner, layers.FusedLayer)
    assert isinstance(first.self_attn.qkv, KernelLinear)
    assert isinstance(first.self_attn.out, KernelLinear)
    assert isinstance(first.mlp, mlp.PackedMLP)
    assert not runner.pads_steps, "nobody needs few numbers of rows"
    held = {tensor.data_ptr(): tensor.nbytes for tensor in (*first.parameters(), *first.buffers())}
    hidden, inner, heads = 64, 96, 4 * 32 + 2 * 2 * 32
    matrices = hidden * heads + 4 * 32 * hidden + 3 * hidden * inner
    assert 2 * matrices <= sum(held.values()) <= 2 * matrices + 4 * 8 * hidden  # and what belongs to the norms


@pytest.mark.parametrize("dtype", [Dtype.FLOAT32, Dtype.BFLOAT16])
def test_attention_of_torch_leaves_all_kernels_out(dtype: Dtype, tiny_model: MakeModel) -> None:
    runner = load(tiny_model("llama", **WIDE_HEADS), dtype, attention="torch")
    assert not isinstance(runner.backend, LlvmPaged)
    assert bool(modules(runner, PackedLinear)) == can_pack(torch.empty(32, 32, dtype=getattr(torch, dtype)))
    assert not modules(runner, KernelLinear)
    assert runner.pads_steps
    assert not any(layer.kernels for layer in modules(runner, layers.FusedLayer))
    assert not any(attention.has_kernel for attention in modules(runner, FusedAttention))
    assert all(norm.kernel_weight is None for norm in modules(runner, norms.FastRMSNorm))


# -- Triton's kernels, in its interpreter ------------------------------------------------------------------------


@needs_interpreter
@pytest.mark.parametrize(
    ("model_type", "is_whole"),
    [
        pytest.param("llama", True, id="plain"),
        pytest.param("qwen3", True, id="norms of heads", marks=pytest.mark.slow),
        pytest.param("gemma2", False, id="more norms, soft caps, windows", marks=pytest.mark.slow),
        pytest.param("gpt_oss", False, id="sinks, experts", marks=pytest.mark.slow),
    ],
)
def test_tokens_by_triton_kernels_equal_generate(model_type: str, is_whole: bool, tiny_model: MakeModel) -> None:
    import transformers

    folder = tiny_model(model_type)
    prompts = paged_driver.random_prompts(3, lengths=(20, 7))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    expected = paged_driver.generated(model, prompts, max_new_tokens=4, eos_ids=[tiny_models.EOS_ID])
    runner = load(folder, Dtype.FLOAT32, "triton")
    assert runner.info.attention == "triton"
    assert [layer.has_gpu_kernels for layer in modules(runner, layers.FusedLayer)] == [True] * 2 * is_whole
    assert not modules(runner, KernelLinear)
    tokens = paged_driver.greedy(
        runner, prompts, max_new_tokens=4, eos_ids=[tiny_models.EOS_ID], arrive_within=2, chunk_tokens=16
    )
    assert tokens == expected


@pytest.mark.slow
@needs_interpreter
def test_logits_by_triton_kernels_in_float16(tiny_model: MakeModel) -> None:
    """In float16 layers on a CPU are not packed, so that all of what a GPU computes is there."""
    folder = tiny_model("llama", initializer_range=0.05)
    fast, exact = load(folder, Dtype.FLOAT16, "triton"), load(folder, Dtype.FLOAT32, "torch")
    assert all(each.silu_mul is not None for each in modules(fast, mlp.FusedMLP))
    assert len(modules(fast, mlp.FusedMLP)) == len(modules(fast, FusedAttention)) == 2
    assert all(each.gpu_kernels is not None for each in modules(fast, norms.FastRMSNorm))
    prompts = paged_driver.random_prompts(2, lengths=(3, 20))
    ours, expected = (paged_driver.last_logits(runner, prompts) for runner in (fast, exact))
    assert (ours - expected).norm() <= 0.01 * expected.norm()
