"""`bench.make_gguf`: the same numbers under other names. What llama.cpp makes of them needs its environment."""

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from bench.make_gguf import (
    FLOAT32,
    converted,
    gguf_name,
    interleave_rotary_rows,
    read_safetensors,
    read_vocabulary,
    widen,
)
from bench.make_model import train_tokenizer
from safetensors.torch import save_file
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

NUM_HEADS, HEAD_DIM, HIDDEN = 3, 8, 5


def rotate_neighbours(vector: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """llama.cpp's rotation: elements 2i and 2i + 1 of `[heads, head_dim]` by angle i."""
    pairs = torch.view_as_complex(vector.reshape(*vector.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def test_interleaved_rows_rotate_by_neighbours_as_the_others_do_by_halves() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, NUM_HEADS * HEAD_DIM, HIDDEN)
    hidden, angles = torch.randn(HIDDEN), torch.randn(HEAD_DIM // 2)
    halves = torch.cat([angles, angles])[None, None]
    heads = [(weight @ hidden).view(1, NUM_HEADS, 1, HEAD_DIM) for weight in (query, key)]
    expected = [rotated[0, :, 0] for rotated in apply_rotary_pos_emb(*heads, halves.cos(), halves.sin())]
    rotated = [
        rotate_neighbours(
            (torch.from_numpy(interleave_rotary_rows(weight.numpy(), NUM_HEADS)) @ hidden).view(NUM_HEADS, HEAD_DIM),
            angles,
        )
        for weight in (query, key)
    ]
    # Attention sees products of queries with keys alone: in whatever order the elements stand.
    torch.testing.assert_close((rotated[0] * rotated[1]).sum(-1), (expected[0] * expected[1]).sum(-1))


def test_rows_stay_within_their_head() -> None:
    rows = interleave_rotary_rows(numpy.arange(8)[:, None], num_heads=2)[:, 0]
    assert rows.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.norm.weight", "output_norm.weight"),
        ("model.layers.11.self_attn.o_proj.weight", "blk.11.attn_output.weight"),
        ("model.layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight"),
    ],
)
def test_names(name: str, expected: str) -> None:
    assert gguf_name(name) == expected


def test_a_tensor_that_no_llama_has_is_refused() -> None:
    with pytest.raises(KeyError, match="q_norm"):
        gguf_name("model.layers.0.self_attn.q_norm.weight")


def test_bfloat16_bits_survive_and_norms_become_float32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved = {
        "model.norm.weight": torch.randn(4, dtype=torch.bfloat16),
        "model.layers.0.mlp.up_proj.weight": torch.randn(6, 4, dtype=torch.bfloat16),
    }
    save_file(saved, tmp_path / "model.safetensors", {"format": "pt"})
    config: dict[str, Any] = {"num_attention_heads": 1, "num_key_value_heads": 1}
    read = dict(read_safetensors(tmp_path / "model.safetensors"))
    assert set(read) == set(saved)
    for name, tensor in saved.items():
        assert numpy.array_equal(widen(read[name]), tensor.float().numpy())
        assert converted(name, read[name], config, FLOAT32).dtype == numpy.float32
    kept = {name: converted(name, values, config, "bfloat16").dtype for name, values in read.items()}
    assert kept == {"model.norm.weight": numpy.float32, "model.layers.0.mlp.up_proj.weight": numpy.uint16}


def test_the_vocabulary_comes_by_id_with_merges_as_text() -> None:
    tokenizer = train_tokenizer(iter(["a short text, a short text"]), vocab_size=280)
    vocabulary = read_vocabulary(json.loads(tokenizer.to_str()))
    assert vocabulary.tokens == [tokenizer.id_to_token(i) for i in range(280)]
    assert vocabulary.is_special[0]
    assert sum(vocabulary.is_special) == 1
    assert vocabulary.is_added[-1], "a spare token is matched whole"
    assert vocabulary.merges
    assert all(merge.replace(" ", "") in vocabulary.tokens for merge in vocabulary.merges)
