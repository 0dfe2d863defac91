"""What is known of a model before it is loaded equals what is found once it is, family by family."""

from __future__ import annotations

import dataclasses
import json
import shutil
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from text_generation_server.config import ConfigError, Dtype, ShardConfig
from text_generation_server.engine.batch import Row, Sequence
from text_generation_server.engine.inputs import build_inputs
from text_generation_server.engine.kv_cache import KVCache
from text_generation_server.generation.parameters import SamplingParameters
from text_generation_server.model.footprint import Footprint, survey
from text_generation_server.model.live_bytes import LiveBytes
from text_generation_server.model.loader import load_model
from text_generation_server.model.transformers_runner import TransformersRunner
from tiny_models import PROMISED, TINY
from torch import Tensor

MakeModel = Callable[..., Path]
CONFIG = ShardConfig(model_id="tiny", uds_path=Path("unused"))

REFUSED = frozenset(
    {"mpt", "falcon", "gptj", "bloom", "codegen", "gpt_neo", "minimax", "mamba", "mamba2", "jamba", "bamba", "zamba2",
     "lfm2", "lfm2_moe", "qwen3_next", "diffllama", "recurrent_gemma", "rwkv", "openai-gpt", "xglm", "doge", "blt"}
)  # fmt: skip
"""Types that the probe does not serve."""
UNKNOWN = frozenset({"jetmoe"})
"""Types whose forward pass needs numbers: to split its batch by expert, this one reads how many tokens each has."""
OTHERS = ("deepseek_v3", "gpt_oss", "gemma3n_text", "longcat_flash", "jetmoe")

EXPERTS_TOLERANCE = 0.45
"""Without numbers, each expert is taken to get all tokens where the library's experts run one after the other."""

families = pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(each, marks=() if each in (*PROMISED, *OTHERS) else pytest.mark.slow)
        for each in TINY
        if each not in REFUSED
    ],
)


def weight_bytes(runner: TransformersRunner) -> int:
    model = runner.model
    return sum({id(each): each.nbytes for each in [*model.parameters(), *model.buffers()]}.values())


@families
def test_a_family_takes_what_was_foreseen(model_type: str, tiny_model: MakeModel) -> None:
    folder = tiny_model(model_type)
    found = survey(CONFIG, folder, "cpu")
    plain = load_model(dataclasses.replace(CONFIG, swaps=False), folder)
    assert weight_bytes(plain) == found.sizes.weight_bytes - found.head_copy_bytes
    runner = load_model(CONFIG, folder)
    # Kernels keep small weights of norms in float32 as well; what is packed may be filled up.
    assert weight_bytes(runner) == pytest.approx(found.sizes.weight_bytes, rel=0.03)
    assert found.sizes.logits_width == runner.info.vocab_size
    if model_type in UNKNOWN:
        assert found.sizes.kv_bytes_per_token is None
        assert found.unknown
    else:
        assert found.sizes.kv_bytes_per_token == runner.info.kv_bytes_per_token
        assert found.unknown == ""
    sizes = found.sizes
    if model_type not in UNKNOWN:
        assert activation_bytes(plain, 256) == pytest.approx(sizes.step_bytes_per_token * 256, rel=EXPERTS_TOLERANCE)
    # Ours rotate queries and keys side by side, which widths of real models make up for in the MLP.
    for each in (plain, runner):
        assert activation_bytes(each, 256) <= (sizes.step_bytes_per_token + sizes.attention_bytes_per_token) * 256


