"""`embedding.encoder` against the library's own model, one text at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from text_generation_server.config import ConfigError, Dtype, ShardConfig
from text_generation_server.embedding import swaps
from text_generation_server.embedding.encoder import Encoder, is_encoder, load_encoder
from text_generation_server.embedding.recipe import Pooling
from text_generation_server.model.swaps.linears import PackedLinear
from text_generation_server.model.swaps.projections import Shared
from tiny_models import ENCODERS, make_tiny_encoder, make_tiny_model
from torch import Tensor

LENGTHS = (5, 1, 60, 12, 13, 200, 3, 61, 2)
TEXTS = [[(7 * row + place * 5) % 250 + 1 for place in range(length)] for row, length in enumerate(LENGTHS)]


def config(**changes: Any) -> ShardConfig:
    return ShardConfig(model_id="m", uds_path=Path("/none"), **changes)


def load(folder: Path, **changes: Any) -> Encoder:
    return load_encoder(config(**changes), folder, torch.device("cpu"))


@torch.inference_mode()
def expected(folder: Path, pooling: str = "mean") -> Tensor:
    import transformers

    model: Any = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    rows = []
    for text in TEXTS:
        states_TH = model(input_ids=torch.tensor([text])).last_hidden_state[0]
        rows.append({"mean": states_TH.mean(0), "cls": states_TH[0], "lasttoken": states_TH[-1]}[pooling])
    return torch.stack(rows)


@pytest.mark.parametrize("model_type", ENCODERS)
def test_families(model_type: str, tmp_path: Path) -> None:
    folder = make_tiny_encoder(model_type, tmp_path, pooling=None)
    assert is_encoder(config(), folder)
    encoder = load(folder)
    assert (encoder.info.dimensions, encoder.recipe.poolings) == (64, (Pooling.MEAN,))
    vectors = encoder.embed(TEXTS)
    torch.testing.assert_close(vectors, expected(folder), rtol=1e-4, atol=1e-5)
    alone = torch.cat([encoder.embed([text]) for text in TEXTS])
    torch.testing.assert_close(vectors, alone, rtol=1e-4, atol=1e-5)


def test_a_model_that_could_generate_embeds_if_its_files_say_so(tmp_path: Path) -> None:
    folder = make_tiny_encoder("qwen3", tmp_path, pooling="lasttoken")
    assert is_encoder(config(), folder)
    torch.testing.assert_close(load(folder).embed(TEXTS), expected(folder, "lasttoken"), rtol=1e-4, atol=1e-5)


def test_a_model_that_generates_is_no_encoder(tmp_path: Path) -> None:
    assert not is_encoder(config(), make_tiny_model("llama", tmp_path))


def test_a_decoder_of_a_family_of_encoders_is_none(tmp_path: Path) -> None:
    assert not is_encoder(config(), make_tiny_model("bert", tmp_path, is_decoder=True))


def test_layers_are_packed_if_nobody_objects(tmp_path: Path) -> None:
    folder = make_tiny_encoder("bert", tmp_path, pooling="cls", normalizes=True)
    as_it_is = load(folder, swaps=False)
    for dtype, layers, tolerance in ((Dtype.FLOAT32, (0, 0, 2), 1e-5), (Dtype.BFLOAT16, (8, 2, 2), 0.1)):
        swapped = load(folder, dtype=dtype)
        assert swapped.recipe.normalizes
        kinds = (PackedLinear, swaps.GeluLinear, Shared)
        counts = tuple(len({each for each in swapped._model.modules() if isinstance(each, kind)}) for kind in kinds)
        assert counts == layers or (dtype is Dtype.BFLOAT16 and not bfloat16_is_packed())
        torch.testing.assert_close(swapped.embed(TEXTS), as_it_is.embed(TEXTS), rtol=tolerance, atol=tolerance)


def bfloat16_is_packed() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def test_dense_layers_stand_behind_the_pooling(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = make_tiny_encoder("bert", tmp_path)
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "2_Dense").mkdir()
    settings = {"in_features": 64, "out_features": 8, "activation_function": "torch.nn.modules.activation.Tanh"}
    (folder / "2_Dense" / "config.json").write_text(json.dumps(settings))
    weights = {"linear.weight": torch.randn(8, 64), "linear.bias": torch.randn(8)}
    save_file(weights, folder / "2_Dense" / "model.safetensors")
    encoder = load(folder)
    assert encoder.info.dimensions == 8
    wanted = (expected(folder) @ weights["linear.weight"].T + weights["linear.bias"]).tanh()
    torch.testing.assert_close(encoder.embed(TEXTS), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "changes", "longest"),
    [("bert", {}, 512), ("roberta", {}, 512 - 259), ("bert", {"max_tokens": 99}, 99)],
)
def test_the_longest_text(model_type: str, changes: dict[str, Any], longest: int, tmp_path: Path) -> None:
    encoder = load(make_tiny_encoder(model_type, tmp_path, **changes))
    assert encoder.info.max_tokens == longest
    assert encoder.embed([[5] * longest]).isfinite().all()


def test_bfloat16_is_close(tmp_path: Path) -> None:
    folder = make_tiny_encoder("bert", tmp_path)
    vectors = load(folder, dtype=Dtype.BFLOAT16).embed(TEXTS)
    assert vectors.dtype == torch.float32
    cosine = torch.nn.functional.cosine_similarity(vectors, expected(folder))
    assert cosine.min() > 0.99


def test_several_shards_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is served by one shard"):
        load(make_tiny_encoder("bert", tmp_path), world_size=2)


def test_a_checkpoint_without_its_weights_is_refused(tmp_path: Path) -> None:
    folder = make_tiny_encoder("bert", tmp_path)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "num_hidden_layers": 3}))
    with pytest.raises(ConfigError, match="lacks 16 weights"):
        load(folder)
