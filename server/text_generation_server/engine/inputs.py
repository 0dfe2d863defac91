"""What one forward pass reads besides weights and KV cache; built fresh for each step.

Shape legend: T tokens of all rows of the step, R rows (sequences) of the step, L rows whose logits are wanted.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class ForwardInputs:
    """A ragged batch, packed without padding: decode rows (one token each) first, then prompt chunks."""

    input_ids_T: Tensor
    """int64."""
    position_ids_T: Tensor
    """int64; a token's position in its sequence, which is also where its KV belongs."""
    slots_T: Tensor
    """int64; cache slot where each token's key and value are written: block * block_size + offset."""
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
        return self.input_ids_T.shape[0]
