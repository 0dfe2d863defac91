"""A step and what it yields, as the engine sees them: the messages of the contract without protobuf."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from text_generation_proto.grammars import Grammar

from text_generation_server.generation.parameters import SamplingParameters


@dataclass(frozen=True, slots=True)
class NewSequence:
    sequence_id: int
    token_ids: array[int]
    """Everything known, int64 ("q"): the prompt and what was generated before a pre-emption or a restart."""
    num_prompt_tokens: int
    blocks: list[int]
    num_cached_tokens: int
    sampling: SamplingParameters
    top_n_tokens: int = 0
    prefill_logprobs: bool = False
    grammar: Grammar | None = None
    """What the output has to obey."""
    embeds: bool = False
    """Report the mean of the prompt's last hidden states."""
    prefill_top_n_tokens: int = 0
    """Of each prompt token; with ``prefill_logprobs``."""


@dataclass(frozen=True, slots=True)
class Chunk:
    sequence_id: int
    num_tokens: int
    new_blocks: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class BlockAddition:
    sequence_id: int
    blocks: list[int]


@dataclass(frozen=True, slots=True)
class Step:
    epoch: int
    step_id: int
    drops: Seq[int] = ()
    new_sequences: Seq[NewSequence] = ()
    chunks: Seq[Chunk] = ()
    decodes: Seq[int] = ()
    additions: Seq[BlockAddition] = ()


@dataclass(frozen=True, slots=True)
class TopTokens:
    ids: list[int]
    """Most likely first; all that tie with the last one are listed, lower ids first."""
    logprobs: list[float]


@dataclass(frozen=True, slots=True)
class PrefillLogprobs:
    first_position: int
    logprobs: list[float]
    """NaN where there is none: the first token of a prompt, and the first one behind a cached prefix."""
    top_tokens: list[TopTokens] = field(default_factory=list)
    """Exactly as many as were wanted, one for each logprob; empty where there is none."""


@dataclass(slots=True)
class Generation:
    sequence_id: int
    first_output_index: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_tokens: list[TopTokens] = field(default_factory=list)
    prefill: PrefillLogprobs | None = None
    embedding: bytes = b""
    """Float32, little endian; of a sequence that embeds, with its first token."""

    @property
    def is_single(self) -> bool:
        """Whether there is one token, and nothing to report but its logprob."""
        extra = self.top_tokens or self.prefill or self.embedding
        return len(self.token_ids) == len(self.logprobs) == 1 and not extra


@dataclass(slots=True)
class Timings:
    forward_ns: int = 0
    sample_ns: int = 0
    total_ns: int = 0
    idle_ns: int = 0
    overhead_ns: int = 0
    num_prefill_tokens: int = 0
    num_decode_rows: int = 0


@dataclass(frozen=True, slots=True)
class StepFailure:
    message: str
    out_of_memory: bool = False


@dataclass(slots=True)
class StepResult:
    epoch: int
    step_id: int
    generations: list[Generation] = field(default_factory=list)
    sequence_failures: dict[int, str] = field(default_factory=dict)
    """Sequence id -> why it alone failed."""
    failure: StepFailure | None = None
    timings: Timings = field(default_factory=Timings)
