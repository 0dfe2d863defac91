"""The smallest continuous batching loop: what an engine does with a model runner, without anything around it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from text_generation_server.engine.inputs import ForwardInputs
from torch import Tensor


class Runner(Protocol):
    def allocate_kv_cache(self, num_blocks: int) -> None: ...

    def forward(self, inputs: ForwardInputs) -> Tensor: ...


@dataclass(slots=True)
class Stream:
    prompt_ids: list[int]
    arrives_at: int
    output_ids: list[int] = field(default_factory=list)
    block_table: list[int] = field(default_factory=list)
    num_cached: int = 0

    @property
    def ids(self) -> list[int]:
        return self.prompt_ids + self.output_ids


def greedy(
    runner: Runner,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int] = (),
    block_size: int = 16,
    chunk_tokens: int = 1 << 30,
    arrive_within: int = 0,
    seed: int = 0,
) -> list[list[int]]:
    """Greedy tokens of each prompt, all run together; prompts arrive at random in the first ``arrive_within`` steps.

    Blocks are handed out in random order. A prompt is prefilled in chunks of at most ``chunk_tokens``.
    """
    rng = random.Random(seed)
    streams = [Stream(list(prompt), rng.randint(0, arrive_within)) for prompt in prompts]
    num_blocks = sum(-(-(len(s.prompt_ids) + max_new_tokens) // block_size) for s in streams)
    runner.allocate_kv_cache(num_blocks)
    free = list(range(1, num_blocks + 1))
    rng.shuffle(free)
    running = list(streams)
    step = 0
    while running:
        ready = [stream for stream in running if stream.arrives_at <= step]
        step += 1
        if not ready:
            continue
        rows = [(stream, min(len(stream.ids) - stream.num_cached, chunk_tokens)) for stream in ready]
        rows.sort(key=lambda row: not (row[1] == 1 and row[0].num_cached > 0))  # decode rows first
        for stream, count in rows:
            while len(stream.block_table) * block_size < stream.num_cached + count:
                stream.block_table.append(free.pop())
        logits = runner.forward(_inputs(rows, block_size))
        for (stream, count), row in zip(rows, logits, strict=True):
            stream.num_cached += count
            if stream.num_cached == len(stream.ids):
                stream.output_ids.append(int(row.argmax()))
                if stream.output_ids[-1] in eos_ids or len(stream.output_ids) == max_new_tokens:
                    running.remove(stream)
                    free.extend(stream.block_table)
    return [stream.output_ids for stream in streams]


def last_logits(runner: Runner, prompts: Sequence[list[int]], *, block_size: int = 16) -> Tensor:
    """Logits behind each prompt, whose last tokens are decode rows of one step: the others went before; [P, V]."""
    streams = [Stream(list(prompt), 0) for prompt in prompts]
    free = iter(range(1, 1 << 30))
    for stream in streams:
        stream.block_table = [next(free) for _ in range(-(-len(stream.ids) // block_size))]
    runner.allocate_kv_cache(next(free))
    runner.forward(_inputs([(stream, len(stream.ids) - 1) for stream in streams], block_size))
    for stream in streams:
        stream.num_cached = len(stream.ids) - 1
    return runner.forward(_inputs([(stream, 1) for stream in streams], block_size))


def _inputs(rows: list[tuple[Stream, int]], block_size: int) -> ForwardInputs:
    ids, positions, slots, last = [], [], [], []
    for stream, count in rows:
        for position in range(stream.num_cached, stream.num_cached + count):
            ids.append(stream.ids[position])
            positions.append(position)
            slots.append(stream.block_table[position // block_size] * block_size + position % block_size)
        last.append(len(ids) - 1)
    return ForwardInputs(
        input_ids_T=torch.tensor(ids),
        position_ids_T=torch.tensor(positions),
        slots_T=torch.tensor(slots),
        num_decode_rows=sum(count == 1 and stream.num_cached > 0 for stream, count in rows),
        query_lens=[count for _, count in rows],
        context_lens=[stream.num_cached + count for stream, count in rows],
        block_tables=[list(stream.block_table) for stream, _ in rows],
        logits_indices_L=torch.tensor(last),
    )


def generated(
    model: torch.nn.Module, prompts: Sequence[list[int]], *, max_new_tokens: int, eos_ids: Sequence[int] = ()
) -> list[list[int]]:
    """The library's own greedy ``generate()``: what every other way must equal.

    Prompts of one length share a call, which needs no padding and saves most of the time.
    """
    outputs: list[list[int]] = [[] for _ in prompts]
    for length in sorted({len(prompt) for prompt in prompts}):
        places = [place for place, prompt in enumerate(prompts) if len(prompt) == length]
        ids = torch.tensor([prompts[place] for place in places])
        full = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=list(eos_ids) or None,
            pad_token_id=0,
        )
        for place, row in zip(places, full[:, length:].tolist(), strict=True):
            ends = [index for index, token in enumerate(row) if token in eos_ids]
            outputs[place] = row[: ends[0] + 1] if ends else row
    return outputs


LENGTHS = (2, 5, 17, 33, 48)


def random_prompts(count: int, *, lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(10, 250) for _ in range(lengths[index % len(lengths)])] for index in range(count)]
