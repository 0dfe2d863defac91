"""What a generating request leaves behind when it ends: counters, durations and one line of log."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from text_generation_router.api.disconnect import ClientGone
from text_generation_router.embedding.embedder import Embedded
from text_generation_router.errors import InternalError, Overloaded, RouterError
from text_generation_router.generate_request import GenerateParameters
from text_generation_router.metrics import Metrics
from text_generation_router.scheduling.requests import Finished

logger = logging.getLogger(__name__)

REFUSALS_TOLD_EVERY_S = 1.0


class _Refusals:
    """A full server refuses many a second. One line for all of them costs those that run nothing."""

    def __init__(self) -> None:
        self._untold = 0
        self._told_at = -math.inf

    def tell(self, route: str, error: Overloaded) -> None:
        self._untold += 1
        now = time.monotonic()
        if now - self._told_at >= REFUSALS_TOLD_EVERY_S:
            more = f", and {self._untold - 1} since the last such line" if self._untold > 1 else ""
            logger.warning("%s failed with %d: %s%s", route, error.status, error.error_type, more)
            self._untold, self._told_at = 0, now


_refusals = _Refusals()


@contextmanager
def counted(metrics: Metrics, route: str) -> Iterator[None]:
    """Count a request, and how it ended, exactly once; log how it failed. A defect becomes an InternalError."""
    metrics.request_count.inc()
    try:
        yield
    except RouterError as error:
        if isinstance(error, Overloaded):
            _refused(metrics, route, error)
            raise
        metrics.request_failure.inc(err=error.metric)
        if error.status < 500 and error.status != 424:
            # The client's own mistakes are no errors of the server, and the text may quote what it sent.
            logger.warning("%s failed with %d: %s", route, error.status, error.error_type)
            logger.debug("%s failed with %d: %s", route, error.status, error)
        else:
            logger.error("%s failed with %d: %s", route, error.status, error)
        raise
    except (ClientGone, asyncio.CancelledError):
        metrics.request_cancelled.inc()
        logger.info("%s: the client went away", route)
        raise
    except Exception as error:
        metrics.request_failure.inc(err=InternalError.metric)
        logger.exception("A request failed by a defect of the router")
        raise InternalError from error
    metrics.request_success.inc()


def count_refusal(metrics: Metrics, route: str, error: Overloaded) -> None:
    """The same of a request that was turned away unread."""
    metrics.request_count.inc()
    _refused(metrics, route, error)


def _refused(metrics: Metrics, route: str, error: Overloaded) -> None:
    metrics.request_failure.inc(err=error.metric)
    _refusals.tell(route, error)


def record_success(
    metrics: Metrics, route: str, parameters: GenerateParameters, finished: Finished, total_s: float
) -> None:
    """Durations to the metrics, and TGI's line ``Success`` with the fields of its span."""
    timings = finished.timings
    per_token_s = timings.per_token_s(finished.generated_tokens)
    metrics.request_duration.observe(total_s)
    metrics.request_validation_duration.observe(timings.validation_s)
    metrics.request_queue_duration.observe(timings.queue_s)
    metrics.request_inference_duration.observe(timings.inference_s)
    metrics.request_mean_time_per_token_duration.observe(per_token_s)
    metrics.request_generated_tokens.observe(finished.generated_tokens)
    if logger.isEnabledFor(logging.INFO):
        span = {
            "name": route,
            "parameters": loggable(parameters),
            "total_time": duration_text(total_s),
            "validation_time": duration_text(timings.validation_s),
            "queue_time": duration_text(timings.queue_s),
            "inference_time": duration_text(timings.inference_s),
            "time_per_token": duration_text(per_token_s),
            "seed": finished.seed,
        }
        logger.info("Success", extra={"span": span})


def record_embedded(metrics: Metrics, embedded: Embedded, total_s: float) -> None:
    """The same of vectors."""
    metrics.request_duration.observe(total_s)
    metrics.request_validation_duration.observe(embedded.validation_s)
    metrics.request_inference_duration.observe(embedded.inference_s)
    if logger.isEnabledFor(logging.INFO):
        span = {
            "name": "embed",
            "inputs": len(embedded.vectors.raw),
            "tokens": embedded.vectors.num_tokens,
            "total_time": duration_text(total_s),
            "validation_time": duration_text(embedded.validation_s),
            "inference_time": duration_text(embedded.inference_s),
        }
        logger.info("Success", extra={"span": span})


def loggable(parameters: GenerateParameters) -> dict[str, Any]:
    """The parameters without the client's texts: a stop sequence, a grammar or a name may quote the prompt."""
    fields = msgspec.structs.asdict(parameters)
    fields["stop"] = len(parameters.stop)
    fields["grammar"] = parameters.grammar is not None
    fields["adapter_id"] = parameters.adapter_id is not None
    return fields


def duration_text(seconds: float) -> str:
    """A duration as TGI's log prints it: 1.5s, 12.345678ms, 45.2µs."""
    for unit, factor, digits in (("s", 1.0, 9), ("ms", 1e3, 6), ("µs", 1e6, 3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.{digits}f}".rstrip("0").rstrip(".") + unit
    return f"{seconds * 1e9:.0f}ns"
