"""Drives an engine over the fake runner: submits steps, waits for results, and knows what they must be."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager

import torch
from fake_runner import BLOCK_SIZE, FakeRunner, oracle_logits
from text_generation_server.engine.engine import Engine, compute_thread
from text_generation_server.engine.memory import KVPlan, WarmupLimits
from text_generation_server.engine.steps import Chunk, NewSequence, Step, StepResult
from text_generation_server.generation.parameters import SamplingParameters
from text_generation_server.generation.sampler import SamplingRow, sample
from torch import Tensor

GREEDY = SamplingParameters()
NUM_BLOCKS = 64


def prompt(sequence_id: int, length: int) -> list[int]:
    return [(sequence_id * 7 + position * 5) % 50 + 3 for position in range(length)]


def new(
    sequence_id: int,
    token_ids: Sequence[int],
    *,
    blocks: list[int] | None = None,
    num_prompt_tokens: int | None = None,
    num_cached_tokens: int = 0,
    sampling: SamplingParameters = GREEDY,
    top_n_tokens: int = 0,
    prefill_logprobs: bool = False,
    prefill_top_n_tokens: int = 0,
    embeds: bool = False,
) -> NewSequence:
    """A sequence with 8 blocks of its own, which depend on its id."""
    return NewSequence(
        sequence_id,
        array("q", token_ids),
        num_prompt_tokens=len(token_ids) if num_prompt_tokens is None else num_prompt_tokens,
        blocks=list(range(1 + 8 * sequence_id, 9 + 8 * sequence_id)) if blocks is None else blocks,
        num_cached_tokens=num_cached_tokens,
        sampling=sampling,
        top_n_tokens=top_n_tokens,
        prefill_logprobs=prefill_logprobs,
        prefill_top_n_tokens=prefill_top_n_tokens,
        embeds=embeds,
    )


def oracle_tokens(token_ids: Sequence[int], count: int, sampling: SamplingParameters = GREEDY) -> list[int]:
    """The tokens that follow a prompt, without a cache and one sequence at a time."""
    tokens = list(token_ids)
    for index in range(count):
        row = SamplingRow(sampling, index, known_ids=array("q", tokens))
        tokens.append(int(sample(oracle_logits(tokens).unsqueeze(0), [row]).ids_S))
    return tokens[len(token_ids) :]


class Driver:
    def __init__(self, engine: Engine, runner: FakeRunner, running: Future[None]) -> None:
        self.engine = engine
        self.runner = runner
        self.running = running
        """The engine's thread."""
        self.epoch = 0
        self.step_id = 0
        self.outputs: dict[int, list[int]] = {}

    def submit(
        self,
        *,
        add: Sequence[NewSequence] = (),
        chunks: Sequence[tuple[int, int] | Chunk] = (),
        decodes: Sequence[int] = (),
        drops: Sequence[int] = (),
    ) -> Future[StepResult]:
        self.step_id += 1
        made = [chunk if isinstance(chunk, Chunk) else Chunk(*chunk) for chunk in chunks]
        return self.submit_step(
            Step(self.epoch, self.step_id, drops=drops, new_sequences=add, chunks=made, decodes=decodes)
        )

    def submit_step(self, step: Step) -> Future[StepResult]:
        future: Future[StepResult] = Future()
        self.engine.submit(step, future.set_result)
        return future

    def read(self, future: Future[StepResult]) -> StepResult:
        """The result of a step that must not fail; its tokens are added to ``outputs``."""
        result = future.result(10)
        assert result.failure is None, result.failure
        for generation in result.generations:
            output = self.outputs.setdefault(generation.sequence_id, [])
            if generation.token_ids:
                assert generation.first_output_index == len(output)
                output += generation.token_ids
        return result

    def clear(self) -> None:
        self.epoch += 1
        self.step_id = 0
        self.engine.clear(self.epoch).result(10)
        self.outputs.clear()

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is submitted inside is queued before the first of it has run."""
        self.runner.gate = threading.Event()
        yield
        self.runner.gate.set()


@contextmanager
def driven(
    *,
    run_ahead: bool = False,
    runner: FakeRunner | None = None,
    num_blocks: int = NUM_BLOCKS,
    broadcast: Callable[[Tensor], None] | None = None,
) -> Iterator[Driver]:
    runner = runner or FakeRunner()
    engine = Engine(
        runner,
        lambda runner, limits: KVPlan(num_blocks=num_blocks, derivation="fixed"),
        block_size=BLOCK_SIZE,
        prefill_logprobs=True,
        broadcast=broadcast,
        run_ahead=run_ahead,
        compute=compute_thread(1),
    )
    running = engine.start()
    engine.warm_up(WarmupLimits()).result(10)
    try:
        yield Driver(engine, runner, running)
    finally:
        assert engine.stop(10)


def prompt_logprobs(token_ids: Sequence[int]) -> list[float]:
    """Of every token but the first."""
    return [
        float(torch.log_softmax(oracle_logits(token_ids[:position]), -1)[token_ids[position]])
        for position in range(1, len(token_ids))
    ]
