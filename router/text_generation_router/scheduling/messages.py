"""Step plans as the messages that the shards read."""

from __future__ import annotations

from text_generation_proto.grammars import to_proto
from text_generation_proto.v1 import generate_pb2 as pb

from text_generation_router.scheduling.steps import RunningSequence, StepPlan


def step_request(plan: StepPlan, *, prefill_logprobs: bool) -> pb.StepRequest:
    """The message for one planned step, still without its number. ``prefill_logprobs``: the shards can report them."""
    message = pb.StepRequest(drops=plan.drops)
    if plan.chunks or plan.new_sequences:
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
    # Once there is output, the prompt's logprobs have all been reported.
    prefill_logprobs = prefill_logprobs and request.decoder_input_details and not sequence.queued.output_ids
    return pb.NewSequence(
        sequence_id=sequence.sequence_id,
        token_ids=sequence.token_ids,
        num_prompt_tokens=len(request.input_ids),
        blocks=sequence.lease.table,
        num_cached_tokens=sequence.lease.num_cached_tokens,
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
            presence_penalty=sampling.presence_penalty,
            count_penalty=sampling.count_penalty,
            bias_ids=[token_id for token_id, _ in sampling.logit_bias],
            biases=[bias for _, bias in sampling.logit_bias],
            watermark=sampling.watermark,
        ),
        top_n_tokens=request.top_n_tokens,
        prefill_logprobs=prefill_logprobs,
        prefill_top_n_tokens=request.prefill_top_n_tokens if prefill_logprobs else 0,
        traceparent=request.traceparent,
        grammar=None if request.grammar is None else to_proto(request.grammar),
        embeds=request.embeds,
    )
