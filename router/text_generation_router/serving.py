"""From flags to a server that answers, and down again: the one place where everything is put together."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Awaitable, Sequence
from contextlib import AsyncExitStack
from importlib.metadata import version
from typing import Any, TypeVar

from text_generation_proto.logs import send_event

from text_generation_router.api.anthropic.messages import MessageRoutes
from text_generation_router.api.embeddings import EmbeddingRoutes
from text_generation_router.api.generate import GenerateRoutes
from text_generation_router.api.headers import header_value
from text_generation_router.api.openai.answers import Answers
from text_generation_router.api.openai.chat import ChatRoutes
from text_generation_router.api.openai.completions import CompletionRoutes
from text_generation_router.api.openai.models import ModelRoutes
from text_generation_router.api.openai.responses import ResponseRoutes
from text_generation_router.api.platforms import SharedPaths, VertexRoutes
from text_generation_router.api.schemas import Info
from text_generation_router.api.served import Served
from text_generation_router.api.service import ServiceRoutes
from text_generation_router.app import Access, GeneratingRoutes, Routes, build_app, build_metrics_app, build_turnstile
from text_generation_router.backend import Backend, GenerationBackend, StartError, end_task, start_backend
from text_generation_router.chat.plain_text import PlainText
from text_generation_router.chat.reasoning import REASONING_MARKS
from text_generation_router.chat.tools import FORMATS
from text_generation_router.config import RouterConfig, RouterFlags
from text_generation_router.draining import Drain, Shutdown
from text_generation_router.listening import (
    METRICS_CONNECTIONS,
    HttpServer,
    Tls,
    bind,
    connections_that_fit,
    shown_address,
)
from text_generation_router.token_bytes import TokenBytes

logger = logging.getLogger(__name__)

YOUNG_OBJECTS = 5_000
"""So many more than before, and the collector looks through them. A token of each of 256 streams is 1,500, which are
gone a moment later: to look through them twice a step, as Python does by itself, is a tenth of what the step costs."""
LAST_ERRORS_S = 3.0
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
    _check_keys(flags)
    _check_parsers(flags)
    tls = _tls(flags)
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
        shutdown.on_shards_gone = backend.door.give_up
        service = ServiceRoutes(
            backend.tokenizer,
            backend.door,
            backend.metrics,
            api_info(flags, backend),
            payload_limit=flags.payload_limit,
        )
        access = Access(
            drain=drain,
            admission=backend.admission,
            metrics=backend.metrics,
            api_keys=flags.api_keys,
            cors_allow_origin=flags.cors_allow_origin,
            aip_predict_route=flags.aip_predict_route,
            aip_health_route=flags.aip_health_route,
        )
        routes = make_routes(flags, backend, service)
        app, turnstile = build_app(routes, access), build_turnstile(routes, access)
        servers = [HttpServer(app, sock, tls, turnstile=turnstile, max_connections=connections_that_fit())]
        if metrics_sock is not None:
            metrics_app = build_metrics_app(service, Drain())
            servers.append(HttpServer(metrics_app, metrics_sock, tls, max_connections=METRICS_CONNECTIONS))
            logger.info("Metrics on %s", shown_address(metrics_sock))
        for server in servers:
            await server.listen()
        # What is there now stays: the collector need not look at it again on every full pass.
        gc.collect()
        gc.freeze()
        # Full passes come about as often as by themselves: what a connection leaves behind is a cycle.
        gc.set_threshold(YOUNG_OBJECTS, 5, 4)
        _announce(backend, shown_address(sock))
        code = await _until_end(flags, backend, shutdown, drain)
        if code:
            await _close(servers, 0.0)
            return code
        closing = asyncio.create_task(_close(servers, flags.graceful_termination_timeout - drain.age_s))
        await _until_forced(closing, shutdown)
        if shutdown.signal is not None:
            code = 128 + shutdown.signal
            for server in servers:
                server.force_exit = True
        await closing
        return code


def make_routes(flags: RouterFlags, backend: Backend, service: ServiceRoutes) -> Routes:
    """The handlers for what the model can do."""
    generation = backend.generation
    served = Served(
        metrics=backend.metrics,
        model_id=backend.info.model_id,
        created=int(time.time()),
        payload_limit=flags.payload_limit,
        compute_type=header_value(flags.compute_type),
    )
    embeddings = None if backend.embedder is None else EmbeddingRoutes(served, backend.embedder)
    if generation is None:
        assert embeddings is not None, "a model does something"
        shared = SharedPaths(
            inputs=embeddings.embed, texts=None, others={"input": embeddings.openai}, payload_limit=flags.payload_limit
        )
        generating = None
    else:
        generating = _generating_routes(flags, backend, generation, served)
        shared = SharedPaths(
            inputs=generating.generate.compat_generate,
            texts=None if embeddings is None else embeddings.embed,
            others={"messages": generating.chat.completions, "prompt": generating.completions.completions},
            payload_limit=flags.payload_limit,
        )
    return Routes(
        service=service,
        models=ModelRoutes(served),
        shared=shared,
        generating=generating,
        embeddings=embeddings,
        model_id=backend.info.model_id,
    )


def _generating_routes(
    flags: RouterFlags, backend: Backend, generation: GenerationBackend, served: Served
) -> GeneratingRoutes:
    inference = generation.inference
    answers = Answers(
        served=served,
        inference=inference,
        tokenizer=backend.tokenizer,
        texts=TokenBytes(backend.tokenizer.tokenizer),
        fingerprint=f"{version('text-generation-inference')}-{flags.docker_label or 'native'}",
        max_client_batch_size=flags.max_client_batch_size,
        prefill_logprobs=backend.info.prefill_logprobs,
    )
    chat = ChatRoutes(
        answers,
        generation.templates,
        tool_call_parser=flags.tool_call_parser,
        reasoning_parser=flags.reasoning_parser,
        plain_text=PlainText(backend.tokenizer.special_texts()) if flags.safe_special_tokens else None,
    )
    return GeneratingRoutes(
        generate=GenerateRoutes(
            inference,
            backend.metrics,
            payload_limit=flags.payload_limit,
            compute_type=flags.compute_type,
            full_text_by_default=backend.info.pipeline_tag in (None, "text-generation"),
        ),
        chat=chat,
        completions=CompletionRoutes(answers),
        messages=MessageRoutes(answers, chat),
        responses=ResponseRoutes(answers, chat),
        vertex=VertexRoutes(
            inference,
            backend.metrics,
            chat,
            payload_limit=flags.payload_limit,
            max_client_batch_size=flags.max_client_batch_size,
        ),
    )


def _check_keys(flags: RouterFlags) -> None:
    if not all(flags.api_keys):
        raise StartError("Argument validation error: `api_key` must not be empty")


def _tls(flags: RouterFlags) -> Tls | None:
    """Raises: StartError, BindError."""
    if flags.tls_cert is None and flags.tls_key is None:
        return None
    if flags.tls_cert is None or flags.tls_key is None:
        raise StartError("Argument validation error: `tls_cert` and `tls_key` come together")
    tls = Tls(flags.tls_cert, flags.tls_key)
    tls.check()
    return tls


def _check_parsers(flags: RouterFlags) -> None:
    for name, given, known in (
        ("tool_call_parser", flags.tool_call_parser, [form.name for form in FORMATS]),
        ("reasoning_parser", flags.reasoning_parser, list(REASONING_MARKS)),
    ):
        if given is not None and given not in known:
            raise StartError(f"Argument validation error: `{name}` must be one of {', '.join(known)}. Given: {given}")


def api_info(flags: RouterFlags, backend: Backend) -> Info:
    """The body of ``/info``."""
    longest = backend.max_input_tokens
    limits = None if backend.generation is None else backend.generation.config.limits
    return Info(
        model_id=backend.info.model_id,
        model_sha=backend.info.model_sha,
        model_pipeline_tag=backend.info.pipeline_tag,
        max_concurrent_requests=flags.max_concurrent_requests,
        max_best_of=flags.max_best_of,
        max_stop_sequences=flags.max_stop_sequences,
        max_input_tokens=longest,
        max_total_tokens=longest if limits is None else limits.max_total_tokens,
        validation_workers=flags.validation_workers,
        max_client_batch_size=flags.max_client_batch_size,
        router="text-generation-router",
        version=version("text-generation-inference"),
        sha=flags.git_sha,
        docker_label=flags.docker_label,
    )


def _announce(backend: Backend, address: str) -> None:
    if backend.generation is None:
        logger.info("Maximum input tokens: %s", backend.max_input_tokens)
    else:
        _announce_limits(backend.generation.config)
    logger.info("Connected")
    send_event("ready", f"Listening on {address}", seconds=backend.seconds, address=address)


def _announce_limits(config: RouterConfig) -> None:
    for name, value in (
        ("max_input_tokens", config.limits.max_input_tokens),
        ("max_total_tokens", config.limits.max_total_tokens),
        ("max_batch_prefill_tokens", config.max_batch_prefill_tokens),
        ("max_batch_total_tokens", config.max_batch_total_tokens),
    ):
        title = name.replace("max", "Maximum").replace("_", " ")
        logger.info("%s: %s (%s)", title, value, config.derivations[name])


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
    backend.door.drain()
    if code == 0:
        logger.info("Shutting down: %s requests are in progress", drain.num_active)
        await _drained(drain, flags.graceful_termination_timeout, shutdown)
        if shutdown.signal is not None:
            code = 128 + shutdown.signal
    # Ends what is still running: every client gets an error, none a connection that just breaks.
    await end_task(backend.batching)
    if not await drain.idle(LAST_ERRORS_S):
        logger.warning("%s requests did not end in time", drain.num_active)
    return code


async def _close(servers: Sequence[HttpServer], timeout_s: float) -> None:
    """Have clients take what is left for them."""
    await asyncio.gather(*(server.close(timeout_s) for server in servers))


async def _until_forced(work: asyncio.Task[Any], shutdown: Shutdown) -> None:
    """Wait for its end, or for a second signal."""
    forced = asyncio.create_task(shutdown.forced.wait())
    await asyncio.wait((work, forced), return_when=asyncio.FIRST_COMPLETED)
    forced.cancel()


async def _drained(drain: Drain, timeout_s: float, shutdown: Shutdown) -> None:
    idle = asyncio.create_task(drain.idle(timeout_s))
    await _until_forced(idle, shutdown)
    idle.cancel()


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
