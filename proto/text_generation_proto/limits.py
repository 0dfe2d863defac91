"""Limits that follow from others, each with how it came about: the router serves by them, shards make room for them,
and the memory plan shows them. What two processes derived apart they would sooner or later derive differently.
"""

from __future__ import annotations

from typing import NamedTuple

DEFAULT_BATCH_PREFILL_TOKENS = 4096
CPU_BATCH_PREFILL_TOKENS = 512
"""On a CPU a longer step is no faster per token, and every running stream waits for all of it."""
GIVEN = "as given"


class Limit(NamedTuple):
    value: int
    why: str
    """For the log, in brackets behind the number."""


def most_rows(max_concurrent_requests: int, max_batch_size: int | None) -> int:
    """Sequences that may run at once."""
    return min(max_concurrent_requests, max_batch_size or max_concurrent_requests)


def batch_prefill_tokens(given: int | None, *, device_type: str, rows: int, block_size: int) -> Limit:
    """Prompt tokens and decode rows of one step."""
    if given is not None:
        return Limit(given, GIVEN)
    # The decode rows of a full house come out of the same budget: they must leave room for a prompt.
    with_prompt = rows + block_size
    default = CPU_BATCH_PREFILL_TOKENS if device_type == "cpu" else DEFAULT_BATCH_PREFILL_TOKENS
    if with_prompt > default:
        return Limit(with_prompt, f"a token for each of {rows} requests, and {block_size} of a prompt")
    return Limit(default, "the default on a CPU" if device_type == "cpu" else "the default")


def largest_step_tokens(batch_prefill_tokens: int, rows: int) -> int:
    """Decode rows are never held back: a step may have one for every request, and a prompt token."""
    return max(batch_prefill_tokens, rows + 1)


def total_tokens(given: int | None, *, capacity: int, positions: int, model_max_length: int | None = None) -> Limit:
    """Prompt and output of one request. ``capacity``: tokens of the KV cache; ``positions``: 0 is unbounded."""
    if given is not None:
        return Limit(given, GIVEN)
    limits = [Limit(capacity, "all tokens of the KV cache")]
    if positions:
        limits.append(Limit(positions, "the model's positions"))
    if model_max_length:
        limits.append(Limit(model_max_length, "the tokenizer's limit"))
    return min(limits, key=lambda limit: limit.value)


def input_tokens(given: int | None, max_total_tokens: int) -> Limit:
    """The prompt of one request."""
    return Limit(given, GIVEN) if given is not None else Limit(max_total_tokens - 1, "`max_total_tokens` - 1")
