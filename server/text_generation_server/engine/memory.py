"""One model of memory: weights, the largest step, and how many KV blocks fit beside them.

It is used three times: ``plan`` prints it before anything is loaded, a shard refuses a device that is too small before
it reads the weights, and sizes its block pool by it once they are there. The router admits by the number of blocks.

Every part is the most that it can be, and the parts are added up although not all of them come together: what is left
over is the margin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from text_generation_server.attention.torch_paged import SCRATCH_BYTES
from text_generation_server.device_memory import DeviceMemory, amount
from text_generation_server.engine.executor import MAX_PROMPT_LOGITS_ROWS
from text_generation_server.generation.sampler import FILTERED_ROWS

DEFAULT_STEP_TOKENS = 4096
"""Of the largest step, where no limit says it."""

LOGITS_COPIES = 10
"""A row of logits, in float32: the model's, the one that is processed, its exponentials, and for top tokens its
distances from the best in float32 and twice in float64. Counted: 9."""
FILTER_COPIES = 28
"""The same while top-p and typical-p look at a row: candidates, scores, masses and their order, in 64 bits. Counted:
28, where all scores are equal."""
PROMPT_LOGPROBS_COPIES = 4
"""Logits as the model gives them, in float32, and their log-softmax."""
CONTEXT_COPIES = 2
"""Keys and values of one sequence in one layer, as attention by torch reads them back for a prompt chunk: gathered from
their blocks, and filled up to whole tiles."""
GRAPH_BYTES = 8 * 2**20
"""Of one captured CUDA graph beside its tensors. Not measured yet."""
PADDED_TOKENS = 16
"""By so many tokens at most a step is filled up on a CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmupLimits:
    """The limits resolved so far; 0 means that what fits decides."""

    max_batch_prefill_tokens: int = 0
    max_batch_total_tokens: int = 0
    max_batch_size: int = 0
    max_total_tokens: int = 0
    max_concurrent_requests: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """What a model takes on one rank."""

    weight_bytes: int
    """Still to be loaded: 0 once the weights are there."""
    weights: str = ""
    """For people: ``in bfloat16``."""
    kv_bytes_per_token: int | None
    """None where only the loaded model can tell."""
    layer_bytes_per_token: int = 0
    """Keys and values of the layer that has most, in the model's own dtype."""
    step_bytes_per_token: int
    """Activations: the most that is alive at once between two attention calls, for each token of a step."""
    attention_bytes_per_token: int = 0
    """Queries, keys, values and results of one layer: what attention may copy to have it in order."""
    logits_width: int
    max_position_embeddings: int
    """0: unbounded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVPlan:
    num_blocks: int
    derivation: str
    """Their size, and which limit decided: for the log."""


class DoesNotFit(ValueError):
    """The limits need more memory than there is; the text has the numbers and the flag that would help."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Where the memory of one rank's device goes. Sizes may exceed it: ``problem`` says so."""

    device: DeviceMemory
    sizes: ModelSizes
    limits: WarmupLimits
    block_size: int
    kept_free_bytes: int
    step_tokens: int
    """Of the largest step, prompts and decode rows together."""
    rows: int
    """Most sequences that get a token in one step."""
    activation_bytes: int
    attention_bytes: int
    """Copies and scores that attention makes beside its result."""
    logits_bytes: int
    """Logits, and what sampling makes of them."""
    prompt_logprobs_bytes: int
    graph_bytes: int
    fitting_blocks: int = 0
    """What there is room for; not negative."""
    num_blocks: int = 0
    """What is allocated, but for block 0, which is padding. 0 where the size of a block is not known."""
    why: str = ""
    """Which limit decided their number."""
    problem: str = ""
    """Why it does not fit, with the flag that would help; empty where it does."""
    context: int = 0
    """Longest prompt plus output of one request; 0 where it is not known."""

    @property
    def step_bytes(self) -> int:
        """Reserved for the largest step."""
        return (
            self.activation_bytes
            + self.attention_bytes
            + self.logits_bytes
            + self.prompt_logprobs_bytes
            + self.graph_bytes
        )

    @property
    def block_bytes(self) -> int:
        return self.block_size * (self.sizes.kv_bytes_per_token or 0)

    @property
    def cache_bytes(self) -> int:
        """Of the KV cache as it is allocated, with the padding block."""
        return (self.num_blocks + 1) * self.block_bytes if self.num_blocks else 0

    @property
    def cache_tokens(self) -> int:
        return self.num_blocks * self.block_size

    def concurrency(self, tokens: int) -> int:
        """How many requests of so many tokens, prompt and output together, hold their blocks at once."""
        return self.num_blocks // blocks_of(max(1, tokens), self.block_size)

    def require_fit(self) -> MemoryPlan:
        """The plan itself. Raises: DoesNotFit."""
        if self.problem:
            raise DoesNotFit(self.problem)
        return self

    @property
    def kv(self) -> KVPlan:
        derivation = (
            f"{amount(self.num_blocks * self.block_bytes)}: {self.why}; {self.fitting_blocks} fit into {self.budget}"
        )
        return KVPlan(num_blocks=self.num_blocks, derivation=derivation)

    @property
    def budget(self) -> str:
        """What there is for the cache, and what is taken off before."""
        taken = []
        if self.sizes.weight_bytes:
            taken.append(f"{amount(self.sizes.weight_bytes)} for the weights{_spaced(self.sizes.weights)}")
        if self.device.overhead_bytes:
            taken.append(f"{amount(self.device.overhead_bytes)} for the driver and libraries")
        if self.kept_free_bytes:
            taken.append(f"{amount(self.kept_free_bytes)} ({1 - self.device.share:.0%} of the rest) kept free")
        taken.append(f"{amount(self.step_bytes)} for the largest step of {self.step_tokens} tokens")
        return f"{self.device.derivation}, less {', '.join(taken)}"


