"""The whole HTTP side of the router in front of a batcher that follows a script instead of running a model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import InitVar, dataclass, field
from importlib.metadata import version
from typing import Any, cast

import httpx2
from builders import byte_tokenizer
from starlette.types import ASGIApp
from text_generation_proto.grammars import Grammar
from text_generation_router.admission import Admission
from text_generation_router.api.edge import Turnstile
from text_generation_router.api.schemas import Info
from text_generation_router.api.service import ServiceRoutes
from text_generation_router.app import Access, build_app, build_turnstile
from text_generation_router.backend import Backend, GenerationBackend
from text_generation_router.chat.template import ChatTemplate, ChatTemplates
from text_generation_router.config import Limits, RouterConfig, RouterFlags
from text_generation_router.draining import Drain
from text_generation_router.embedding.embedder import SequenceEmbedder
from text_generation_router.errors import RouterError
from text_generation_router.guidance.guidance import Guidance
from text_generation_router.inference import Inference
from text_generation_router.listening import HttpServer, bind
from text_generation_router.metrics import Metrics
from text_generation_router.scheduling.backlog import Backlog
from text_generation_router.scheduling.batcher import Batcher
from text_generation_router.scheduling.door import Door
from text_generation_router.scheduling.requests import (
    Finished,
    FinishReason,
    QueuedRequest,
    RequestTimings,
    Token,
    TokenEvent,
)
from text_generation_router.serving import make_routes
from text_generation_router.shards.convert import EmbeddingInfo, ShardInfo
from text_generation_router.tokenizer import RouterTokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

FINGERPRINT = f"{version('text-generation-inference')}-native"

EOS = Token(256, "</s>", -0.25, special=True)

Script = Callable[[QueuedRequest], None]


def limits(**changes: Any) -> Limits:
    defaults: dict[str, Any] = {
        "max_best_of": 2,
        "max_stop_sequences": 4,
        "max_top_n_tokens": 5,
        "max_input_tokens": 100,
        "max_total_tokens": 120,
        "vocab_size": 512,
        "disable_grammar_support": False,
    }
    return Limits(**{**defaults, **changes})


def finished(text: str, num_tokens: int, queued: QueuedRequest, reason: FinishReason = FinishReason.LENGTH) -> Finished:
    sampling = queued.request.sampling
    return Finished(
        generated_text=text,
        finish_reason=reason,
        generated_tokens=num_tokens,
        seed=sampling.seed if sampling.do_sample else None,
        input_length=queued.num_prompt_tokens,
        cached_tokens=0,
        timings=RequestTimings(validation_s=0.001, queue_s=0.002, inference_s=0.3, total_s=0.303),
    )


def say(queued: QueuedRequest, *words: str, end: bool = True) -> None:
    """Put one token for each word; the last one ends the generation unless told otherwise."""
    first = len(queued.output_ids)
    for index, word in enumerate(words, first + 1):
        queued.output_ids.append(index)
        top_n = queued.request.top_n_tokens
        top = [Token(1000 + i, f"top{i}", -1.5 - i, special=False) for i in range(top_n)] if top_n else None
        event = TokenEvent(index, Token(index, word, -0.5 * index, special=False), top)
        if end and index == first + len(words):
            event.finished = finished("".join(words), index, queued)
        queued.stream.put(event)
    if end:
        queued.stream.close()


def hello(queued: QueuedRequest) -> None:
    """The default script."""
    say(queued, "Hel", "lo", " wörld")


def silence(queued: QueuedRequest) -> None:
    """A request that waits, or computes, for ever."""


@dataclass
class ScriptedBatcher:
    """Stands in for `Batcher`."""

    script: Script = hello
    max_queue_size: InitVar[int | None] = None
    is_ready: bool = True
    running: list[QueuedRequest] = field(default_factory=list)
    """Every request that was enqueued and not cancelled; `Generation` cancels all of them when it is left."""
    seen: list[QueuedRequest] = field(default_factory=list)
    door: Door = field(default_factory=lambda: Door(lambda: None))

    def __post_init__(self, max_queue_size: int | None) -> None:
        self.backlog = Backlog(lambda: len(self.running), max_queue_size)

    def enqueue(self, queued: QueuedRequest) -> None:
        self.running.append(queued)
        self.seen.append(queued)
        self.script(queued)

    def cancel(self, queued: QueuedRequest) -> None:
        if queued in self.running:
            self.running.remove(queued)

    def ready(self) -> bool:
        return self.is_ready

    def expire(self, queued: QueuedRequest, error: RouterError) -> None:
        if queued in self.running:
            self.running.remove(queued)
            queued.stream.fail(error)

    def give_up(self) -> None:
        pass


@dataclass
class Router:
    app: ASGIApp
    batcher: ScriptedBatcher
    inference: Inference
    metrics: Metrics
    drain: Drain
    turnstile: Turnstile
    """In front of what is reached over a socket."""
    client: httpx2.AsyncClient
    server: HttpServer | None

    @property
    def permits_taken(self) -> int:
        return self.inference.admission.permits.num_taken

    def take_any_grammar(self) -> None:
        """Without a worker that compiles it."""
        self.inference._guidance.admit = _compiled  # type: ignore[method-assign]

    async def idle(self) -> None:
        """Wait until nothing is left of the requests so far."""
        async with asyncio.timeout(5):
            while self.batcher.running or self.permits_taken or self.drain.num_active:  # noqa: ASYNC110  # what it watches sets no event
                await asyncio.sleep(0.002)


async def _compiled(grammar: Grammar) -> None:
    """What a shard does that takes any grammar."""


def info(**changes: Any) -> Info:
    defaults: dict[str, Any] = {
        "model_id": "test/model",
        "model_sha": None,
        "model_pipeline_tag": None,
        "max_concurrent_requests": 128,
        "max_best_of": 2,
        "max_stop_sequences": 4,
        "max_input_tokens": 100,
        "max_total_tokens": 120,
        "validation_workers": 2,
        "max_client_batch_size": 4,
        "router": "text-generation-router",
        "version": "4.0.0",
        "sha": None,
        "docker_label": None,
    }
    return Info(**{**defaults, **changes})


def shard_info(**changes: Any) -> ShardInfo:
    defaults: dict[str, Any] = {
        "model_id": "test/model",
        "model_sha": None,
        "pipeline_tag": None,
        "device_type": "cpu",
        "block_size": 4,
        "tokenizer_path": "",
        "eos_token_ids": frozenset({256}),
        "vocab_size": 512,
        "max_position_embeddings": 120,
        "prefill_logprobs": False,
        "is_encoder": False,
        "embedding": EmbeddingInfo(dimensions=2),
    }
    return ShardInfo(**{**defaults, **changes})


def resolved(the_limits: Limits) -> RouterConfig:
    return RouterConfig(
        limits=the_limits,
        max_concurrent_requests=128,
        max_batch_prefill_tokens=512,
        max_batch_total_tokens=4096,
        max_batch_size=None,
        max_inter_token_latency_s=None,
    )


@asynccontextmanager
async def running(
    *,
    script: Script = hello,
    max_concurrent_requests: int = 128,
    max_queue_size: int | None = None,
    api_key: str | None = None,
    origins: tuple[str, ...] = (),
    payload_limit: int = 2_000_000,
    full_text_by_default: bool = True,
    chat_template: str | None = CHAT_TEMPLATE,
    reasoning_parser: str | None = None,
    safe_special_tokens: bool = False,
    prefill_logprobs: bool = False,
    over_socket: bool = False,
    max_connections: int | None = None,
    **limit_changes: Any,
) -> AsyncIterator[Router]:
    """A router and a client of it: in process, or ``over_socket`` through uvicorn."""
    the_limits = limits(**limit_changes)
    metrics = Metrics(max_input_tokens=the_limits.max_input_tokens, max_total_tokens=the_limits.max_total_tokens)
    tokenizer = RouterTokenizer(byte_tokenizer(), vocab_size=the_limits.vocab_size, num_workers=2)
    batcher = ScriptedBatcher(script, max_queue_size)
    guidance = Guidance("no tokenizer", the_limits.vocab_size, [256], compile_on_shard=_compiled)
    admission = Admission(batcher.backlog, max_concurrent_requests)
    inference = Inference(cast("Batcher", batcher), tokenizer, the_limits, metrics, guidance, admission)
    service = ServiceRoutes(tokenizer, inference, metrics, info(), payload_limit=payload_limit)
    drain = Drain()
    templates = None
    if chat_template is not None:
        template = ChatTemplate(chat_template, {"eos_token": "</s>"})
        templates = ChatTemplates(template, template)
    flags = RouterFlags(
        payload_limit=payload_limit,
        compute_type="cpu",
        reasoning_parser=reasoning_parser,
        safe_special_tokens=safe_special_tokens,
    )
    backend = Backend(
        info=shard_info(
            pipeline_tag=None if full_text_by_default else "conversational", prefill_logprobs=prefill_logprobs
        ),
        tokenizer=tokenizer,
        metrics=metrics,
        admission=admission,
        door=inference,
        generation=GenerationBackend(config=resolved(the_limits), templates=templates, inference=inference),
        embedder=SequenceEmbedder(inference, tokenizer, EmbeddingInfo(dimensions=2)),
        max_input_tokens=the_limits.max_input_tokens,
        batching=asyncio.create_task(asyncio.sleep(0)),
        seconds={},
    )
    routes = make_routes(flags, backend, service)
    access = Access(
        drain=drain,
        admission=admission,
        metrics=metrics,
        api_keys=() if api_key is None else (api_key,),
        cors_allow_origin=origins,
    )
    app = build_app(routes, access)
    turnstile = build_turnstile(routes, access)
    server = None
    if over_socket:
        sock = bind("127.0.0.1", 0)
        server = HttpServer(app, sock, turnstile=turnstile, max_connections=max_connections)
        await server.listen()
        host, port = sock.getsockname()
        limits_of_client = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        client = httpx2.AsyncClient(base_url=f"http://{host}:{port}", limits=limits_of_client, timeout=10)
    else:
        transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
        client = httpx2.AsyncClient(transport=transport, base_url="http://router")
    try:
        async with client:
            yield Router(app, batcher, inference, metrics, drain, turnstile, client, server)
    finally:
        if server is not None:
            await server.close()
        tokenizer.close()
        if templates is not None:
            templates.close()
