"""The division of a device's memory, in numbers that a person can check."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_generation_server.attention.torch_paged import SCRATCH_BYTES
from text_generation_server.device_memory import DeviceMemory
from text_generation_server.engine.executor import MAX_PROMPT_LOGITS_ROWS
from text_generation_server.engine.memory import (
    CONTEXT_COPIES,
    GRAPH_BYTES,
    PROMPT_LOGPROBS_COPIES,
    DoesNotFit,
    MemoryPlan,
    ModelSizes,
    WarmupLimits,
    plan_memory,
)

KIB, MIB, GIB = 2**10, 2**20, 2**30
SIZES = ModelSizes(
    weight_bytes=0,
    kv_bytes_per_token=KIB,
    layer_bytes_per_token=0,
    step_bytes_per_token=KIB,
    logits_width=1000,
    max_position_embeddings=4096,
)
LARGE = dataclasses.replace(SIZES, weight_bytes=16 * GIB, weights="in bfloat16")


def device(usable_bytes: int, *, kind: str = "cuda", share: float = 1.0, fraction: float = 1.0) -> DeviceMemory:
    return DeviceMemory(
        kind=kind, name=kind, usable_bytes=usable_bytes, derivation="1 GiB", share=share, fraction=fraction
    )


def step_bytes(limits: WarmupLimits) -> int:
    return plan_memory(SIZES, device(0), limits, block_size=16).step_bytes


def plan(limits: WarmupLimits, cache_bytes: int = GIB) -> MemoryPlan:
    """With ``cache_bytes`` beside what the largest step needs."""
    return plan_memory(SIZES, device(step_bytes(limits) + cache_bytes), limits, block_size=16)


@pytest.mark.parametrize(
    ("limits", "cache_bytes", "num_blocks"),
    [
        pytest.param(WarmupLimits(), 100 * 16 * KIB, 99, id="all that fit, but for the padding block"),
        pytest.param(WarmupLimits(max_batch_total_tokens=161), GIB, 11, id="exactly as many as asked, rounded up"),
        pytest.param(
            WarmupLimits(max_concurrent_requests=3, max_total_tokens=17), GIB, 6, id="each request takes whole blocks"
        ),
        pytest.param(WarmupLimits(max_concurrent_requests=2), GIB, 512, id="unset, a request may use all positions"),
        pytest.param(
            WarmupLimits(max_concurrent_requests=1000, max_total_tokens=64), 40 * 16 * KIB, 39, id="what fits is less"
        ),
    ],
)
def test_the_number_of_blocks(limits: WarmupLimits, cache_bytes: int, num_blocks: int) -> None:
    made = plan(limits, cache_bytes).require_fit()
    assert made.num_blocks == made.kv.num_blocks == num_blocks
    assert made.cache_bytes == (num_blocks + 1) * 16 * KIB
    assert made.cache_tokens == num_blocks * 16
    size = num_blocks * 16 * KIB
    assert made.kv.derivation.startswith(f"{size / MIB:.1f} MiB: " if size >= MIB else f"{size / KIB:.1f} KiB: ")


@pytest.mark.parametrize(
    ("limits", "flags"),
    [
        (WarmupLimits(max_batch_total_tokens=1600), ["`--max-batch-total-tokens 1600`", "144 or less"]),
        (WarmupLimits(max_total_tokens=200), ["`--max-total-tokens 200`", "144 or less"]),
    ],
)
def test_too_little_memory_names_the_flag_and_the_numbers(limits: WarmupLimits, flags: list[str]) -> None:
    with pytest.raises(DoesNotFit) as error:
        plan(limits, 10 * 16 * KIB).require_fit()
    assert all(text in str(error.value) for text in flags)


def test_a_prefill_that_is_too_large_names_one_that_fits() -> None:
    limits = WarmupLimits(max_batch_prefill_tokens=4096, max_concurrent_requests=8)
    made = plan(limits, -MIB)
    assert "not one block of KV cache fits" in made.problem
    fitting = 4096 - 1024 - 2 * 16  # 1 KiB a token
    assert f"decrease `--max-batch-prefill-tokens` to {fitting} or less" in made.problem
    usable = made.device
    again = WarmupLimits(max_batch_prefill_tokens=fitting, max_concurrent_requests=8)
    assert plan_memory(SIZES, usable, again, block_size=16).num_blocks >= 1


def test_a_batch_that_is_too_large_names_the_requests() -> None:
    made = plan_memory(SIZES, device(SCRATCH_BYTES), WarmupLimits(max_concurrent_requests=1000), block_size=16)
    assert "`--max-concurrent-requests`" in made.problem


@pytest.mark.parametrize(
    ("weights", "where", "remedies"),
    [
        pytest.param("in bfloat16", device(GIB), ["`--num-shard`", "a larger GPU"], id="a GPU"),
        pytest.param("in bfloat16", device(GIB, fraction=0.5), ["raise `--cuda-memory-fraction`"], id="a part of one"),
        pytest.param("in float32", device(GIB), ["`--dtype bfloat16` halves them"], id="float32"),
        pytest.param("in bfloat16", device(GIB, kind="cpu"), ["free memory", "a smaller model"], id="a CPU"),
    ],
)
def test_weights_that_do_not_fit(weights: str, where: DeviceMemory, remedies: list[str]) -> None:
    made = plan_memory(dataclasses.replace(LARGE, weights=weights), where, WarmupLimits(), block_size=16)
    assert made.problem.startswith(f"the weights do not fit: 16.00 GiB {weights}, where there are 1 GiB; ")
    assert all(remedy in made.problem for remedy in remedies)
    assert "\n" not in made.problem


def test_weights_and_the_part_kept_free_come_first() -> None:
    made = plan_memory(LARGE, device(24 * GIB, share=0.5), WarmupLimits(), block_size=16).require_fit()
    assert made.kept_free_bytes == 4 * GIB
    assert made.cache_bytes <= 4 * GIB - made.step_bytes < made.cache_bytes + 16 * KIB
    assert "16.00 GiB for the weights in bfloat16" in made.kv.derivation
    assert "4.00 GiB (50% of the rest) kept free" in made.kv.derivation


def test_the_largest_step_is_reserved() -> None:
    few = WarmupLimits(max_batch_prefill_tokens=1000, max_concurrent_requests=4)
    made = plan_memory(SIZES, device(GIB), few, block_size=16)
    assert made.activation_bytes == 1000 * KIB
    assert made.attention_bytes == SCRATCH_BYTES
    assert made.prompt_logprobs_bytes == made.graph_bytes == 0
    more = plan_memory(SIZES, device(GIB), few, block_size=16, prefill_logprobs=True)
    assert more.prompt_logprobs_bytes == MAX_PROMPT_LOGITS_ROWS * 4000 * PROMPT_LOGPROBS_COPIES
    twice = dataclasses.replace(few, max_concurrent_requests=8)
    assert plan_memory(SIZES, device(GIB), twice, block_size=16).logits_bytes == 2 * made.logits_bytes


def test_cuda_graphs_share_a_pool_and_keep_their_outputs() -> None:
    made = plan_memory(SIZES, device(GIB), WarmupLimits(), block_size=16, graph_batch_sizes=(1, 8))
    assert made.graph_bytes == 2 * GRAPH_BYTES + 9 * 4000 + 8 * KIB


def test_a_cache_in_one_byte_holds_twice_as_many_tokens() -> None:
    half = dataclasses.replace(SIZES, kv_bytes_per_token=KIB // 2)
    limits = WarmupLimits()
    whole = plan_memory(SIZES, device(GIB), limits, block_size=16)
    doubled = plan_memory(half, device(GIB), limits, block_size=16)
    assert (doubled.num_blocks + 1) // 2 == whole.num_blocks + 1


@pytest.mark.parametrize("positions", [0, 1000, 10**6])
def test_the_longest_sequence_has_room_for_its_copies(positions: int) -> None:
    sizes = dataclasses.replace(SIZES, layer_bytes_per_token=KIB // 2, max_position_embeddings=positions)
    made = plan_memory(sizes, device(GIB), WarmupLimits(), block_size=16).require_fit()
    assert made.context == min(positions or 2**62, made.cache_tokens)
    copies = CONTEXT_COPIES * KIB // 2 * made.context
    assert made.attention_bytes == SCRATCH_BYTES + copies
    left = GIB - made.step_bytes - made.cache_bytes
    assert 0 <= left < 2 * 16 * 2 * KIB


def test_a_cache_that_only_the_loaded_model_knows() -> None:
    unknown = dataclasses.replace(SIZES, kv_bytes_per_token=None)
    made = plan_memory(unknown, device(GIB), WarmupLimits(), block_size=16)
    assert (made.problem, made.num_blocks, made.cache_bytes, made.context) == ("", 0, 0, 0)
    assert "largest step" in plan_memory(unknown, device(MIB), WarmupLimits(), block_size=16).problem


def test_concurrency_counts_whole_blocks() -> None:
    made = plan(WarmupLimits(max_batch_total_tokens=160))
    assert [made.concurrency(tokens) for tokens in (1, 16, 17, 160, 161)] == [10, 10, 5, 1, 0]


@given(
    total=st.integers(0, 10_000),
    requests=st.integers(0, 100),
    each=st.integers(0, 3000),
    positions=st.integers(0, 5000),
    layer_bytes=st.integers(0, 2000),
    cache_bytes=st.integers(-(2**22), 2**26),
)
def test_a_plan_fits_or_is_refused(
    total: int, requests: int, each: int, positions: int, layer_bytes: int, cache_bytes: int
) -> None:
    limits = WarmupLimits(max_batch_total_tokens=total, max_concurrent_requests=requests, max_total_tokens=each)
    sizes = dataclasses.replace(SIZES, layer_bytes_per_token=layer_bytes, max_position_embeddings=positions)
    usable = max(0, step_bytes(limits) + cache_bytes)
    made = plan_memory(sizes, device(usable), limits, block_size=16)
    if made.problem:
        return
    assert made.cache_bytes + made.step_bytes <= usable
    assert made.num_blocks * 16 >= max(total, each, 1)
    assert made.context >= min(each or positions or made.cache_tokens, made.cache_tokens)
