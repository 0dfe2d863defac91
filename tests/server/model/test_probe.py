"""What cannot be served is refused at start, in one line that says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from text_generation_server.attention.interface import LayerSpec
from text_generation_server.config import ConfigError, ShardConfig
from text_generation_server.model import bridge, probe
from text_generation_server.model.bridge import Unservable
from text_generation_server.model.loader import load_model

MakeModel = Callable[..., Path]
CONFIG = ShardConfig(model_id="tiny", uds_path=Path("unused"))
OUTSIDE = "its attention does not go through transformers' attention interface"


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("bloom", OUTSIDE),
        ("falcon", OUTSIDE),
        ("gptj", OUTSIDE),
        ("codegen", OUTSIDE),
        ("mpt", OUTSIDE),
        ("mamba", OUTSIDE),
        ("lfm2", "only 1 of its 2 layers use attention through transformers' interface"),
        ("qwen3_next", "only 1 of its 2 layers use attention through transformers' interface"),
        ("diffllama", "a layer attends more than once in a forward pass"),
        ("doge", "its attention mask is neither causal, sliding nor chunked"),
    ],
)
def test_a_type_that_cannot_be_served(model_type: str, reason: str, tiny_model: MakeModel) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_model(CONFIG, tiny_model(model_type))
    assert str(refusal.value).startswith(f"model type `{model_type}` cannot be served: {reason}")
    assert "\n" not in str(refusal.value)


@pytest.fixture
def llama(tiny_model: MakeModel) -> Any:
    import transformers

    bridge.register()
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_model("llama"), attn_implementation="eager").eval()


def record(model: Any) -> list[LayerSpec]:
    return probe.record(model, vocab_size=320, num_layers=2, device=torch.device("cpu"))


def with_arguments(model: Any, **extra: Any) -> None:
    """Make the model's layers hand more arguments to attention."""
    for layer in model.model.layers:
        own = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, own=own, **kwargs: own(*args, **kwargs, **extra)


@pytest.mark.parametrize(
    ("argument", "value", "reason"),
    [
        ("position_bias", torch.zeros(1), "its attention takes `position_bias`, which is not known here"),
        ("is_causal", False, "its attention is not causal"),
        ("sparse_indices", [1], "its attention takes `sparse_indices`"),
    ],
)
def test_an_unknown_attention_argument_is_refused(llama: Any, argument: str, value: object, reason: str) -> None:
    with_arguments(llama, **{argument: value})
    with pytest.raises(Unservable, match=reason):
        record(llama)


def test_an_unknown_argument_that_says_nothing_is_accepted(llama: Any) -> None:
    with_arguments(llama, position_bias=None, cu_seq_lens_q=None)
    assert len(record(llama)) == 2


@pytest.mark.parametrize("change", [lambda mask: mask[..., :], lambda mask: mask + 0], ids=["sliced", "added to"])
def test_a_mask_that_the_model_changes_is_not_taken_for_causal(llama: Any, change: Callable[[Any], Any]) -> None:
    for layer in llama.model.layers:
        own = layer.self_attn.forward
        layer.self_attn.forward = lambda own=own, **given: own(
            **{**given, "attention_mask": change(given["attention_mask"])}
        )
    with pytest.raises(Unservable, match="its attention mask is neither causal, sliding nor chunked"):
        record(llama)


def test_a_model_that_answers_differently_when_packed_is_refused(llama: Any) -> None:
    layers = record(llama)
    expected = probe.reference(llama, layers, vocab_size=320, dtype=torch.float32, device=torch.device("cpu"))
    with pytest.raises(Unservable, match="the path gives other logits"):
        probe.verify(
            lambda inputs: torch.randn(len(inputs.logits_indices_L), 320), expected, block_size=4, what="the path"
        )
    with pytest.raises(Unservable, match="the path gives other logits"):
        probe.verify(
            lambda inputs: torch.full((len(inputs.logits_indices_L), 320), torch.nan),
            expected,
            block_size=4,
            what="the path",
        )


def test_logits_that_are_not_finite_are_refused(llama: Any) -> None:
    layers = record(llama)
    with torch.no_grad():
        llama.model.norm.weight.fill_(torch.inf)
    with pytest.raises(Unservable, match="its logits are not finite; try another --dtype"):
        probe.reference(llama, layers, vocab_size=320, dtype=torch.float32, device=torch.device("cpu"))


def test_what_is_learned_of_each_layer(tiny_model: MakeModel) -> None:
    layers = load_model(CONFIG, tiny_model("gemma3_text")).layers
    assert [layer.window for layer in layers] == [20, 0, 20]
    assert {(layer.query_heads, layer.kv_heads, layer.key_dim, layer.value_dim) for layer in layers} == {(4, 2, 16, 16)}


def test_a_large_window_is_learned_from_the_mask_not_from_tokens(tiny_model: MakeModel) -> None:
    runner = load_model(CONFIG, tiny_model("mistral", sliding_window=4096))
    assert [layer.window for layer in runner.layers] == [4096, 4096]
    assert runner.info.window_size == 4096


def test_every_token_of_the_probe_runs_once() -> None:
    prompts = (torch.arange(40), torch.arange(21))
    rows = [row for step in probe.probe_steps(prompts, 16) for row in step]
    for sequence, prompt in enumerate(prompts):
        mine = [row for row in rows if row.sequence.sequence_id == sequence]
        assert [position for row in mine for position in range(row.start, row.end)] == list(range(len(prompt)))
    used = [block for row in rows for block in row.sequence.block_table]
    assert max(used) <= probe.blocks_needed(16)
    assert 0 not in used
