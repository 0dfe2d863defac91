"""The plan put to the test: one step of the largest shape, before the first request.

On a GPU an allocation that fails is found now, with a remedy, and not under load. On a CPU memory comes page by page
when it is touched, so a start would pay for what may never be used: there the plan alone decides.
"""

from __future__ import annotations

from array import array

from text_generation_server.engine.batch import SequenceLimits
from text_generation_server.engine.executor import StepExecutor
from text_generation_server.engine.memory import WarmupLimits, blocks_of
from text_generation_server.engine.steps import Chunk, NewSequence, Step
from text_generation_server.generation.parameters import SamplingParameters

EVERYTHING = SamplingParameters(
    temperature=0.7,
    top_k=50,
    top_p=0.9,
    typical_p=0.9,
    repetition_penalty=1.2,
    frequency_penalty=0.1,
    presence_penalty=0.1,
    count_penalty=0.1,
    do_sample=True,
    seed=1,
)
"""Every logits processor takes part."""
TOP_TOKENS = 5
TOKEN_ID = 1
"""What the prompts consist of: any id will do, and every vocabulary has this one."""


def largest_step(limits: WarmupLimits, sequences: SequenceLimits) -> Step:
    """As many tokens, and as many rows that get one, as a step may have.

    The last tokens of the longest sequence that fits, which attention reads back whole; where that leaves room, more
    such sequences; and prompts of one token until the batch is full. Blocks belong to several of them: nobody reads
    what they compute.
    """
    capacity = sequences.num_blocks * sequences.block_size
    longest = min(capacity, limits.max_total_tokens or sequences.max_position_embeddings or capacity)
    tokens = max(1, limits.max_batch_prefill_tokens)
    rows = min(limits.max_batch_size or limits.max_concurrent_requests, limits.max_concurrent_requests) or 1
    others = min(rows - 1, tokens - 1)
    sizes = [longest] * ((tokens - others) // longest)
    if left := (tokens - others) % longest:
        sizes.insert(0, left)
    prompts = [longest] * len(sizes) + [1] * others
    new = [
        NewSequence(
            index,
            token_ids=array("q", [TOKEN_ID]) * prompt,
            num_prompt_tokens=prompt,
            blocks=list(range(1, blocks_of(prompt, sequences.block_size) + 1)),
            num_cached_tokens=prompt - size,
            sampling=EVERYTHING,
            top_n_tokens=min(TOP_TOKENS, sequences.vocab_size),
            prefill_logprobs=sequences.prefill_logprobs,
            prefill_top_n_tokens=min(TOP_TOKENS, sequences.vocab_size) if sequences.prefill_logprobs else 0,
        )
        for index, (prompt, size) in enumerate(zip(prompts, [*sizes, *[1] * others], strict=True), start=1)
    ]
    chunks = [Chunk(each.sequence_id, len(each.token_ids) - each.num_cached_tokens) for each in new]
    return Step(0, 0, new_sequences=new, chunks=chunks)


def run(executor: StepExecutor, step: Step) -> None:
    """Run the step and forget its sequences. Raises: whatever the device does."""
    try:
        executor.collect(executor.launch(step))
    finally:
        executor.clear()
