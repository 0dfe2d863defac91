"""TGI's metrics, and those it lacked, in the Prometheus text format.

Written out here because prometheus_client gives every counter the suffix ``_total``, which TGI's names do not have,
and because a call must cost well under a microsecond. Only the event loop's thread touches these objects.

Who counts what:

- the route handlers: request_count (once a request on a generating route, when its body is read), then exactly one
  of request_success, request_failure{err} or request_cancelled; request_duration, request_validation_duration,
  request_queue_duration, request_inference_duration, request_mean_time_per_token_duration and
  request_generated_tokens of successes.
- `inference`: request_input_length, request_max_new_tokens; `embedding.embedder`: request_input_length of each text.
- `embedding.batches`: queue_size and batch_inference_* with the method ``embed``.
- `scheduling.batcher`: queue_size, batch_*, kv_cache_*, prefix_cache_*, preemption_count, step_*_duration,
  request_skipped_tokens, time_to_first_token_duration and inter_token_latency_duration.

So ``count == success + sum(failure) + cancelled`` whenever no request is inside. Bodies that never become a request
(400, 401, 413, 415, 422 in plain text, 503 while draining) are not counted, as in TGI.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence

DURATION_BUCKETS: tuple[float, ...] = tuple(0.0001 * 1.5**k for k in range(1, 36))
BATCH_SIZE_BUCKETS = tuple(float(2**k) for k in range(11))
SKIPPED_TOKENS_BUCKETS = tuple(float(k) for k in range(11))

_METHODS = ("prefill", "decode", "embed")
_FAILURES = ("validation", "overloaded", "generation", "incomplete", "internal", "shutting_down", "timeout")
_CONCAT_REASONS = ("backpressure", "wait_exceeded", "chunking")


def linear_buckets(maximum: int) -> tuple[float, ...]:
    """TGI's buckets for token counts: a hundred equal steps up to ``maximum``."""
    return tuple(maximum / 100 * step for step in range(1, 101))


class Counter:
    """A number that grows, one for each value of the label when there is one."""

    kind = "counter"

    def __init__(self, label: str | None = None, known: Iterable[str] = ()) -> None:
        self._label = label
        # Every series is there from the start: `increase` of a series that appears with its first event is zero.
        self._values: dict[str, float] = dict.fromkeys(known if label else [""], 0)

    def inc(self, amount: float = 1, **labels: str) -> None:
        key = labels[self._label] if self._label else ""
        self._values[key] = self._values.get(key, 0) + amount

    def value(self, **labels: str) -> float:
        """The present count, for tests and for the log."""
        return self._values.get(labels[self._label] if self._label else "", 0)

    def samples(self, name: str) -> Iterator[str]:
        for key, value in self._values.items():
            yield f"{name}{_labels(self._label, key)} {_number(value)}"


class Gauge:
    """A number that goes up and down."""

    kind = "gauge"

    def __init__(self) -> None:
        self._value = 0.0

    def set(self, value: float) -> None:
        self._value = value

    def value(self) -> float:
        return self._value

    def samples(self, name: str) -> Iterator[str]:
        yield f"{name} {_number(self._value)}"


class Histogram:
    """Observations counted by upper bound, one set for each value of the label when there is one."""

    kind = "histogram"

    def __init__(self, bounds: Sequence[float], label: str | None = None, known: Iterable[str] = ()) -> None:
        self._bounds = tuple(bounds)
        self._label = label
        self._series: dict[str, _Series] = {key: _Series(len(self._bounds)) for key in (known if label else [""])}

    def observe(self, value: float, *, times: int = 1, **labels: str) -> None:
        key = labels[self._label] if self._label else ""
        series = self._series.get(key)
        if series is None:
            series = self._series[key] = _Series(len(self._bounds))
        series.counts[bisect_left(self._bounds, value)] += times
        series.total += value * times

    def count(self, **labels: str) -> int:
        """Number of observations, for tests."""
        series = self._series.get(labels[self._label] if self._label else "")
        return sum(series.counts) if series else 0

    def samples(self, name: str) -> Iterator[str]:
        for key, series in self._series.items():
            count = 0
            for bound, number in zip((*self._bounds, None), series.counts, strict=True):
                count += number
                limit = "+Inf" if bound is None else _number(bound)
                yield f"{name}_bucket{_labels(self._label, key, limit)} {count}"
            yield f"{name}_sum{_labels(self._label, key)} {_number(series.total)}"
            yield f"{name}_count{_labels(self._label, key)} {count}"


class _Series:
    __slots__ = ("counts", "total")

    def __init__(self, num_bounds: int) -> None:
        self.counts = [0] * (num_bounds + 1)
        self.total = 0.0