def activation_bytes(runner: TransformersRunner, num_tokens: int) -> int:
    """The most that a prefill of so many tokens holds at once, but for what attention makes for itself."""
    sequence = Sequence(
        sequence_id=0,
        token_ids=array("q", range(num_tokens)),
        num_prompt_tokens=num_tokens,
        num_given=num_tokens,
        block_table=list(range(1, 1 + num_tokens // 16)),
        num_computed=0,
        num_cached=0,
        num_verified=0,
        sampling=SamplingParameters(),
        top_n_tokens=0,
        prefill_logprobs=False,
    )
    inputs, _ = build_inputs(
        [Row(sequence, 0, num_tokens, False)], block_size=16, device=torch.device("cpu"), pads=True
    )
    runner.allocate_kv_cache(num_tokens // 16)
    own, runner.backend = runner.backend, OnlyResults()
    try:
        with torch.inference_mode():
            runner.forward(inputs)  # what is kept from step to step, such as a table of angles, is there then
            with LiveBytes() as live:
                runner.forward(inputs)
        peak: int = live.peak
        return peak
    finally:
        runner.backend = own
        runner.release_kv_cache()


class OnlyResults:
    """Attention that takes no memory but its result."""

    def __init__(self, **_: Any) -> None: ...

    def prepare(self, inputs: object) -> None: ...

    def attend(
        self,
        plan: object,
        layer: object,
        cache: object,
        query_HTD: Tensor,
        key_KTD: Tensor,
        value_KTE: Tensor,
        **_: Any,
    ) -> Tensor:
        return query_HTD.new_zeros((query_HTD.shape[1], query_HTD.shape[0], value_KTE.shape[2]))


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "gpt2", "deepseek_v3"])
def test_a_short_float_halves_everything(model_type: str, tiny_model: MakeModel) -> None:
    folder = tiny_model(model_type)
    whole, half = (
        survey(dataclasses.replace(CONFIG, dtype=dtype), folder, "cuda") for dtype in (Dtype.FLOAT32, Dtype.BFLOAT16)
    )
    assert half.sizes.kv_bytes_per_token == (whole.sizes.kv_bytes_per_token or 0) // 2
    assert half.sizes.weight_bytes == pytest.approx(whole.sizes.weight_bytes / 2, rel=0.01)
    assert half.sizes.step_bytes_per_token <= whole.sizes.step_bytes_per_token
    assert half.num_parameters == whole.num_parameters


def test_the_cache_may_have_a_dtype_of_its_own(tiny_model: MakeModel) -> None:
    sizes = survey(CONFIG, tiny_model("llama"), "cuda", kv_dtype=torch.float8_e4m3fn).sizes
    assert sizes.kv_bytes_per_token == 2 * 2 * (16 + 16)


def test_the_cache_takes_exactly_that(tiny_model: MakeModel) -> None:
    folder = tiny_model("deepseek_v3")  # keys and values of different widths
    runner = load_model(CONFIG, folder)
    runner.allocate_kv_cache(10)
    assert isinstance(runner.cache, KVCache)
    taken = sum(layer.keys_KSD.nbytes + layer.values_KSE.nbytes for layer in runner.cache.layers)
    assert taken == 11 * 16 * (survey(CONFIG, folder, "cpu").sizes.kv_bytes_per_token or 0)


def test_a_tied_output_layer_is_packed_beside_the_embedding(tiny_model: MakeModel) -> None:
    tied = survey(CONFIG, tiny_model("llama"), "cpu")
    assert tied.head_copy_bytes == 320 * 64 * 4
    assert survey(CONFIG, tiny_model("llama"), "cuda").head_copy_bytes == 0
    assert survey(CONFIG, tiny_model("mistral"), "cpu").head_copy_bytes == 0
    assert survey(dataclasses.replace(CONFIG, swaps=False), tiny_model("llama"), "cpu").head_copy_bytes == 0


def test_one_of_two_shards(tiny_model: MakeModel) -> None:
    folder = tiny_model("mistral")
    whole, half = (survey(dataclasses.replace(CONFIG, world_size=size), folder, "cpu") for size in (1, 2))
    assert half.sizes.kv_bytes_per_token == (whole.sizes.kv_bytes_per_token or 0) // 2
    norms = 5 * 64 * 4
    assert half.sizes.weight_bytes == pytest.approx((whole.sizes.weight_bytes + norms) / 2, rel=0.001)
    assert half.num_parameters == whole.num_parameters
    with pytest.raises(ConfigError, match="cannot be split over 3 shards"):
        survey(dataclasses.replace(CONFIG, world_size=3), folder, "cpu")


def changed(model: Path, folder: Path, **changes: object) -> Path:
    copy = shutil.copytree(model, folder / "model")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    return copy


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_hidden_layers": 10**9}, "speaks of 1000000000 layers, and its weights are 20 tensors"),
        ({"hidden_size": 2**62}, "transformers cannot build it"),
        ({"hidden_size": -64}, "transformers cannot build it"),
        ({"num_attention_heads": 0}, "cannot be served"),
        ({"hidden_size": "64"}, "cannot be served"),
        ({"model_type": "llama9"}, "does not know it"),
    ],
)
def test_a_configuration_of_lies(
    changes: dict[str, object], reason: str, tiny_model: MakeModel, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=reason) as refusal:
        survey(CONFIG, changed(tiny_model("llama"), tmp_path, **changes), "cpu")
    assert "\n" not in str(refusal.value)


def test_without_weights_config_json_is_enough_if_it_names_a_dtype(tiny_model: MakeModel, tmp_path: Path) -> None:
    folder = tiny_model("mistral")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert survey(CONFIG, tmp_path, "cpu").sizes == survey(CONFIG, folder, "cpu").sizes
    nameless = {name: value for name, value in config.items() if name not in ("dtype", "torch_dtype")}
    (tmp_path / "config.json").write_text(json.dumps(nameless))
    with pytest.raises(ConfigError, match="give --dtype"):
        survey(CONFIG, tmp_path, "cpu")
    asked = dataclasses.replace(CONFIG, dtype=Dtype.FLOAT32)
    assert survey(asked, tmp_path, "cpu").sizes.weight_bytes == survey(CONFIG, folder, "cpu").sizes.weight_bytes


def test_a_model_that_does_not_run_without_numbers_gets_a_generous_guess(tiny_model: MakeModel) -> None:
    found: Footprint = survey(CONFIG, tiny_model("jetmoe"), "cpu")
    assert found.sizes.step_bytes_per_token > 0
    assert found.sizes.logits_width == 320
