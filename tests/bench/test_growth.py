"""`bench.growth`: the arithmetic behind the explanation, and a shard that is stepped by hand."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bench.growth import (
    ModelSize,
    Point,
    Shard,
    Timing,
    explain,
    markdown,
    measure_decodes,
    measure_prefills,
    plot,
    shard_process,
)
from transformers import LlamaConfig, LlamaForCausalLM

SIZE = ModelSize(layers=2, hidden=16, heads=4, kv_heads=2, head_dim=4, intermediate=32, vocabulary=100)


def point(batch: int, tokens: int, total_ms: float) -> Point:
    return Point(batch=batch, tokens=tokens, timing=Timing(total_ms, 0, total_ms, total_ms + 1), steps=3)


def test_weights_are_those_of_the_model() -> None:
    config = LlamaConfig(
        num_hidden_layers=SIZE.layers,
        hidden_size=SIZE.hidden,
        num_attention_heads=SIZE.heads,
        num_key_value_heads=SIZE.kv_heads,
        intermediate_size=SIZE.intermediate,
        vocab_size=SIZE.vocabulary,
        tie_word_embeddings=True,
    )
    products = [p for p in LlamaForCausalLM(config).parameters() if p.ndim == 2]
    assert SIZE.layer_weights + SIZE.head_weights == sum(p.numel() for p in products)
    assert ModelSize.of(config.to_dict()) == SIZE


def test_attention_of_a_prompt_is_half_a_square() -> None:
    without_attention = 2 * SIZE.layer_weights * 3 + 2 * SIZE.head_weights
    pairs = torch.ones(3, 3).tril().sum().item()
    # Twice a product of head_dim for each pair, head and layer: scores and values; two operations in a product.
    assert SIZE.prefill_flops(3) - without_attention == 2 * 2 * 4 * 4 * 2 * pairs


def test_the_fit_finds_what_the_times_were_made_of() -> None:
    decodes = [point(b, n, 10 + 0.5 * b + 0.02 * b * n / 1000) for b in (1, 8, 64) for n in (128, 4096)]
    prefills = [point(1, n, 5 + 200 * n / 1000 + 8 * (n / 1000) ** 2) for n in (64, 512, 2048, 4096)]
    found = explain(decodes, prefills, SIZE, bandwidth=10e9)
    assert found["decode_ms_per_step"] == pytest.approx(10)
    assert found["decode_ms_per_sequence"] == pytest.approx(0.5)
    assert found["decode_ms_per_1000_context_tokens"] == pytest.approx(0.02)
    # 2 layers x 2 heads x 4 x (key and value) x 2 bytes = 64 bytes a token, 1,000 of them in 20 us.
    assert found["kv_read_gb_per_s"] == pytest.approx(3.2)
    assert found["kv_read_share_of_bandwidth"] == pytest.approx(0.32)
    assert [found[f"prefill_ms_per_{what}"] for what in ("prompt", "1000_tokens", "1000_tokens_squared")] == [5, 200, 8]


@pytest.mark.slow
def test_a_shard_is_stepped_and_reported(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    with shard_process(tiny_model("llama")) as url:
        shard = Shard(url, batch=2, context=48)
        shard.fill_cache(SIZE.slots_per_page)
        decodes = measure_decodes(shard, [1, 2], [16, 32], rounds=2, steps=2)
        prefills = measure_prefills(shard, [8, 16, 32], rounds=2)
    assert [(one.batch, one.tokens, one.steps) for one in decodes] == [(1, 16, 4), (2, 16, 4), (1, 32, 4), (2, 32, 4)]
    assert [(one.tokens, one.steps) for one in prefills] == [(8, 2), (16, 2), (32, 2)]
    assert all(0 < one.timing.total_ms <= one.timing.round_trip_ms for one in [*decodes, *prefills])
    run = {
        "command": "python tests/bench/growth.py",
        "model": "a tiny model",
        "version": "1",
        "hardware": {"cpu": "a CPU", "cores": 2, "instructions": ["avx2"], "memory_gib": 24},
        "explained": explain(decodes, prefills, SIZE, bandwidth=10e9),
        "decodes": [{"batch": o.batch, "tokens": o.tokens, "timing": vars_of(o.timing)} for o in decodes],
        "prefills": [{"batch": o.batch, "tokens": o.tokens, "timing": vars_of(o.timing)} for o in prefills],
    }
    text = markdown(run)
    assert "| decode, ms a step: batch | context 16 | context 32 |" in text
    plot(run, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def vars_of(timing: Timing) -> dict[str, float]:
    return {"total_ms": timing.total_ms, "round_trip_ms": timing.round_trip_ms}
