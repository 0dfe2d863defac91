"""Protobuf <-> dataclasses; generated classes go no further than this package."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

from text_generation_proto import grammars
from text_generation_proto.v1 import generate_pb2 as pb

from text_generation_server.engine import steps
from text_generation_server.engine.memory import WarmupLimits
from text_generation_server.errors import InvalidStep
from text_generation_server.generation.parameters import SamplingParameters


def step_from_proto(message: pb.StepRequest) -> steps.Step:
    """Raises: InvalidStep for sampling parameters without a meaning."""
    return _step(message.epoch, message.step_id, message.drops, message.prefill, message.decode)


def step_from_prefill(message: pb.PrefillRequest) -> steps.Step:
    """Raises: InvalidStep, as above."""
    return _step(message.epoch, message.step_id, (), message.prefill, pb.Decode())


def step_from_decode(message: pb.DecodeRequest) -> steps.Step:
    return _step(message.epoch, message.step_id, message.drops, pb.Prefill(), message.decode)


def warmup_limits_from_proto(message: pb.WarmupRequest) -> WarmupLimits:
    return WarmupLimits(
        max_batch_prefill_tokens=message.max_batch_prefill_tokens,
        max_batch_total_tokens=message.max_batch_total_tokens,
        max_batch_size=message.max_batch_size,
        max_total_tokens=message.max_total_tokens,
        max_concurrent_requests=message.max_concurrent_requests,
    )


def result_to_proto(result: steps.StepResult) -> pb.StepResult:
    timings = result.timings
    singles = [generation for generation in result.generations if generation.is_single]
    message = pb.StepResult(
        epoch=result.epoch,
        step_id=result.step_id,
        generations=[_generation(generation) for generation in result.generations if not generation.is_single],
        tokens=_tokens(singles) if singles else None,
        failures=[
            pb.SequenceFailure(sequence_id=sequence_id, message=text)
            for sequence_id, text in result.sequence_failures.items()
        ],
        timings=pb.Timings(
            forward_ns=timings.forward_ns,
            sample_ns=timings.sample_ns,
            total_ns=timings.total_ns,
            idle_ns=timings.idle_ns,
            overhead_ns=timings.overhead_ns,
            num_prefill_tokens=timings.num_prefill_tokens,
            num_decode_rows=timings.num_decode_rows,
        ),
    )
    if result.failure is not None:
        message.failure.message = result.failure.message
        message.failure.out_of_memory = result.failure.out_of_memory
    return message


def _tokens(singles: Sequence[steps.Generation]) -> pb.Tokens:
    return pb.Tokens(
        sequence_ids=[generation.sequence_id for generation in singles],
        output_indices=[generation.first_output_index for generation in singles],
        token_ids=[generation.token_ids[0] for generation in singles],
        logprobs=[generation.logprobs[0] for generation in singles],
    )


def _step(epoch: int, step_id: int, drops: Iterable[int], prefill: pb.Prefill, decode: pb.Decode) -> steps.Step:
    return steps.Step(
        epoch,
        step_id,
        drops=list(drops),
        new_sequences=[_new_sequence(sequence) for sequence in prefill.new_sequences],
        chunks=[steps.Chunk(chunk.sequence_id, chunk.num_tokens, list(chunk.new_blocks)) for chunk in prefill.chunks],
        decodes=list(decode.sequence_ids),
        additions=[steps.BlockAddition(addition.sequence_id, list(addition.blocks)) for addition in decode.additions],
    )


def _new_sequence(message: pb.NewSequence) -> steps.NewSequence:
    try:
        # Without parameters the neutral ones hold: greedy.
        sampling = _sampling(message.sampling) if message.HasField("sampling") else SamplingParameters()
    except ValueError as error:
        raise InvalidStep(f"sequence {message.sequence_id}: {error}") from error
    return steps.NewSequence(
        message.sequence_id,
        token_ids=array("q", message.token_ids),
        num_prompt_tokens=message.num_prompt_tokens,
        blocks=list(message.blocks),
        num_cached_tokens=message.num_cached_tokens,
        sampling=sampling,
        top_n_tokens=message.top_n_tokens,
        prefill_logprobs=message.prefill_logprobs,
        grammar=grammars.from_proto(message.grammar) if message.HasField("grammar") else None,
        embeds=message.embeds,
        prefill_top_n_tokens=message.prefill_top_n_tokens,
    )


def _sampling(message: pb.SamplingParameters) -> SamplingParameters:
    return SamplingParameters(
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        typical_p=message.typical_p,
        repetition_penalty=message.repetition_penalty,
        frequency_penalty=message.frequency_penalty,
        do_sample=message.do_sample,
        seed=message.seed,
        choice_index=message.choice_index,
        presence_penalty=message.presence_penalty,
        count_penalty=message.count_penalty,
        bias_ids=tuple(message.bias_ids),
        biases=tuple(message.biases),
        watermark=message.watermark,
    )


def _generation(generation: steps.Generation) -> pb.Generation:
    return pb.Generation(
        sequence_id=generation.sequence_id,
        first_output_index=generation.first_output_index,
        token_ids=generation.token_ids,
        logprobs=generation.logprobs,
        top_tokens=_top_tokens(generation.top_tokens),
        prefill=None if generation.prefill is None else _prefill(generation.prefill),
        embedding=generation.embedding,
    )


def _prefill(prefill: steps.PrefillLogprobs) -> pb.PrefillLogprobs:
    return pb.PrefillLogprobs(
        first_position=prefill.first_position,
        logprobs=prefill.logprobs,
        top_tokens=_top_tokens(prefill.top_tokens),
    )


def _top_tokens(all_tops: Sequence[steps.TopTokens]) -> list[pb.TopTokens]:
    return [pb.TopTokens(ids=top.ids, logprobs=top.logprobs) for top in all_tops]
