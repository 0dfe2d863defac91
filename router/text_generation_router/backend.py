"""The model's side of the router: connected, sized, and ready to take requests."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from text_generation_router.admission import Admission
from text_generation_router.api.caller import tenant_of_key
from text_generation_router.chat.template import ROOM_FOR_TEMPLATE, ChatTemplates, load_template
from text_generation_router.config import ConfigError, RouterConfig, RouterFlags, check_counts, resolve, warmup_limits
from text_generation_router.detokenizer import Detokenizer
from text_generation_router.embedding.batches import EncoderBatcher
from text_generation_router.embedding.embedder import Embedder, EncoderEmbedder, SequenceEmbedder
from text_generation_router.guidance.guidance import Guidance
from text_generation_router.inference import Inference
from text_generation_router.metrics import Metrics
from text_generation_router.scheduling.batcher import Batcher
from text_generation_router.scheduling.blocks import BlockAllocator
from text_generation_router.scheduling.budget import BatchLimits
from text_generation_router.scheduling.leases import Leases
from text_generation_router.scheduling.queue import admission_hold
from text_generation_router.scheduling.steps import StepScheduler
from text_generation_router.shards import group
from text_generation_router.shards.convert import ShardInfo
from text_generation_router.shards.group import ShardGroup
from text_generation_router.tokenizer import RouterTokenizer

logger = logging.getLogger(__name__)

SHARD_TIMEOUT_S = 24 * 3600.0
"""How long to wait for shards that load. The launcher watches them, and ends this process when one dies."""


ENCODER_BATCH_TOKENS = {"cpu": 4096, "cuda": 16_384}
"""Of one batch of texts: enough to keep the device busy, few enough that nobody waits long behind others."""
FLOAT_BYTES = 4


class StartError(Exception):
    """The router cannot serve; the text is the one line that says why."""


class Door(Protocol):
    """Where requests come in."""

    def drain(self) -> None:
        """Take nothing new. What runs may finish."""

    def give_up(self) -> None:
        """No shard will be started again: what waits for one fails."""

    def ready(self) -> bool:
        """Whether a request sent now would be served; never waits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationBackend:
    config: RouterConfig
    templates: ChatTemplates | None
    """None: the model has none, and answers no chats."""
    inference: Inference


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """The model's side of the router, ready to take requests."""

    info: ShardInfo
    tokenizer: RouterTokenizer
    metrics: Metrics
    admission: Admission
    door: Door
    generation: GenerationBackend | None
    """None: the model embeds, and generates nothing."""
    embedder: Embedder | None
    """None: the model hands out no hidden states."""
    max_input_tokens: int
    batching: asyncio.Task[None]
    seconds: dict[str, float]
    """How long each step of the start took."""


@asynccontextmanager
async def start_backend(flags: RouterFlags) -> AsyncIterator[Backend]:
    """Connect to the shards, settle the limits, size the KV cache, start batching. Raises: StartError."""
    seconds: dict[str, float] = {}
    async with AsyncExitStack() as stack:
        with _timed(seconds, "connect"), _failing_as("Backend failed"):
            shards = await group.connect(
                flags.master_shard_uds_path,
                flags.launcher_nonce,
                SHARD_TIMEOUT_S,
                stall_timeout_s=flags.stall_timeout,
                restarts=flags.max_shard_restarts > 0,
            )
        stack.push_async_callback(shards.close)
        start = _start_encoder if shards.info.is_encoder else _start_generation
        yield await start(flags, shards, stack, seconds)


