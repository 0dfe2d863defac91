"""Two ranks over gloo give the tokens of one, and what cannot be split is refused before anything is read."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import paged_driver
import pytest
import tiny_models
import torch
from text_generation_server import distributed
from text_generation_server.config import ConfigError, ShardConfig
from text_generation_server.model.footprint import survey
from text_generation_server.model.loader import load_model
from text_generation_server.model.parallel import shard_starts
from two_ranks import MAX_NEW_TOKENS, PROMPTS, shard_config, two_ranks

MakeModel = Callable[..., Path]
SLOW_TYPES = (
    "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "granite", "starcoder2", "phi", "gemma",
    "deepseek_v2", "deepseek_v3", "llama4_text", "qwen2_moe", "glm4", "cohere2", "nemotron",
)  # fmt: skip


def check(names: tuple[str, ...], tiny_model: MakeModel) -> None:
    import transformers

    folders = {name: tiny_model(name) for name in names}
    results = two_ranks(folders)
    for name, folder in folders.items():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        expected = paged_driver.generated(model, PROMPTS, max_new_tokens=MAX_NEW_TOKENS, eos_ids=[tiny_models.EOS_ID])
        planned = survey(shard_config(0, 0), folder, "cpu").sizes
        for rank in range(2):
            tokens, kv_bytes, weight_bytes = results[rank, name]
            assert tokens == expected, f"{name} on rank {rank}"
            assert kv_bytes == planned.kv_bytes_per_token, f"{name} on rank {rank}"
            # Kernels keep the small weights of norms in float32 as well.
            assert weight_bytes == pytest.approx(planned.weight_bytes, rel=0.03), f"{name} on rank {rank}"


@pytest.mark.slow
def test_two_ranks_give_the_tokens_of_one(tiny_model: MakeModel) -> None:
    check(("llama", "phi3", "qwen3_moe", "gpt_neox", "mixtral"), tiny_model)


@pytest.mark.slow
def test_two_ranks_give_the_tokens_of_one_for_many_types(tiny_model: MakeModel) -> None:
    check(SLOW_TYPES, tiny_model)


@pytest.mark.slow
def test_a_rank_caches_its_own_heads_only(tiny_model: MakeModel) -> None:
    folder = tiny_model("llama")
    alone = load_model(ShardConfig(model_id="tiny", uds_path=Path("unused")), folder).info.kv_bytes_per_token
    assert {kv_bytes for _, kv_bytes, _ in two_ranks({"llama": folder}).values()} == {alone // 2}


@pytest.mark.parametrize(
    ("model_type", "world_size", "reason"),
    [
        ("gpt2", 2, "transformers has no tensor parallel plan for it; use --num-shard 1"),
        ("llama", 4, r"it has 2 key/value heads; use --num-shard 1 or 2"),
        ("llama", 3, r"it has 4 attention heads; use --num-shard 1 or 2"),
    ],
)
def test_what_cannot_be_split_is_refused(model_type: str, world_size: int, reason: str, tiny_model: MakeModel) -> None:
    group = distributed.Group(0, world_size, torch.device("cpu"))
    with pytest.raises(ConfigError, match=f"`{model_type}` cannot be split over {world_size} shards: {reason}"):
        load_model(shard_config(0, 1, world_size), tiny_model(model_type), group)


def test_slices_are_equal_but_for_the_last() -> None:
    assert shard_starts(10, 4) == [0, 3, 6, 9, 10]
    assert shard_starts(2, 4) == [0, 1, 2, 2, 2]


def test_launches_that_were_given_one_port_do_not_meet() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

    def store(rank: int, nonce: str) -> Any:
        config = shard_config(rank, port, 2)
        return distributed._meeting_place(dataclasses.replace(config, launcher_nonce=nonce))

    leader = store(0, "one")
    leader.set("leader", "here")
    assert store(1, "one").check(["leader"])
    stranger = store(1, "two")
    assert not stranger.check(["leader"])
    stranger.set("stranger", "here")
    assert not leader.check(["stranger"])


def test_one_shard_opens_no_port() -> None:
    group = distributed.join(ShardConfig(model_id="tiny", uds_path=Path("unused")))
    assert group.world_size == 1
    assert not torch.distributed.is_initialized()
    value = torch.ones(2)
    assert group.all_reduce(value) is value
    assert group.broadcast(value) is value
    group.close()