def plan_memory(
    sizes: ModelSizes,
    device: DeviceMemory,
    limits: WarmupLimits,
    *,
    block_size: int,
    prefill_logprobs: bool = False,
    graph_batch_sizes: Sequence[int] = (),
) -> MemoryPlan:
    """Divide a device's memory. It never raises: what does not fit is told in ``problem``.

    With ``max_batch_total_tokens`` there are exactly as many blocks as that takes; otherwise as many as fit, but no
    more than all requests together can use. ``graph_batch_sizes``: decode steps that are captured as CUDA graphs.
    """
    rest = device.usable_bytes - device.overhead_bytes - sizes.weight_bytes
    kept_free = rest - int(rest * device.share) if rest > 0 else 0
    step_tokens = limits.max_batch_prefill_tokens or DEFAULT_STEP_TOKENS
    requests = limits.max_concurrent_requests or 2**31
    rows = min(limits.max_batch_size or limits.max_concurrent_requests or 128, requests, step_tokens)
    row_bytes = sizes.logits_width * 4
    plan = MemoryPlan(
        device=device,
        sizes=sizes,
        limits=limits,
        block_size=block_size,
        kept_free_bytes=kept_free,
        step_tokens=step_tokens,
        rows=rows,
        activation_bytes=sizes.step_bytes_per_token * (step_tokens + (PADDED_TOKENS if device.kind == "cpu" else 0)),
        attention_bytes=SCRATCH_BYTES + sizes.attention_bytes_per_token * step_tokens,
        logits_bytes=row_bytes * (LOGITS_COPIES * rows + FILTER_COPIES * min(rows, FILTERED_ROWS)),
        prompt_logprobs_bytes=row_bytes * PROMPT_LOGPROBS_COPIES * min(MAX_PROMPT_LOGITS_ROWS, step_tokens)
        if prefill_logprobs
        else 0,
        graph_bytes=sum(GRAPH_BYTES + row_bytes * size for size in graph_batch_sizes)
        + sizes.step_bytes_per_token * max(graph_batch_sizes, default=0),
    )
    room = rest - kept_free - plan.step_bytes
    if sizes.kv_bytes_per_token is None:
        return replace(plan, problem=_nothing_fits(plan, rest, room) if room < 0 else "")
    return _with_blocks(plan, rest, room)


