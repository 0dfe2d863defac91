"""From flags to a server that answers, and down again: the one place where everything is put together."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Awaitable
from contextlib import AsyncExitStack
from importlib.metadata import version
from typing import TypeVar

from text_generation_proto.logs import send_event

from text_generation_router.api.generate import GenerateRoutes
from text_generation_router.api.schemas import Info
from text_generation_router.api.service import ServiceRoutes
from text_generation_router.app import Access, build_app, build_metrics_app
from text_generation_router.backend import Backend, StartError, end_task, start_backend
from text_generation_router.config import RouterFlags
from text_generation_router.draining import Drain, Shutdown
from text_generation_router.listening import HttpServer, bind, shown_address

logger = logging.getLogger(__name__)

CLOSE_S = 3.0
"""After the grace is over: time for the last errors to reach the clients."""

Result = TypeVar("Result")


async def serve(flags: RouterFlags, shutdown: Shutdown | None = None) -> int:
    """Serve until asked to stop; the exit code.

    0 after a drain, 128 + n when a second signal n cut it short, 1 when the batching loop died.
    Raises: StartError, BindError.
    """
    if shutdown is None:
        shutdown = Shutdown()
        shutdown.install()
    if flags.api_key is not None and not flags.api_key.strip():
        raise StartError("Argument validation error: `api_key` must not be empty")
    drain = Drain()
    async with AsyncExitStack() as stack:
        # Bound before anything is loaded: an address in use is found at once.
        sock = stack.enter_context(bind(flags.hostname, flags.port))
        metrics_sock = None
        if flags.prometheus_port is not None:
            metrics_sock = stack.enter_context(bind(flags.hostname, flags.prometheus_port))
        start = stack.enter_async_context(start_backend(flags))
        backend = await _unless_requested(shutdown, start)
        if backend is None:
            return 0
        service = ServiceRoutes(
            backend.tokenizer,
            backend.inference,
            backend.metrics,
            api_info(flags, backend),
            payload_limit=flags.payload_limit,
        )
        generate = GenerateRoutes(
            backend.inference,
            backend.metrics,
            payload_limit=flags.payload_limit,
            compute_type=flags.compute_type,
            full_text_by_default=backend.info.pipeline_tag in (None, "text-generation"),
        )
        access = Access(drain=drain, api_key=flags.api_key, cors_allow_origin=flags.cors_allow_origin)
        servers = [HttpServer(build_app(generate, service, access), sock)]
        if metrics_sock is not None:
            servers.append(HttpServer(build_metrics_app(service, Drain()), metrics_sock))
            logger.info("Metrics on %s", shown_address(metrics_sock))
        for server in servers:
            await server.listen()
        # What is there now stays: the collector need not look at it again on every full pass.
        gc.collect()
        gc.freeze()
        _announce(backend, shown_address(sock))
        code = await _until_end(flags, backend, shutdown, drain)
        await asyncio.gather(*(server.close() for server in servers))
        return code


def api_info(flags: RouterFlags, backend: Backend) -> Info:
    """The body of ``/info``."""
    limits = backend.config.limits
    return Info(
        model_id=backend.info.model_id,
        model_sha=backend.info.model_sha,
        model_pipeline_tag=backend.info.pipeline_tag,
        max_concurrent_requests=flags.max_concurrent_requests,
        max_best_of=limits.max_best_of,
        max_stop_sequences=limits.max_stop_sequences,
        max_input_tokens=limits.max_input_tokens,
        max_total_tokens=limits.max_total_tokens,
        validation_workers=flags.validation_workers,
        max_client_batch_size=flags.max_client_batch_size,
        router="text-generation-router",
        version=version("text-generation-inference"),
        sha=flags.git_sha,
        docker_label=flags.docker_label,
    )


def _announce(backend: Backend, address: str) -> None:
    config, limits = backend.config, backend.config.limits
    for name, value in (
        ("max_input_tokens", limits.max_input_tokens),
        ("max_total_tokens", limits.max_total_tokens),
        ("max_batch_prefill_tokens", config.max_batch_prefill_tokens),
        ("max_batch_total_tokens", config.max_batch_total_tokens),
    ):
        title = name.replace("max", "Maximum").replace("_", " ")
        logger.info("%s: %s (%s)", title, value, config.derivations[name])
    logger.info("Connected")
    send_event("ready", f"Listening on {address}", seconds=backend.seconds, address=address)


async def _until_end(flags: RouterFlags, backend: Backend, shutdown: Shutdown, drain: Drain) -> int:
    requested = asyncio.create_task(shutdown.requested.wait())
    await asyncio.wait((requested, backend.batching), return_when=asyncio.FIRST_COMPLETED)
    requested.cancel()
    code = 0
    if backend.batching.done():
        # It ends only by a defect. Nothing can be served any more; what waits has been failed.
        logger.error("The batching loop ended", exc_info=_error_of(backend.batching))
        code = 1
    drain.begin()
    backend.inference.draining = True
    if code == 0:
        logger.info("Shutting down: %s requests are in progress", drain.num_active)
        await _drained(drain, flags.graceful_termination_timeout, shutdown)
        if shutdown.signal is not None:
            code = 128 + shutdown.signal
    # Ends what is still running: every client gets an error, none a connection that just breaks.
    await end_task(backend.batching)
    if not await drain.idle(CLOSE_S):
        logger.warning("%s requests did not end in time", drain.num_active)
    return code


async def _drained(drain: Drain, timeout_s: float, shutdown: Shutdown) -> None:
    idle = asyncio.create_task(drain.idle(timeout_s))
    forced = asyncio.create_task(shutdown.forced.wait())
    await asyncio.wait((idle, forced), return_when=asyncio.FIRST_COMPLETED)
    idle.cancel()
    forced.cancel()


async def _unless_requested(shutdown: Shutdown, work: Awaitable[Result]) -> Result | None:
    """The result of ``work``, or None when a shutdown is requested before it is there."""
    working = asyncio.ensure_future(work)
    requested = asyncio.create_task(shutdown.requested.wait())
    await asyncio.wait((working, requested), return_when=asyncio.FIRST_COMPLETED)
    requested.cancel()
    if working.done():
        return working.result()
    working.cancel()
    await asyncio.wait((working,))
    return None


def _error_of(task: asyncio.Task[None]) -> BaseException | None:
    return None if task.cancelled() else task.exception()