async def _start_generation(
    flags: RouterFlags, shards: ShardGroup, stack: AsyncExitStack, seconds: dict[str, float]
) -> Backend:
    info = shards.info
    guidance = Guidance(info.tokenizer_path, info.vocab_size, sorted(info.eos_token_ids), shards.compile_grammar)
    stack.push_async_callback(guidance.close)
    if not flags.disable_grammar_support:
        guidance.prepare()
    with _failing_as("Argument validation error"):
        limits = warmup_limits(flags, info)
    with _timed(seconds, "warmup"), _failing_as("Backend failed"):
        warmed = await shards.warmup(limits)
    logger.info("KV-cache blocks: %s, size: %s (%s)", warmed.num_blocks, info.block_size, warmed.derivation)
    tokenizer = _load_tokenizer(flags, info, stack, seconds)
    with _failing_as("Argument validation error"):
        templates = load_template(
            _folder_of(info.tokenizer_path),
            flags.tokenizer_config_path,
            max_characters=flags.payload_limit + ROOM_FOR_TEMPLATE,
            num_workers=flags.validation_workers,
        )
    if templates is not None:
        stack.callback(templates.close)
    with _failing_as("Argument validation error"):
        config = resolve(flags, info, warmed.num_blocks, tokenizer.model_max_length)
    metrics = Metrics(max_input_tokens=config.limits.max_input_tokens, max_total_tokens=config.limits.max_total_tokens)
    scheduler = StepScheduler(
        BatchLimits(
            max_batch_prefill_tokens=config.max_batch_prefill_tokens,
            max_batch_size=config.max_batch_size,
            max_inter_token_latency_s=config.max_inter_token_latency_s,
        ),
        Leases(BlockAllocator(warmed.num_blocks, info.block_size), prefix_caching=flags.prefix_caching),
        admission_hold(flags.waiting_served_ratio, flags.max_waiting_tokens),
        fair_shares=flags.fair_shares,
    )
    detokenizer = Detokenizer(tokenizer.tokenizer, tokenizer.special_ids)
    batcher = Batcher(shards, scheduler, detokenizer, metrics, max_queue_size=flags.max_queue_size)
    with _timed(seconds, "grammars"):
        await guidance.prepared()
    with _failing_as("Backend failed"):
        await _begin(shards)
    batching = asyncio.create_task(batcher.run(), name="batching")
    stack.push_async_callback(end_task, batching)
    admission = Admission(batcher.backlog, config.max_concurrent_requests, _tenants(flags))
    inference = Inference(batcher, tokenizer, config.limits, metrics, guidance, admission)
    return Backend(
        info=info,
        tokenizer=tokenizer,
        metrics=metrics,
        admission=admission,
        door=inference,
        generation=GenerationBackend(config=config, templates=templates, inference=inference),
        embedder=None if info.embedding is None else SequenceEmbedder(inference, tokenizer, info.embedding),
        max_input_tokens=config.limits.max_input_tokens,
        batching=batching,
        seconds=seconds,
    )


async def _start_encoder(
    flags: RouterFlags, shards: ShardGroup, stack: AsyncExitStack, seconds: dict[str, float]
) -> Backend:
    info = shards.info
    assert info.embedding is not None, "an encoder embeds"
    with _failing_as("Argument validation error"):
        check_counts(flags)
        longest = info.embedding.max_input_tokens
        max_tokens = flags.max_batch_prefill_tokens or ENCODER_BATCH_TOKENS.get(info.device_type, longest)
    tokenizer = _load_tokenizer(flags, info, stack, seconds)
    metrics = Metrics(max_input_tokens=longest, max_total_tokens=longest)
    batcher = EncoderBatcher(
        shards,
        metrics=metrics,
        max_tokens=max_tokens,
        vector_bytes=info.embedding.dimensions * FLOAT_BYTES,
        max_queue_size=flags.max_queue_size,
    )
    batching = asyncio.create_task(batcher.run(), name="batching")
    stack.push_async_callback(end_task, batching)
    admission = Admission(batcher.backlog, flags.max_concurrent_requests, _tenants(flags))
    embedder = EncoderEmbedder(batcher, tokenizer, info.embedding, metrics, admission, vocab_size=info.vocab_size)
    return Backend(
        info=info,
        tokenizer=tokenizer,
        metrics=metrics,
        admission=admission,
        door=embedder,
        generation=None,
        embedder=embedder,
        max_input_tokens=longest,
        batching=batching,
        seconds=seconds,
    )


def _tenants(flags: RouterFlags) -> frozenset[bytes]:
    """Who shares the server, where that is known."""
    keys = flags.api_keys if flags.fair_shares else ()
    return frozenset(tenant_of_key(key.encode()) for key in keys)


def _load_tokenizer(
    flags: RouterFlags, info: ShardInfo, stack: AsyncExitStack, seconds: dict[str, float]
) -> RouterTokenizer:
    with _timed(seconds, "tokenizer"), _failing_as("WebServer error: Tokenizer error"):
        tokenizer = RouterTokenizer.load(
            info.tokenizer_path, vocab_size=info.vocab_size, num_workers=flags.validation_workers
        )
    stack.callback(tokenizer.close)
    return tokenizer


def _folder_of(tokenizer_path: str) -> Path:
    path = Path(tokenizer_path)
    return path if path.is_dir() else path.parent


async def _begin(shards: ShardGroup) -> None:
    """Have the shards take steps: whoever is told that the server is ready may ask for its health at once.

    Raises: ConfigError.
    """
    try:
        await shards.reset()
    except group.ShardUnreachable as error:
        raise ConfigError(f"the model shards do not answer any more: {error}") from error


async def end_task(task: asyncio.Task[None]) -> None:
    """Cancel a task, and wait until it has cleaned up; harmless for one that has ended."""
    task.cancel()
    await asyncio.wait((task,))


@contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[step] = round(time.perf_counter() - started, 3)


@contextmanager
def _failing_as(prefix: str) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        raise StartError(f"{prefix}: {error}") from None
