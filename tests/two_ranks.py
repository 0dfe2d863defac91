"""A model run by two ranks over gloo, each in its own process. A module of its own: the processes import it.

As a program it is ``text-generation-server`` for a model that breaks in the second step of rank 1.
"""

from __future__ import annotations

import queue
import socket
import traceback
from pathlib import Path
from typing import Any

import paged_driver
import torch
import torch.multiprocessing as multiprocessing
from text_generation_server import cli, distributed, shard
from text_generation_server.config import ConfigError, ShardConfig
from text_generation_server.engine.inputs import ForwardInputs
from text_generation_server.model.loader import load_model
from text_generation_server.model.transformers_runner import TransformersRunner
from torch import Tensor

PROMPTS = paged_driver.random_prompts(6)
MAX_NEW_TOKENS = 12


def shard_config(rank: int, port: int, world_size: int = 2) -> ShardConfig:
    return ShardConfig(model_id="tiny", uds_path=Path("unused"), rank=rank, world_size=world_size, master_port=port)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def run_rank(rank: int, port: int, folders: dict[str, Path], answers: Any) -> None:
    torch.set_num_threads(1)
    config = shard_config(rank, port)
    group = distributed.join(config)
    for name, folder in folders.items():
        try:
            runner = load_model(config, folder, group)
            tokens = paged_driver.greedy(
                runner, PROMPTS, max_new_tokens=MAX_NEW_TOKENS, eos_ids=runner.info.eos_token_ids, arrive_within=6,
                chunk_tokens=16,
            )  # fmt: skip
            answers.put((rank, name, tokens, runner.info.kv_bytes_per_token, weight_bytes(runner.model)))
        except ConfigError as error:
            answers.put((rank, name, str(error), 0, 0))
        except Exception:
            answers.put((rank, name, traceback.format_exc(), 0, 0))
            raise
    group.close()


def weight_bytes(model: torch.nn.Module) -> int:
    return sum({id(each): each.nbytes for each in [*model.parameters(), *model.buffers()]}.values())


def two_ranks(folders: dict[str, Path]) -> dict[tuple[int, str], tuple[Any, int, int]]:
    """By rank and name: tokens, or an error's text; bytes of KV cache for each token; bytes of weights."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    port = free_port()
    ranks = [context.Process(target=run_rank, args=(rank, port, folders, answers)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    results: dict[tuple[int, str], tuple[Any, int, int]] = {}
    while len(results) < 2 * len(folders):
        try:
            rank_index, name, tokens, kv_bytes, weights = answers.get(timeout=1)
        except queue.Empty:
            assert all(rank.exitcode in (None, 0) for rank in ranks), "a rank died"
            continue
        results[rank_index, name] = (tokens, kv_bytes, weights)
    for rank in ranks:
        rank.join(timeout=30)
    return results


def load_broken(config: ShardConfig, *arguments: Any) -> TransformersRunner:
    runner = load_model(config, *arguments)
    forward, num_steps = runner.forward, 0

    def break_down(inputs: ForwardInputs) -> Tensor:
        nonlocal num_steps
        num_steps += 1
        if num_steps == 2:
            raise ValueError("the model broke down\nin many lines")
        return forward(inputs)

    if config.rank == 1:
        runner.forward = break_down  # type: ignore[method-assign]
    return runner


if __name__ == "__main__":
    shard.load_model = load_broken  # type: ignore[attr-defined, assignment]
    cli.app()
