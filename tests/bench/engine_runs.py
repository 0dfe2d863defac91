"""Our engine without router and network: some sequences at once, prompts in and tokens out, and what each step took."""

import random
import sys
import time
from array import array
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from text_generation_server.config import Dtype, ShardConfig
from text_generation_server.distributed import Group
from text_generation_server.engine.cuda_graphs import with_graphs
from text_generation_server.engine.engine import Engine, compute_thread
from text_generation_server.engine.memory import KVPlan, WarmupLimits
from text_generation_server.engine.steps import Chunk, NewSequence, Step, StepResult
from text_generation_server.generation.parameters import SamplingParameters
from text_generation_server.model.loader import load_model
from text_generation_server.model.transformers_runner import TransformersRunner

PREFILL_TOKENS = 4096
"""Of prompts in one step, at most: the router's default on a GPU."""
IN_FLIGHT = 2
"""Steps: one computes, one is queued, as the router does."""


@dataclass(frozen=True, slots=True)
class Timed:
    result: StepResult
    at_s: float
    """When it was delivered, on the clock of ``time.perf_counter``."""


class Engines:
    """An engine over a loaded model, and the numbers of its steps."""

    def __init__(self, engine: Engine, runner: TransformersRunner) -> None:
        self.engine = engine
        self.runner = runner
        self._epoch = 0

    def generate(self, count: int, prompt_tokens: int, output_tokens: int, seed: int) -> list[Timed]:
        """``count`` greedy sequences that begin together, each with a random prompt of its own."""
        self._epoch += 1
        self.engine.clear(self._epoch).result()
        rng = random.Random(seed)
        vocab = self.runner.info.vocab_size
        each = blocks_of(prompt_tokens + output_tokens, self.runner.block_size)
        waiting = deque(
            NewSequence(
                index,
                array("q", [rng.randrange(1, vocab) for _ in range(prompt_tokens)]),
                prompt_tokens,
                blocks=list(range(1 + index * each, 1 + (index + 1) * each)),
                num_cached_tokens=0,
                sampling=SamplingParameters(),
            )
            for index in range(count)
        )
        chunked: deque[tuple[int, int]] = deque()  # sequences whose prompt is under way, and what is left of it
        left: dict[int, int] = {}  # tokens that sequences still get
        flying: deque[Future[Timed]] = deque()
        timed: list[Timed] = []
        step_id = 0
        while waiting or chunked or left or flying:
            if waiting or chunked or left:
                step_id += 1
                flying.append(self._submit(self._step(step_id, waiting, chunked, left, prompt_tokens, output_tokens)))
            if len(flying) >= IN_FLIGHT or not (waiting or chunked or left):
                timed.append(flying.popleft().result())
                assert timed[-1].result.failure is None, timed[-1].result.failure
        return timed

    def _step(
        self,
        step_id: int,
        waiting: deque[NewSequence],
        chunked: deque[tuple[int, int]],
        left: dict[int, int],
        prompt_tokens: int,
        output_tokens: int,
    ) -> Step:
        """Decode rows of all that have begun, and prompts as far as they fit."""
        decodes = list(left)
        for index in decodes:
            left[index] -= 1
            if not left[index]:
                del left[index]
        budget, chunks, new = PREFILL_TOKENS, [], []
        while budget and (chunked or waiting):
            if not chunked:
                new.append(waiting.popleft())
                chunked.append((new[-1].sequence_id, prompt_tokens))
            index, remaining = chunked.popleft()
            size = min(budget, remaining)
            budget -= size
            chunks.append(Chunk(index, size))
            if size < remaining:
                chunked.appendleft((index, remaining - size))
            elif output_tokens > 1:
                left[index] = output_tokens - 1
        return Step(self._epoch, step_id, new_sequences=new, chunks=chunks, decodes=decodes)

    def _submit(self, step: Step) -> "Future[Timed]":
        future: Future[Timed] = Future()
        self.engine.submit(step, lambda result: future.set_result(Timed(result, time.perf_counter())))
        return future


def blocks_of(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)


@contextmanager
def engine_over(
    folder: Path, *, device: str, dtype: Dtype, max_tokens: int, max_sequences: int, cuda_graphs: tuple[int, ...],
    attention: str | None,
) -> Iterator[Engines]:  # fmt: skip
    """The model in ``folder`` with room for so many sequences of so many tokens each."""
    config = ShardConfig(
        model_id="bench", uds_path=Path("unused"), dtype=dtype, attention=attention, cuda_graphs=cuda_graphs
    )
    group = Group(rank=0, world_size=1, device=torch.device(device))
    compute = compute_thread()
    runner = compute.submit(load_model, config, folder, group).result()
    num_blocks = max_sequences * blocks_of(max_tokens, config.block_size)
    engine = Engine(
        with_graphs(runner, cuda_graphs, max_total_tokens=max_tokens),
        lambda runner, limits: KVPlan(num_blocks=num_blocks, derivation="fixed"),
        block_size=config.block_size,
        compute=compute,
    )
    engine.start()
    engine.warm_up(WarmupLimits()).result()
    try:
        yield Engines(engine, runner)
    finally:
        assert engine.stop(60)
        compute.shutdown()