def _with_blocks(plan: MemoryPlan, rest: int, room: int) -> MemoryPlan:
    """Fill ``room`` bytes with blocks, and with the copies that attention makes of the longest sequence in them."""
    limits, sizes, block_size, block_bytes = plan.limits, plan.sizes, plan.block_size, plan.block_bytes
    copied = CONTEXT_COPIES * sizes.layer_bytes_per_token
    longest = limits.max_total_tokens or sizes.max_position_embeddings
    wanted = blocks_of(limits.max_batch_total_tokens, block_size)
    context = min(longest or math.inf, wanted * block_size or math.inf)
    # Block 0 is allocated as well, and never handed out.
    fitting = -1
    if context < math.inf:
        fitting = (room - copied * int(context)) // block_bytes - 1
    if fitting * block_size < context and not wanted:
        # The longest sequence is as long as the cache: each block of it costs its copies too.
        fitting = (room - block_bytes) // (block_bytes + copied * block_size)
        context = fitting * block_size
    plan = replace(
        plan,
        attention_bytes=plan.attention_bytes + copied * max(0, int(context)),
        fitting_blocks=max(0, fitting),
    )
    if fitting < 1:
        return replace(plan, problem=_nothing_fits(plan, rest, room))
    if wanted > fitting:
        problem = (
            f"`--max-batch-total-tokens {limits.max_batch_total_tokens}` needs {amount(wanted * block_bytes)} of KV "
            f"cache, {_room(plan)} fit ({plan.budget}); decrease `--max-batch-total-tokens` to "
            f"{fitting * block_size} or less, or `--max-batch-prefill-tokens`"
        )
        return replace(plan, problem=problem)
    num_blocks, why = (wanted, "as `--max-batch-total-tokens` asks") if wanted else (fitting, "all that fit")
    if not wanted and limits.max_concurrent_requests and longest:
        usable = limits.max_concurrent_requests * blocks_of(longest, block_size)
        if usable <= fitting:
            num_blocks = usable
            why = f"all that {limits.max_concurrent_requests} requests of {longest} tokens can use"
    plan = replace(plan, num_blocks=num_blocks, why=why, context=min(longest or 2**63, num_blocks * block_size))
    if num_blocks * block_size < limits.max_total_tokens:
        needed = blocks_of(limits.max_total_tokens, block_size)
        problem = (
            f"one request of `--max-total-tokens {limits.max_total_tokens}` needs {amount(needed * block_bytes)} of "
            f"KV cache, {_room(plan)} fit ({plan.budget}); decrease `--max-total-tokens` to "
            f"{num_blocks * block_size} or less, or `--max-batch-prefill-tokens`"
        )
        return replace(plan, problem=problem)
    return plan


def _nothing_fits(plan: MemoryPlan, rest: int, room: int) -> str:
    """Not one block fits: name what is too large, and the flag that makes it smaller."""
    if rest <= 0:
        return (
            f"the weights do not fit: {amount(plan.sizes.weight_bytes)}{_spaced(plan.sizes.weights)}, where there are "
            f"{plan.device.derivation}; {_for_weights(plan)}"
        )
    missing = plan.block_bytes * 2 - room
    each = plan.sizes.step_bytes_per_token + plan.sizes.attention_bytes_per_token
    tokens = plan.step_tokens - math.ceil(missing / max(1, each))
    if tokens > plan.rows:
        return (
            f"not one block of KV cache fits ({plan.budget}); decrease `--max-batch-prefill-tokens` to {tokens} or less"
        )
    return (
        f"not one block of KV cache fits ({plan.budget}); decrease `--max-concurrent-requests` or `--max-batch-size`, "
        f"and `--max-batch-prefill-tokens`; or {_for_weights(plan)}"
    )


def _for_weights(plan: MemoryPlan) -> str:
    """What helps when it is the weights that are too large."""
    smaller = "`--dtype bfloat16` halves them; or " if "float32" in plan.sizes.weights else ""
    if plan.device.kind == "cpu":
        return f"{smaller}free memory, or choose a smaller model"
    fraction = "raise `--cuda-memory-fraction`, " if plan.device.fraction < 1 else ""
    return f"{smaller}{fraction}spread the model over more GPUs with `--num-shard`, or choose a larger GPU"


def blocks_of(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)


def _room(plan: MemoryPlan) -> str:
    return f"{plan.fitting_blocks} blocks ({amount(plan.fitting_blocks * plan.block_bytes)})"


def _spaced(text: str) -> str:
    return f" {text}" if text else ""
