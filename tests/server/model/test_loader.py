"""Loading: what the folder says, what is refused, and that nothing in it is executed."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import paged_driver
import pytest
import torch
from text_generation_server.config import ConfigError, Dtype, KvCacheDtype, ShardConfig
from text_generation_server.cpu_kernels import compiler
from text_generation_server.model import checkpoint, dtypes
from text_generation_server.model.architecture import max_positions
from text_generation_server.model.bridge import Unservable
from text_generation_server.model.loader import load_model
from text_generation_server.model.swaps import linears, table
from torch import nn

MakeModel = Callable[..., Path]
CONFIG = ShardConfig(model_id="tiny", uds_path=Path("unused"))


@pytest.fixture
def folder(tiny_model: MakeModel, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return shutil.copytree(tiny_model("llama"), tmp_path / "model")


def edit(path: Path, **changes: Any) -> None:
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def test_what_the_router_learns(folder: Path) -> None:
    info = load_model(CONFIG, folder).info
    assert (info.model_type, info.dtype, info.attention) == ("llama", torch.float32, "llvm")
    assert (info.vocab_size, info.eos_token_ids, info.max_position_embeddings) == (320, (257,), 512)
    assert info.kv_bytes_per_token == 2 * 2 * (16 + 16) * 4
    assert info.window_size == 0


def test_nothing_of_the_repository_is_executed(folder: Path) -> None:
    trap = "raise SystemExit('executed')\n"
    for name in ("modeling_evil.py", "configuration_evil.py", "kernels.py"):
        (folder / name).write_text(trap)
    edit(
        folder / "config.json",
        auto_map={"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"},
        _attn_implementation="evil/kernel",
        _attn_implementation_internal="evil/kernel",
        kernels={"RMSNorm": "evil/kernel"},
        trust_remote_code=True,
        transformers_weights="../evil.safetensors",
    )
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "evil/base"}')
    assert load_model(CONFIG, folder).info.model_type == "llama"


def test_keys_that_name_code_are_stripped_at_any_depth() -> None:
    dirty = {"a": [{"auto_map": 1, "b": 2}], "_attn_implementation_autoset": 1, "text_config": {"kernels": 1, "c": 3}}
    assert checkpoint.strip_code(dirty) == {"a": [{"b": 2}], "text_config": {"c": 3}}


def test_an_unknown_type_is_refused_with_a_hint(folder: Path) -> None:
    edit(folder / "config.json", model_type="evil", auto_map={"AutoConfig": "x.Y"})
    with pytest.raises(ConfigError, match=r"`evil` cannot be served: transformers .* --trust-remote-code would run"):
        load_model(CONFIG, folder)


def test_trusted_configuration_code_that_fails_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def broken(*_: Any, **__: Any) -> None:
        raise AttributeError("no such thing\nand a page about it")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", broken)
    edit(folder / "config.json", auto_map={"AutoConfig": "configuration_own.Own"})
    trusting = ShardConfig(model_id="tiny", uds_path=Path("unused"), trust_remote_code=True)
    with pytest.raises(ConfigError) as refusal:
        load_model(trusting, folder)
    reason = "its own configuration code fails (AttributeError: no such thing)"
    assert str(refusal.value) == f"model type `llama` cannot be served: {reason}"


def doubled(linear: nn.Module, *, with_kernels: bool) -> nn.Module | None:
    weights = linears.plain_weights(linear)
    return None if weights is None else linears.PackedLinear(weights[0] * 2, weights[1])


def out_of_reach(*_: Any) -> bool:
    raise Unservable("it does not run with positions spread far")


@pytest.mark.parametrize(
    ("swap", "broken", "reason"),
    [
        (linears, ("pack", doubled), "gives other logits than the model's own"),
        (table, ("_record", out_of_reach), "it does not run with positions spread far"),
    ],
)
def test_a_model_whose_swaps_fail_keeps_its_own_modules(
    swap: Any, broken: Any, reason: str, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(swap, *broken)
    runner = load_model(CONFIG, folder)
    assert "model type `llama` runs with its own modules, which is slower: " in caplog.text
    assert reason in caplog.text
    assert {type(module).__name__ for module in runner.model.modules()} >= {"LlamaRMSNorm", "LlamaMLP", "Linear"}


def test_missing_weights_are_refused_not_invented(folder: Path) -> None:
    edit(folder / "config.json", num_hidden_layers=3)
    with pytest.raises(ConfigError, match=r"its checkpoint lacks 9 weights, the first is model\.layers\.2\."):
        load_model(CONFIG, folder)


def test_a_folder_without_safetensors_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="no weights in safetensors format"):
        load_model(CONFIG, folder)


def test_an_index_may_not_lead_out_of_the_folder(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../other.safetensors"}}')
    with pytest.raises(ConfigError, match="outside of the model's folder"):
        load_model(CONFIG, folder)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"max_total_tokens": 513}, "`max_total_tokens` must be <= the 512 positions"),
        ({"max_input_tokens": 512}, "`max_input_tokens` must be < the 512 positions"),
        ({"attention": "flash"}, "attention `flash` is not known"),
    ],
)
def test_what_cannot_be_honoured_is_refused_before_weights_are_read(
    asked: dict[str, Any], reason: str, folder: Path
) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=reason):
        load_model(dataclasses.replace(CONFIG, **asked), folder)


def test_a_sharded_checkpoint(tiny_model: MakeModel, tmp_path: Path) -> None:
    import transformers

    whole = tiny_model("llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(whole)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(checkpoint.weight_files(tmp_path)) > 2
    seen: list[tuple[str, int, int]] = []
    runner = load_model(CONFIG, tmp_path, progress=lambda what, done, total: seen.append((what, done, total)))
    ours, theirs = (dict(each.model.named_parameters()) for each in (runner, load_model(CONFIG, whole)))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert ("probe", 2, 2) in seen
    assert any(what == "Loading weights" and done == total for what, done, total in seen)


def test_a_quantized_checkpoint_is_refused(folder: Path) -> None:
    edit(folder / "config.json", quantization_config={"quant_method": "evil"})
    with pytest.raises(ConfigError, match="its checkpoint is quantized in a way that is not supported"):
        load_model(CONFIG, folder)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ([257, 258, 257], 1, (257, 258)),
        (5, 1, (5,)),
        (None, [1, 2], (1, 2)),
        (None, None, ()),
        (-1, 1, (1,)),
        ([1, None], 2, (1,)),
        ([-1, 320, True, "2"], [None, 319], (319,)),
        (True, None, ()),
    ],
)
def test_eos_ids(generation: Any, config: Any, expected: tuple[int, ...], tmp_path: Path) -> None:
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert checkpoint.eos_token_ids(tmp_path, {"eos_token_id": config}, 320) == expected


def test_eos_ids_of_a_text_model_inside(tmp_path: Path) -> None:
    assert checkpoint.eos_token_ids(tmp_path, {"eos_token_id": None, "text_config": {"eos_token_id": 7}}, 320) == (7,)


@pytest.mark.parametrize("dtype", list(Dtype))
def test_every_dtype_is_served_when_asked_for(dtype: Dtype, folder: Path) -> None:
    config = ShardConfig(model_id="tiny", uds_path=Path("unused"), dtype=dtype)
    assert load_model(config, folder).info.dtype == getattr(torch, dtype)


@pytest.mark.parametrize(
    ("asked", "stored", "flags", "has_products", "expected"),
    [
        (None, torch.bfloat16, {"avx512_bf16"}, False, torch.bfloat16),
        (None, torch.bfloat16, {"avx2"}, False, torch.float32),
        (None, torch.bfloat16, {"avx2"}, True, torch.bfloat16),
        (Dtype.BFLOAT16, torch.bfloat16, {"avx2"}, False, torch.bfloat16),
        (None, torch.float16, {"avx512_bf16"}, True, torch.float32),
        (None, torch.float32, set(), True, torch.float32),
    ],
)
def test_the_dtype_follows_the_processor(
    asked: Dtype | None,
    stored: torch.dtype,
    flags: set[str],
    has_products: bool,
    expected: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dtypes, "cpu_flags", lambda: frozenset(flags))
    assert dtypes.resolve_dtype(asked, stored, torch.device("cpu"), has_products=has_products) == expected


@pytest.mark.skipif(compiler.reason_unavailable() is not None, reason="kernels cannot be used here")
@pytest.mark.parametrize(
    ("model_type", "changes", "options", "expected"),
    [
        ("LlamaConfig", {}, {}, True),
        ("LlamaConfig", {}, {"attention": "llvm"}, True),
        ("LlamaConfig", {}, {"attention": "torch"}, False),
        ("LlamaConfig", {}, {"swaps": False}, False),
        ("LlamaConfig", {}, {"kv_cache_dtype": KvCacheDtype.FP8_E5M2}, False),
        ("LlamaConfig", {"hidden_size": 72, "num_attention_heads": 3}, {}, False),
        ("LlamaConfig", {"hidden_size": 80, "num_attention_heads": 5}, {}, False),
        ("MixtralConfig", {}, {}, False),
        ("Qwen3MoeConfig", {}, {}, False),
    ],
)
def test_experts_and_attention_of_torch_have_no_products_of_ours(
    model_type: str, changes: dict[str, Any], options: dict[str, Any], expected: bool
) -> None:
    import transformers

    text_config = getattr(transformers, model_type)(**changes)
    assert dtypes.has_products(dataclasses.replace(CONFIG, **options), text_config) == expected


def test_the_stored_dtype_is_read_from_the_tensors_if_the_configuration_is_silent(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert checkpoint.stored_dtype(folder, config) == torch.float32
    assert checkpoint.stored_dtype(folder, {}) == torch.float32
    assert checkpoint.stored_dtype(folder, {"torch_dtype": "bfloat16"}) == torch.bfloat16


def test_longrope_is_limited_to_the_positions_that_do_not_change() -> None:
    import transformers

    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "rope_theta": 1e4}
    config = transformers.Phi3Config(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=4096, original_max_position_embeddings=512,
        rope_parameters=scaling, pad_token_id=0,
    )  # fmt: skip
    assert max_positions(config) == 512


@pytest.mark.parametrize("name", list(KvCacheDtype))
def test_a_cache_of_eight_bits_is_a_quarter_as_large_and_says_what_it_costs(
    name: KvCacheDtype, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = load_model(CONFIG, folder)
    with caplog.at_level(logging.INFO, "text_generation_server.model.loader"):
        runner = load_model(dataclasses.replace(CONFIG, kv_cache_dtype=name), folder)
    assert runner.info.attention == "torch", "the processor's kernels read no such cache"
    assert runner.info.kv_bytes_per_token == plain.info.kv_bytes_per_token / 4
    assert f"KV cache in {name}: the probe's logits differ by " in caplog.text
    prompts = paged_driver.random_prompts(3)
    ours, exact = (paged_driver.last_logits(each, prompts) for each in (runner, plain))
    assert runner.cache is not None
    assert str(runner.cache.layers[0].keys_KSD.dtype) == f"torch.{name.replace('fp8', 'float8')}"
    # Three bits of mantissa, or two.
    assert 0 < (ours - exact).norm() <= (0.1 if name is KvCacheDtype.FP8_E4M3FN else 0.3) * exact.norm()