class Metrics:
    """All metrics of the router; an attribute is the metric's name without ``tgi_``."""

    content_type = b"text/plain; charset=utf-8"

    def __init__(self, *, max_input_tokens: int, max_total_tokens: int) -> None:
        duration = DURATION_BUCKETS
        self.request_count = Counter()
        self.request_success = Counter()
        self.request_failure = Counter("err", _FAILURES)
        self.request_cancelled = Counter()
        self.request_duration = Histogram(duration)
        self.request_validation_duration = Histogram(duration)
        self.request_queue_duration = Histogram(duration)
        self.request_inference_duration = Histogram(duration)
        self.request_mean_time_per_token_duration = Histogram(duration)
        self.time_to_first_token_duration = Histogram(duration)
        self.inter_token_latency_duration = Histogram(duration)
        self.request_input_length = Histogram(linear_buckets(max_input_tokens))
        self.request_max_new_tokens = Histogram(linear_buckets(max_total_tokens))
        self.request_generated_tokens = Histogram(linear_buckets(max_total_tokens))
        self.request_skipped_tokens = Histogram(SKIPPED_TOKENS_BUCKETS)
        self.queue_size = Gauge()
        self.batch_current_size = Gauge()
        self.batch_current_max_tokens = Gauge()
        self.batch_max_total_tokens = Gauge()
        self.batch_next_size = Histogram(BATCH_SIZE_BUCKETS)
        self.batch_inference_count = Counter("method", _METHODS)
        self.batch_inference_success = Counter("method", _METHODS)
        self.batch_inference_failure = Counter("method", _METHODS)
        self.batch_concat = Counter("reason", _CONCAT_REASONS)
        self.batch_inference_duration = Histogram(duration, "method", _METHODS)
        self.batch_forward_duration = Histogram(duration, "method", _METHODS)
        self.batch_decode_duration = Histogram(duration, "method", _METHODS)
        self.batch_filter_duration = Histogram(duration, "method", _METHODS)
        self.batch_concat_duration = Histogram(duration, "method", ("decode",))
        self.step_idle_duration = Histogram(duration)
        self.step_overhead_duration = Histogram(duration, "method", _METHODS)
        self.preemption_count = Counter()
        self.request_replay_count = Counter()
        self.out_of_memory_count = Counter()
        self.batch_max_prefill_tokens = Gauge()
        self.kv_cache_usage = Gauge()
        self.kv_cache_blocks_total = Gauge()
        self.prefix_cache_queried_tokens = Counter()
        self.prefix_cache_hit_tokens = Counter()
        self.prefix_cache_blocks = Gauge()
        self.prefix_cache_evictions = Counter()
        # Names that tutorials on TGI give to two of the above: the same objects under a second name.
        self.request_duration_seconds = self.request_duration
        self.batch_size = self.batch_current_size

    def render(self) -> bytes:
        """The body of ``/metrics``."""
        lines: list[str] = []
        for attribute, metric in vars(self).items():
            name = f"tgi_{attribute}"
            lines.append(f"# HELP {name} {HELP[attribute]}")
            lines.append(f"# TYPE {name} {metric.kind}")
            lines.extend(metric.samples(name))
        lines.append("")
        return "\n".join(lines).encode()


HELP = {
    "request_count": "Generation requests received.",
    "request_success": "Generation requests answered in full.",
    "request_failure": "Generation requests that ended with an error, by kind.",
    "request_cancelled": "Generation requests whose client went away.",
    "request_duration": "Seconds from the request to its last token.",
    "request_validation_duration": "Seconds of tokenisation and validation.",
    "request_queue_duration": "Seconds in the queue.",
    "request_inference_duration": "Seconds from the first step to the last token.",
    "request_mean_time_per_token_duration": "Inference seconds divided by generated tokens.",
    "time_to_first_token_duration": "Seconds from the queue's door to the first token.",
    "inter_token_latency_duration": "Seconds between two tokens of a request.",
    "request_input_length": "Prompt tokens of a request.",
    "request_max_new_tokens": "Tokens a request may generate.",
    "request_generated_tokens": "Tokens a request generated.",
    "request_skipped_tokens": "Speculated tokens accepted in a step.",
    "queue_size": "Requests that wait for their first step.",
    "batch_current_size": "Running requests.",
    "batch_current_max_tokens": "Tokens that the blocks of the running requests can hold.",
    "batch_max_total_tokens": "Tokens that the KV cache can hold.",
    "batch_next_size": "Requests admitted together.",
    "batch_inference_count": "Steps sent to the shards.",
    "batch_inference_success": "Steps that succeeded.",
    "batch_inference_failure": "Steps that failed.",
    "batch_concat": "Times that requests joined a running batch.",
    "batch_inference_duration": "Seconds from sending a step to its result.",
    "batch_forward_duration": "Seconds of a step's model forward.",
    "batch_decode_duration": "Seconds of a step's sampling.",
    "batch_filter_duration": "Seconds of taking finished requests out of a batch.",
    "batch_concat_duration": "Seconds of joining batches.",
    "step_idle_duration": "Seconds between the end of a step and the start of the next on the shard.",
    "step_overhead_duration": "Seconds of a step that are not model execution, from the end of the one before it.",
    "preemption_count": "Times that a request lost its KV blocks to an older one and had to be computed again.",
    "request_replay_count": "Times that a request went on from its token log after the shards failed.",
    "out_of_memory_count": "Steps, or batches of texts, that ran out of memory.",
    "batch_max_prefill_tokens": "Tokens of prompts that a step may take in.",
    "kv_cache_usage": "Share of the KV cache's blocks in use, 0 to 1.",
    "kv_cache_blocks_total": "Blocks of the KV cache.",
    "prefix_cache_queried_tokens": "Prompt tokens of admitted requests.",
    "prefix_cache_hit_tokens": "Of these, tokens whose keys and values were in the prefix cache.",
    "prefix_cache_blocks": "Blocks that the prefix cache holds, those that running requests read among them.",
    "prefix_cache_evictions": "Blocks that the prefix cache gave up for others.",
    "request_duration_seconds": "The same as tgi_request_duration.",
    "batch_size": "The same as tgi_batch_current_size.",
}


def _labels(label: str | None, value: str, limit: str | None = None) -> str:
    pairs = [f'{label}="{value}"'] if label else []
    if limit is not None:
        pairs.append(f'le="{limit}"')
    return "{" + ",".join(pairs) + "}" if pairs else ""


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)
