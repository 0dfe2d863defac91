"""What one forward pass reads besides weights and KV cache; built fresh for each step.

Shape legend: T tokens of all rows of the step and padding behind them, R rows (sequences) of the step, L rows whose
logits are wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from text_generation_server.engine.batch import Row
from text_generation_server.transfer import to_device


@dataclass(slots=True)
class ForwardInputs:
    """A ragged batch: decode rows (one token each) first, then prompt chunks, then what `padded` adds.

    Padding has id 0 and position 0. It belongs to no row and has no slot: its keys and values go nowhere.
    """

    input_ids_T: Tensor
    """int64."""
    position_ids_T: Tensor
    """int64; a token's position in its sequence, which is also where its KV belongs."""
    slots_T: Tensor
    """int64; cache slot where each token's key and value are written: block * block_size + offset. Shorter than T by
    the padding."""
    num_decode_rows: int
    """The first rows, with one token each."""
    query_lens: list[int]
    """Tokens of each row in this step; [R]."""
    context_lens: list[int]
    """Tokens of each row's sequence after this step: cached ones plus its query; [R]."""
    block_tables: list[list[int]]
    """Block ids of each row, covering at least ``context_lens`` tokens; [R]."""
    logits_indices_L: Tensor
    """int64; indices into T of the hidden states to turn into logits."""

    @property
    def num_tokens(self) -> int:
        """With padding."""
        return self.input_ids_T.shape[0]

    def without_decode_rows(self) -> ForwardInputs:
        """The prompt chunks alone, for attention, which has no use for logits; padding stays."""
        first = self.num_decode_rows
        return ForwardInputs(
            input_ids_T=self.input_ids_T[first:],
            position_ids_T=self.position_ids_T[first:],
            slots_T=self.slots_T[first:],
            num_decode_rows=0,
            query_lens=self.query_lens[first:],
            context_lens=self.context_lens[first:],
            block_tables=self.block_tables[first:],
            logits_indices_L=self.logits_indices_L[:0],
        )


def build_inputs(
    rows: Sequence[Row], *, block_size: int, device: torch.device, pads: bool
) -> tuple[ForwardInputs, list[int]]:
    """Pack the rows of one forward pass, decode rows first, with the logits that sampling and prompt logprobs read.

    Returns: the inputs, and for each row the number of its logits, which follow each other in row order. A token
    that is only on the device so far has id 0 here; ``executor.py`` puts the right one in. ``pads``: to `padded`.
    """
    num_tokens = sum(row.num_tokens for row in rows)
    packed = np.zeros((3, padded(num_tokens) if pads else num_tokens), dtype=np.int64)
    logits_indices: list[int] = []
    logits_counts: list[int] = []
    offset = 0
    for row in rows:
        sequence, end = row.sequence, offset + row.num_tokens
        if row.is_decode:
            block, place = divmod(row.start, block_size)
            known = row.start < len(sequence.token_ids)
            packed[0, offset] = sequence.token_ids[row.start] if known else 0
            packed[1, offset] = row.start
            packed[2, offset] = sequence.block_table[block] * block_size + place
        else:
            positions = np.arange(row.start, row.end)
            blocks = np.array(sequence.block_table, dtype=np.int64)[positions // block_size]
            packed[0, offset:end] = sequence.token_ids[row.start : row.end]
            packed[1, offset:end] = positions
            packed[2, offset:end] = blocks * block_size + positions % block_size
        wanted = row.num_tokens if row.wants_prompt_logprobs else int(row.samples)
        logits_indices.extend(range(end - wanted, end))
        logits_counts.append(wanted)
        offset = end
    ids_T, positions_T, slots_T = to_device(packed, torch.int64, device)
    inputs = ForwardInputs(
        input_ids_T=ids_T,
        position_ids_T=positions_T,
        slots_T=slots_T[:num_tokens],
        num_decode_rows=sum(row.is_decode for row in rows),
        query_lens=[row.num_tokens for row in rows],
        context_lens=[row.end for row in rows],
        block_tables=[row.sequence.block_table for row in rows],
        logits_indices_L=to_device(logits_indices, torch.int64, device),
    )
    return inputs, logits_counts


def padded(num_tokens: int) -> int:
    """The number of tokens that a step of ``num_tokens`` is computed with where oneDNN multiplies.

    It compiles its matrix products for each row count, and multiplies in tiles of 16 rows. Measured
    on 2 cores with AMX (135M parameters, bfloat16): a new count costs 10 ms in a decode step and 35 ms in a long one;
    480 rows take 160 ms, 481 take 191. So few counts occur, and large ones are full tiles.
    """
    if num_tokens <= 8:
        return num_tokens
    tile = 8 if num_tokens <= 64 else 16
    return -(-num_tokens // tile) * tile


def split_passes(rows: Sequence[Row], max_logits_rows: int) -> list[list[Row]]:
    """Cut a step into forward passes so that prompt logprobs never need more than ``max_logits_rows`` rows of logits.

    Logits of a whole prompt would be gigabytes. Rows without prompt logprobs all go into the first pass, whole; the
    slices of the others follow each other in order, one slice of a row in one pass.
    """
    passes: list[list[Row]] = []
    left = list(rows)
    while left:
        budget = max_logits_rows
        now: list[Row] = []
        later: list[Row] = []
        for row in left:
            if not row.wants_prompt_logprobs:
                now.append(row)
                continue
            size = min(budget, row.num_tokens)
            budget -= size
            if size:
                now.append(Row(row.sequence, row.start, size, row.is_decode))
            if size < row.num_tokens:
                later.append(Row(row.sequence, row.start + size, row.num_tokens - size, row.is_decode))
        passes.append(now)
        left = later
    return passes
