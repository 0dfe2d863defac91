"""The promise: greedy float32 tokens equal the library's ``generate()``, however the work is cut and mixed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import paged_driver
import pytest
import tiny_models
from text_generation_server.config import ShardConfig
from text_generation_server.model.loader import load_model
from text_generation_server.model.swaps.table import NAMES
from text_generation_server.model.transformers_runner import TransformersRunner

MAX_NEW_TOKENS = 12
PROMPTS = paged_driver.random_prompts(16)
LONG_PROMPTS = paged_driver.random_prompts(6, lengths=(150, 20, 95))
OTHERS = (
    "phi", "gemma", "opt", "olmo", "olmo3", "olmoe", "qwen2_moe", "smollm3", "ernie4_5", "ernie4_5_moe", "glm", "glm4",
    "glm4_moe", "exaone4", "helium", "nemotron", "persimmon", "gpt_bigcode", "gpt_oss", "deepseek_v2", "deepseek_v3",
    "llama4_text", "granitemoe", "granitemoeshared", "granitemoehybrid", "phimoe", "cohere2", "arcee", "seed_oss",
    "hunyuan_v1_dense", "hunyuan_v1_moe", "bitnet", "apertus", "ministral", "ministral3", "dots1", "vaultgemma",
    "nanochat", "jetmoe", "biogpt", "flex_olmo", "afmoe", "minimax_m2", "longcat_flash", "solar_open", "ctrl",
    "gemma3n_text", "dbrx",
)  # fmt: skip
QUICK = ("llama", "gemma2", "gpt2", "qwen3_moe")
"""Between them: every swap and none, sliding windows, capped scores, learnt positions, experts, norms of heads."""
TYPES = [
    pytest.param(model_type, marks=() if model_type in QUICK else pytest.mark.slow)
    for model_type in (*tiny_models.PROMISED, *OTHERS)
]

MakeModel = Callable[..., Path]


@functools.cache
def expected(folder: Path, *, long: bool = False) -> list[list[int]]:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    prompts = LONG_PROMPTS if long else PROMPTS
    return paged_driver.generated(model, prompts, max_new_tokens=MAX_NEW_TOKENS, eos_ids=[tiny_models.EOS_ID])


@functools.cache
def runner(folder: Path, *, swaps: bool = True, without: str = "") -> TransformersRunner:
    config = ShardConfig(model_id="tiny", uds_path=Path("unused"), swaps=swaps)
    return load_model(config, folder, without_swaps=[without] if without else [])


def served(model: TransformersRunner, prompts: list[list[int]], *, chunk_tokens: int = 1 << 30) -> list[list[int]]:
    return paged_driver.greedy(
        model,
        prompts,
        max_new_tokens=MAX_NEW_TOKENS,
        eos_ids=model.info.eos_token_ids,
        arrive_within=12,
        chunk_tokens=chunk_tokens,
    )


@pytest.mark.parametrize("model_type", TYPES)
def test_tokens_equal_generate(model_type: str, tiny_model: MakeModel) -> None:
    folder = tiny_model(model_type)
    reference = expected(folder)
    assert len({tuple(tokens) for tokens in reference}) > 4, "the model repeats itself: it would hide mistakes"
    swapped, plain = runner(folder), runner(folder, swaps=False)
    assert served(swapped, PROMPTS) == reference, "a batch of 16 that arrive at random"
    assert [served(swapped, [prompt])[0] for prompt in PROMPTS[:5]] == reference[:5], "alone"
    assert served(swapped, PROMPTS, chunk_tokens=16) == reference, "chunks of 16"
    assert served(plain, PROMPTS, chunk_tokens=16) == reference, "chunks of 16, without swaps"
    assert served(plain, PROMPTS) == reference, "a batch of 16, without swaps"


@pytest.mark.parametrize(
    "model_type", ["llama", *(pytest.param(t, marks=pytest.mark.slow) for t in ("qwen3", "stablelm"))]
)
@pytest.mark.parametrize("swap", NAMES)
def test_tokens_are_the_same_without_one_swap(model_type: str, swap: str, tiny_model: MakeModel) -> None:
    folder = tiny_model(model_type)
    assert served(runner(folder, without=swap), PROMPTS) == expected(folder)


@pytest.mark.parametrize("floor", [8, 100])
def test_llama_4_scales_queries_by_position_whatever_they_are_packed_with(floor: int, tiny_model: MakeModel) -> None:
    """Within the probe's tokens, and beyond them."""
    folder = tiny_model("llama4_text", floor_scale=floor, attn_scale=5.0)
    reference = expected(folder, long=True)
    for model in (runner(folder), runner(folder, swaps=False)):
        assert served(model, LONG_PROMPTS) == reference
        assert served(model, LONG_PROMPTS, chunk_tokens=64) == reference
