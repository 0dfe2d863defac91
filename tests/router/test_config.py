"""Flags + what the shards say -> the limits served by, with TGI's words where they contradict each other."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from text_generation_router.config import ConfigError, RouterFlags, resolve, warmup_limits


@dataclass
class Model:
    device_type: str = "cuda"
    block_size: int = 16
    vocab_size: int = 1000
    max_position_embeddings: int = 2048


def test_defaults_are_what_fits() -> None:
    config = resolve(RouterFlags(), Model(), num_blocks=100)
    assert config.limits.max_total_tokens == 1600
    assert config.limits.max_input_tokens == 1599
    assert config.max_batch_total_tokens == 1600
    assert config.max_batch_prefill_tokens == 1600, "a step cannot hold more than the cache"
    assert config.max_batch_size is None


def test_the_models_positions_are_a_limit_as_well() -> None:
    config = resolve(RouterFlags(), Model(), num_blocks=10_000)
    assert (config.limits.max_input_tokens, config.limits.max_total_tokens) == (2047, 2048)
    assert config.max_batch_prefill_tokens == 4096
    unbounded = resolve(RouterFlags(), Model(max_position_embeddings=0), num_blocks=10)
    assert unbounded.limits.max_total_tokens == 160


def test_the_tokenizers_length_is_a_limit_unless_one_is_given() -> None:
    assert resolve(RouterFlags(), Model(), 10_000, model_max_length=512).limits.max_total_tokens == 512
    assert resolve(RouterFlags(), Model(), 10_000, model_max_length=10**30).limits.max_total_tokens == 2048
    flags = RouterFlags(max_total_tokens=600)
    assert resolve(flags, Model(), 10_000, model_max_length=512).limits.max_total_tokens == 600


def test_nobody_can_ask_for_more_likely_tokens_than_there_are() -> None:
    assert resolve(RouterFlags(max_top_n_tokens=5000), Model(), 100).limits.max_top_n_tokens == 1000


def test_the_shards_plan_for_the_largest_step() -> None:
    assert warmup_limits(RouterFlags(max_batch_prefill_tokens=16), Model()).max_batch_prefill_tokens == 129


def test_the_prefill_budget_leaves_room_beside_the_decode_rows() -> None:
    flags = RouterFlags(max_concurrent_requests=5000)
    assert warmup_limits(flags, Model()).max_batch_prefill_tokens == 5016
    assert warmup_limits(replace(flags, max_batch_size=100), Model()).max_batch_prefill_tokens == 4096
    assert resolve(replace(flags, max_batch_prefill_tokens=64), Model(), 10_000).max_batch_prefill_tokens == 64


def test_steps_are_shorter_on_a_cpu_unless_asked_otherwise() -> None:
    model = Model(device_type="cpu")
    assert warmup_limits(RouterFlags(), model).max_batch_prefill_tokens == 512
    assert warmup_limits(RouterFlags(max_batch_prefill_tokens=4096), model).max_batch_prefill_tokens == 4096


def test_what_is_given_is_obeyed() -> None:
    flags = RouterFlags(
        max_input_tokens=10, max_total_tokens=20, max_batch_prefill_tokens=30, max_batch_total_tokens=160,
        max_batch_size=5, max_best_of=7, max_stop_sequences=8, max_top_n_tokens=9, disable_grammar_support=True,
    )  # fmt: skip
    warmup = warmup_limits(flags, Model())
    assert (warmup.max_batch_prefill_tokens, warmup.max_batch_total_tokens) == (30, 160)
    assert (warmup.max_batch_size, warmup.max_total_tokens, warmup.max_concurrent_requests) == (5, 20, 128)
    config = resolve(flags, Model(), num_blocks=10)
    limits = config.limits
    assert (limits.max_input_tokens, limits.max_total_tokens, config.max_batch_prefill_tokens) == (10, 20, 30)
    assert (limits.max_best_of, limits.max_stop_sequences, limits.max_top_n_tokens) == (7, 8, 9)
    assert (limits.vocab_size, limits.disable_grammar_support) == (1000, True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (RouterFlags(validation_workers=0), "`validation_workers` must be > 0"),
        (RouterFlags(max_batch_size=0), "`max_batch_size` must be > 0"),
        (RouterFlags(max_concurrent_requests=0), "`max_concurrent_requests` must be > 0"),
        (RouterFlags(max_batch_prefill_tokens=0), "`max_batch_prefill_tokens` must be > 0"),
        (RouterFlags(max_batch_total_tokens=0), "`max_batch_total_tokens` must be > 0"),
        (
            RouterFlags(max_input_tokens=20, max_total_tokens=20),
            "`max_input_tokens` must be < `max_total_tokens`. Given: 20 and 20",
        ),
        (
            RouterFlags(max_batch_prefill_tokens=21, max_batch_total_tokens=20),
            "`max_batch_prefill_tokens` must be <= `max_batch_total_tokens`. Given: 21 and 20",
        ),
        (
            RouterFlags(max_total_tokens=21, max_batch_total_tokens=20),
            "`max_total_tokens` must be <= `max_batch_total_tokens`. Given: 21 and 20",
        ),
        (
            RouterFlags(max_total_tokens=4096),
            "`max_total_tokens` must be <= the 2048 positions that the model was made for. Given: 4096",
        ),
    ],
)
def test_contradictions_are_found_before_the_warm_up(flags: RouterFlags, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        warmup_limits(flags, Model())
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            RouterFlags(max_total_tokens=2000),
            "`max_total_tokens` must be <= `max_batch_total_tokens`. Given: 2000 and 160",
        ),
        (
            RouterFlags(max_batch_prefill_tokens=161),
            "`max_batch_prefill_tokens` must be <= `max_batch_total_tokens`. Given: 161 and 160",
        ),
        (
            RouterFlags(max_input_tokens=160),
            "`max_input_tokens` must be < `max_total_tokens`. Given: 160 and 160",
        ),
    ],
)
def test_what_turns_out_not_to_fit(flags: RouterFlags, message: str) -> None:
    warmup_limits(flags, Model())
    with pytest.raises(ConfigError) as error:
        resolve(flags, Model(), num_blocks=10)
    assert str(error.value) == message


def test_every_limit_says_how_it_came_about() -> None:
    automatic = resolve(RouterFlags(), Model(), num_blocks=100).derivations
    assert automatic == {
        "max_input_tokens": "`max_total_tokens` - 1",
        "max_total_tokens": "all tokens of the KV cache",
        "max_batch_prefill_tokens": "all tokens of the KV cache",
        "max_batch_total_tokens": "100 blocks of 16",
    }
    flags = RouterFlags(
        max_input_tokens=10, max_total_tokens=20, max_batch_prefill_tokens=30, max_batch_total_tokens=160
    )
    given = resolve(flags, Model(), num_blocks=10).derivations
    assert set(given.values()) == {"as given", "as given, in 10 blocks of 16"}
