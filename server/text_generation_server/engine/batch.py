"""The sequences that a shard holds, and the rows of a step that advance them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from text_generation_proto.grammars import Grammar
from torch import Tensor

from text_generation_server.engine.steps import NewSequence, Step
from text_generation_server.errors import InvalidStep
from text_generation_server.generation.guidance import Guide
from text_generation_server.generation.parameters import SamplingParameters


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceLimits:
    """What a sequence may ask for, fixed once the KV cache is allocated."""

    vocab_size: int
    max_position_embeddings: int
    """0: unbounded."""
    block_size: int
    num_blocks: int
    prefill_logprobs: bool
    embeds: bool = False
    """Whether the model hands out its hidden states."""


@dataclass(slots=True, eq=False)
class Sequence:
    sequence_id: int
    token_ids: array[int]
    """Prompt and output, as far as the host has read them; "q"."""
    num_prompt_tokens: int
    num_given: int
    """Tokens that came with the sequence; chunks compute these, decode rows what was sampled behind them."""
    block_table: list[int]
    num_computed: int
    """Leading tokens whose keys and values are in the cache, or will be once the steps launched so far have run."""
    num_cached: int
    """Of these, how many came from the prefix cache."""
    num_verified: int
    """Of these, how many were read by logits that were finite: the rest may hold not-a-number."""
    sampling: SamplingParameters
    top_n_tokens: int
    prefill_logprobs: bool
    grammar: Grammar | None = None
    guide: Guide | None = field(default=None, repr=False)
    """How far the output has come in the grammar; made when its first token is sampled."""
    prefill_top_n_tokens: int = 0
    embeds: bool = False
    states_sum: Tensor | None = field(default=None, repr=False)
    """Of the last hidden states of the tokens computed so far, where it embeds; float32 [H] on the device."""
    num_pending: int = 0
    """Tokens sampled on the device that the host has not read yet; they follow ``token_ids``."""
    failed: bool = False
    next_prompt_logprobs: list[Tensor] | None = field(default=None, repr=False)
    """Logprob of the first token behind the last computed one, a float32 scalar on the device; and where likely ones
    are wanted their logprobs and ids, [P]. None: unknown."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_pending

    def unverified_blocks(self, block_size: int) -> list[int]:
        """Blocks whose content may be not-a-number."""
        if self.num_verified == self.num_computed:
            return []
        return self.block_table[self.num_verified // block_size : -(-self.num_computed // block_size)]


@dataclass(frozen=True, slots=True)
class Row:
    """Consecutive tokens of one sequence that a forward pass computes."""

    sequence: Sequence
    start: int
    """Position of the first token."""
    num_tokens: int
    is_decode: bool

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.sequence.prefill_logprobs and self.start < self.sequence.num_prompt_tokens

    @property
    def embeds(self) -> bool:
        return self.sequence.embeds and self.start < self.sequence.num_prompt_tokens

    @property
    def samples(self) -> bool:
        """Whether the logits of its last token choose the sequence's next one."""
        return self.end == self.sequence.num_tokens


class Batch:
    """Sequences by id. Every method raises InvalidStep for what the contract does not allow."""

    def __init__(self) -> None:
        self._sequences: dict[int, Sequence] = {}
        # Sequences that failed alone. The peer sends a step ahead, so rows for them may still be under way.
        self._failed: set[int] = set()

    def __len__(self) -> int:
        return len(self._sequences)

    def clear(self) -> list[Sequence]:
        """Forget everything; returns what was held."""
        held = list(self._sequences.values())
        self._sequences.clear()
        self._failed.clear()
        return held

    def drop(self, sequence_ids: Seq[int]) -> list[Sequence]:
        """Forget sequences, and return those that were held; unknown ids are no error."""
        self._failed.difference_update(sequence_ids)
        return [self._sequences.pop(sequence_id) for sequence_id in sequence_ids if sequence_id in self._sequences]

    def fail(self, sequence: Sequence) -> bool:
        """Take out a sequence that cannot go on; later rows for it are skipped, not refused.

        Returns: whether it was held still: the blocks of one that was dropped have another owner by now.
        """
        sequence.failed = True
        if self._sequences.get(sequence.sequence_id) is not sequence:
            return False
        del self._sequences[sequence.sequence_id]
        self._failed.add(sequence.sequence_id)
        return True

    def add(self, new: NewSequence, limits: SequenceLimits) -> None:
        name = f"sequence {new.sequence_id}"
        num_tokens = len(new.token_ids)
        if new.sequence_id in self._sequences or new.sequence_id in self._failed:
            raise InvalidStep(f"{name} exists already")
        if not 0 < new.num_prompt_tokens <= num_tokens:
            raise InvalidStep(f"{name}: num_prompt_tokens must be in 1..{num_tokens}, got {new.num_prompt_tokens}")
        if new.num_cached_tokens >= num_tokens:
            raise InvalidStep(f"{name}: {new.num_cached_tokens} of {num_tokens} tokens cached, nothing left to compute")
        if max(new.token_ids) >= limits.vocab_size or min(new.token_ids) < 0:
            raise InvalidStep(f"{name}: token ids must be in 0..{limits.vocab_size - 1}")
        if new.top_n_tokens > limits.vocab_size:
            raise InvalidStep(f"{name}: top_n_tokens {new.top_n_tokens} exceeds the vocabulary, {limits.vocab_size}")
        if max(new.sampling.bias_ids, default=0) >= limits.vocab_size:
            raise InvalidStep(f"{name}: biased token ids must be in 0..{limits.vocab_size - 1}")
        if new.prefill_logprobs and not limits.prefill_logprobs:
            raise InvalidStep(f"{name}: prefill logprobs are off on this server (--enable-prefill-logprobs)")
        if new.prefill_top_n_tokens > (limits.vocab_size if new.prefill_logprobs else 0):
            raise InvalidStep(
                f"{name}: prefill_top_n_tokens {new.prefill_top_n_tokens} need prefill logprobs, and such a vocabulary"
            )
        if new.embeds and (new.num_cached_tokens or not limits.embeds):
            why = "some of its tokens are cached" if limits.embeds else "this model hands out no hidden states"
            raise InvalidStep(f"{name} cannot embed: {why}")
        sequence = Sequence(
            sequence_id=new.sequence_id,
            token_ids=new.token_ids[:],
            num_prompt_tokens=new.num_prompt_tokens,
            num_given=num_tokens,
            block_table=[],
            num_computed=new.num_cached_tokens,
            num_cached=new.num_cached_tokens,
            num_verified=new.num_cached_tokens,
            sampling=new.sampling,
            top_n_tokens=new.top_n_tokens,
            prefill_logprobs=new.prefill_logprobs,
            prefill_top_n_tokens=new.prefill_top_n_tokens,
            grammar=new.grammar,
            embeds=new.embeds,
        )
        _add_blocks(sequence, new.blocks, limits)
        _check_room(sequence, new.num_cached_tokens, limits)
        self._sequences[new.sequence_id] = sequence

    def rows(self, step: Step, limits: SequenceLimits) -> list[Row]:
        """The rows of a step, decode rows first, after its block additions are made; counts them as computed."""
        for addition in step.additions:
            sequence = self._find(addition.sequence_id)
            if sequence is not None:
                _add_blocks(sequence, addition.blocks, limits)
        rows: list[Row] = []
        seen: set[int] = set()
        for sequence_id in step.decodes:
            sequence = self._find(sequence_id)
            if sequence is None:
                continue
            if sequence.num_computed < sequence.num_given:
                left = sequence.num_given - sequence.num_computed
                raise InvalidStep(f"sequence {sequence_id} cannot decode: {left} known tokens are not computed yet")
            rows.append(Row(sequence, sequence.num_computed, 1, is_decode=True))
            seen.add(sequence_id)
        if len(seen) != len(rows):
            raise InvalidStep("a sequence is listed twice in one decode")
        for chunk in step.chunks:
            sequence = self._find(chunk.sequence_id)
            if sequence is None:
                continue
            if chunk.sequence_id in seen:
                raise InvalidStep(f"sequence {chunk.sequence_id} has two rows in one step")
            seen.add(chunk.sequence_id)
            left = max(0, sequence.num_given - sequence.num_computed)
            if not 0 < chunk.num_tokens <= left:
                raise InvalidStep(
                    f"sequence {chunk.sequence_id}: a chunk of {chunk.num_tokens} tokens where {left} are left"
                )
            _add_blocks(sequence, chunk.new_blocks, limits)
            rows.append(Row(sequence, sequence.num_computed, chunk.num_tokens, is_decode=False))
        for row in rows:
            _check_room(row.sequence, row.end, limits)
        for row in rows:
            row.sequence.num_computed = row.end
        return rows

    def _find(self, sequence_id: int) -> Sequence | None:
        """The sequence; None when it failed alone earlier."""
        sequence = self._sequences.get(sequence_id)
        if sequence is None and sequence_id not in self._failed:
            raise InvalidStep(f"unknown sequence {sequence_id}")
        return sequence


def _add_blocks(sequence: Sequence, blocks: list[int], limits: SequenceLimits) -> None:
    if blocks:
        if min(blocks) < 1 or max(blocks) > limits.num_blocks:
            raise InvalidStep(f"sequence {sequence.sequence_id}: block ids must be in 1..{limits.num_blocks}")
        sequence.block_table.extend(blocks)
        if len(sequence.block_table) > limits.num_blocks:
            raise InvalidStep(f"sequence {sequence.sequence_id}: more blocks than there are, {limits.num_blocks}")


def _check_room(sequence: Sequence, num_tokens: int, limits: SequenceLimits) -> None:
    room = len(sequence.block_table) * limits.block_size
    if num_tokens > room:
        raise InvalidStep(f"sequence {sequence.sequence_id}: {num_tokens} tokens do not fit its blocks ({room} tokens)")
    if 0 < limits.max_position_embeddings < num_tokens:
        raise InvalidStep(
            f"sequence {sequence.sequence_id}: {num_tokens} tokens where the model has "
            f"{limits.max_position_embeddings} positions"
        )
