"""Step plans to protobuf and results back; protobuf classes go no further than this package."""

from __future__ import annotations

from dataclasses import dataclass

from text_generation_proto.v1 import generate_pb2 as pb

from text_generation_router.config import WarmupLimits
from text_generation_router.scheduling.steps import RunningSequence, StepPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardInfo:
    """What the router knows of the model and of the shard group that serves it."""

    model_id: str
    model_sha: str | None
    model_type: str
    pipeline_tag: str | None
    dtype: str
    device_type: str
    attention: str
    block_size: int
    tokenizer_path: str
    eos_token_ids: frozenset[int]
    vocab_size: int
    max_position_embeddings: int
    """Longest sequence the model's positions allow; 0 when unbounded."""
    window_size: int
    prefill_logprobs: bool
    world_size: int
    urls: tuple[str, ...]


def shard_info(message: pb.InfoResponse) -> ShardInfo:
    return ShardInfo(
        model_id=message.model_id,
        model_sha=message.model_sha or None,
        model_type=message.model_type,
        pipeline_tag=message.pipeline_tag or None,
        dtype=message.dtype,
        device_type=message.device_type,
        attention=message.attention_impl,
        block_size=message.block_size,
        tokenizer_path=message.tokenizer_path,
        eos_token_ids=frozenset(message.eos_token_ids),
        vocab_size=message.vocab_size,
        max_position_embeddings=message.max_position_embeddings,
        window_size=message.window_size,
        prefill_logprobs=message.prefill_logprobs,
        world_size=message.world_size,
        urls=tuple(message.urls),
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


def step_request(plan: StepPlan, *, epoch: int, step_id: int, prefill_logprobs: bool) -> pb.StepRequest:
    """The message for one planned step. ``prefill_logprobs``: whether the shards can report them."""
    message = pb.StepRequest(epoch=epoch, step_id=step_id, drops=plan.drops)
    if plan.chunks:
        message.prefill.new_sequences.extend(
            _new_sequence(sequence, prefill_logprobs=prefill_logprobs) for sequence in plan.new_sequences
        )
        message.prefill.chunks.extend(
            pb.Chunk(sequence_id=sequence.sequence_id, num_tokens=size) for sequence, size in plan.chunks
        )
    if plan.decodes:
        message.decode.sequence_ids.extend([sequence.sequence_id for sequence in plan.decodes])
        message.decode.additions.extend(
            pb.BlockAddition(sequence_id=sequence.sequence_id, blocks=blocks) for sequence, blocks in plan.additions
        )
    return message


def _new_sequence(sequence: RunningSequence, *, prefill_logprobs: bool) -> pb.NewSequence:
    request = sequence.queued.request
    sampling = request.sampling
    return pb.NewSequence(
        sequence_id=sequence.sequence_id,
        token_ids=sequence.token_ids,
        num_prompt_tokens=len(request.input_ids),
        blocks=sequence.blocks,
        sampling=pb.SamplingParameters(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            typical_p=sampling.typical_p,
            repetition_penalty=sampling.repetition_penalty,
            frequency_penalty=sampling.frequency_penalty,
            do_sample=sampling.do_sample,
            seed=sampling.seed,
            choice_index=sampling.choice_index,
        ),
        top_n_tokens=request.top_n_tokens,
        # After a pre-emption the prompt's logprobs have been reported already.
        prefill_logprobs=prefill_logprobs and request.decoder_input_details and not sequence.queued.output_ids,
        traceparent=request.traceparent,
    )
