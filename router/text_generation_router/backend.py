"""The model's side of the router: connected, sized, and ready to take requests."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass

from text_generation_router.config import ConfigError, RouterConfig, RouterFlags, resolve, warmup_limits
from text_generation_router.detokenizer import Detokenizer
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
from text_generation_router.tokenizer import RouterTokenizer

logger = logging.getLogger(__name__)

SHARD_TIMEOUT_S = 24 * 3600.0
"""How long to wait for shards that load. The launcher watches them, and ends this process when one dies."""


class StartError(Exception):
    """The router cannot serve; the text is the one line that says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """The model's side of the router, ready to take requests."""

    info: ShardInfo
    config: RouterConfig
    tokenizer: RouterTokenizer
    metrics: Metrics
    inference: Inference
    batching: asyncio.Task[None]
    seconds: dict[str, float]
    """How long each step of the start took."""


@asynccontextmanager
async def start_backend(flags: RouterFlags) -> AsyncIterator[Backend]:
    """Connect to the shards, settle the limits, size the KV cache, start batching. Raises: StartError."""
    seconds: dict[str, float] = {}
    async with AsyncExitStack() as stack:
        with _timed(seconds, "connect"), _failing_as("Backend failed"):
            shards = await group.connect(flags.master_shard_uds_path, flags.launcher_nonce, SHARD_TIMEOUT_S)
        stack.push_async_callback(shards.close)
        info = shards.info
        with _failing_as("Argument validation error"):
            limits = warmup_limits(flags, info)
        with _timed(seconds, "warmup"), _failing_as("Backend failed"):
            warmed = await shards.warmup(limits)
        logger.info("KV-cache blocks: %s, size: %s (%s)", warmed.num_blocks, info.block_size, warmed.derivation)
        with _timed(seconds, "tokenizer"), _failing_as("WebServer error: Tokenizer error"):
            tokenizer = RouterTokenizer.load(
                info.tokenizer_path, vocab_size=info.vocab_size, num_workers=flags.validation_workers
            )
        stack.callback(tokenizer.close)
        with _failing_as("Argument validation error"):
            config = resolve(flags, info, warmed.num_blocks, tokenizer.model_max_length)
        metrics = Metrics(
            max_input_tokens=config.limits.max_input_tokens, max_total_tokens=config.limits.max_total_tokens
        )
        scheduler = StepScheduler(
            BatchLimits(
                max_batch_prefill_tokens=config.max_batch_prefill_tokens,
                max_batch_size=config.max_batch_size,
                max_inter_token_latency_s=config.max_inter_token_latency_s,
            ),
            Leases(BlockAllocator(warmed.num_blocks, info.block_size), prefix_caching=flags.prefix_caching),
            admission_hold(flags.waiting_served_ratio, flags.max_waiting_tokens),
        )
        detokenizer = Detokenizer(tokenizer.tokenizer, tokenizer.special_ids)
        batcher = Batcher(shards, scheduler, detokenizer, metrics)
        with _failing_as("Backend failed"):
            await _begin(shards)
        batching = asyncio.create_task(batcher.run(), name="batching")
        stack.push_async_callback(end_task, batching)
        yield Backend(
            info=info,
            config=config,
            tokenizer=tokenizer,
            metrics=metrics,
            inference=Inference(batcher, tokenizer, config.limits, metrics, config.max_concurrent_requests),
            batching=batching,
            seconds=seconds,
        )


async def _begin(shards: group.ShardGroup) -> None:
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
