"""What shards say, out of protobuf, and the limits that they are told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from text_generation_proto.v1 import generate_pb2 as pb

from text_generation_router.config import WarmupLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingInfo:
    """How texts become vectors; the fields are the contract's."""

    dimensions: int
    normalizes: bool = False
    max_input_tokens: int = 0
    """0: the longest prompt."""
    lower_case: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str = ""
    shorter: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardInfo:
    """What the router knows of the model and of the shard group that serves it."""

    model_id: str
    model_sha: str | None
    pipeline_tag: str | None
    device_type: str
    block_size: int
    tokenizer_path: str
    eos_token_ids: frozenset[int]
    vocab_size: int
    max_position_embeddings: int
    """Longest sequence the model's positions allow; 0 when unbounded."""
    prefill_logprobs: bool
    is_encoder: bool
    """It embeds, and generates nothing."""
    embedding: EmbeddingInfo | None
    """None: it makes no vectors of texts."""


def shard_info(message: pb.InfoResponse) -> ShardInfo:
    return ShardInfo(
        model_id=message.model_id,
        model_sha=message.model_sha or None,
        pipeline_tag=message.pipeline_tag or None,
        device_type=message.device_type,
        block_size=message.block_size,
        tokenizer_path=message.tokenizer_path,
        eos_token_ids=frozenset(message.eos_token_ids),
        vocab_size=message.vocab_size,
        max_position_embeddings=message.max_position_embeddings,
        prefill_logprobs=message.prefill_logprobs,
        is_encoder=message.is_encoder,
        embedding=_embedding_info(message.embedding) if message.HasField("embedding") else None,
    )


def _embedding_info(message: pb.EmbeddingInfo) -> EmbeddingInfo:
    return EmbeddingInfo(
        dimensions=message.dimensions,
        normalizes=message.normalizes,
        max_input_tokens=message.max_input_tokens,
        lower_case=message.lower_case,
        prompts=dict(message.prompts),
        default_prompt=message.default_prompt,
        shorter=frozenset(message.shorter),
    )


@dataclass(frozen=True, slots=True)
class KVCacheSize:
    num_blocks: int
    derivation: str
    """How the number came about, in one line."""


def warmup_request(limits: WarmupLimits) -> pb.WarmupRequest:
    return pb.WarmupRequest(
        max_batch_prefill_tokens=limits.max_batch_prefill_tokens,
        max_batch_total_tokens=limits.max_batch_total_tokens,
        max_batch_size=limits.max_batch_size,
        max_total_tokens=limits.max_total_tokens,
        max_concurrent_requests=limits.max_concurrent_requests,
    )


def kv_cache_size(message: pb.WarmupResponse) -> KVCacheSize:
    return KVCacheSize(message.num_blocks, message.derivation)


@dataclass(slots=True)
class PrefillLogprobs:
    first_position: int
    """In the prompt."""
    logprobs: list[float]
    """NaN where there is none, as for the first token of a prompt."""
    top_tokens: Sequence[list[tuple[int, float]]] = ()
    """Ids and logprobs, most likely first; one list for each, or none at all."""


@dataclass(slots=True)
class Generation:
    """What one step yields for one sequence."""

    sequence_id: int
    first_output_index: int
    token_ids: Sequence[int]
    logprobs: Sequence[float]
    """One for each id, or none at all."""
    top_tokens: Sequence[list[tuple[int, float]]]
    """Ids and logprobs, most likely first; one list for each id, or none at all."""
    prefill: PrefillLogprobs | None
    embedding: bytes = b""


@dataclass(slots=True)
class StepTimings:
    forward_s: float
    sample_s: float
    idle_s: float
    """The shard had nothing to do for so long before this step."""
    overhead_s: float
    """Since the end of the step before, idle time included: all that was no model execution."""


@dataclass(slots=True)
class StepResult:
    """What all ranks have acknowledged."""

    step_id: int
    tokens: list[tuple[int, int, int, float]] = field(default_factory=list)
    """Sequence id, output index, token id and logprob of those that got one token and nothing else: nearly all."""
    generations: list[Generation] = field(default_factory=list)
    """Of the others."""
    failures: list[tuple[int, str]] = field(default_factory=list)
    """Sequences that failed alone, and why."""
    timings: StepTimings | None = None
    """None for a step that computed nothing."""


def step_result(message: pb.StepResult) -> StepResult:
    timings = message.timings
    computed = timings.num_prefill_tokens or timings.num_decode_rows
    return StepResult(
        step_id=message.step_id,
        tokens=_tokens(message.tokens),
        generations=[_generation(each) for each in message.generations],
        failures=[(failure.sequence_id, failure.message) for failure in message.failures],
        timings=StepTimings(
            timings.forward_ns * 1e-9, timings.sample_ns * 1e-9, timings.idle_ns * 1e-9, timings.overhead_ns * 1e-9
        )
        if computed
        else None,
    )


def _tokens(tokens: pb.Tokens) -> list[tuple[int, int, int, float]]:
    # As lists: protobuf makes one at once, but takes three times as long one by one.
    columns = tokens.sequence_ids[:], tokens.output_indices[:], tokens.token_ids[:], tokens.logprobs[:]
    return list(zip(*columns, strict=True))


def _generation(message: pb.Generation) -> Generation:
    prefill = None
    if message.HasField("prefill"):
        logprobs, tops = message.prefill.logprobs, message.prefill.top_tokens
        prefill = PrefillLogprobs(message.prefill.first_position, list(logprobs), _top_tokens(tops))
    return Generation(
        message.sequence_id,
        message.first_output_index,
        message.token_ids,
        message.logprobs,
        _top_tokens(message.top_tokens),
        prefill,
        message.embedding,
    )


def _top_tokens(tops: Iterable[pb.TopTokens]) -> list[list[tuple[int, float]]]:
    return [list(zip(top.ids, top.logprobs, strict=True)) for top in tops]
