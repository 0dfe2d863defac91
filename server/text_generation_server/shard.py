"""The life of one shard once its model is found: load, listen, serve, end."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import logging
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any, Protocol

import torch
from text_generation_proto.logs import send_event
from text_generation_proto.v1 import generate_pb2 as pb
from text_generation_proto.v1.generate_pb2_grpc import TextGenerationServicer

from text_generation_server.attention import registry
from text_generation_server.config import ShardConfig
from text_generation_server.distributed import Group, join
from text_generation_server.embedding.encoder import Encoder, EncoderInfo, is_encoder, load_encoder
from text_generation_server.embedding.recipe import Pooling
from text_generation_server.embedding.service import EncoderEngine, EncoderService
from text_generation_server.engine.cuda_graphs import with_graphs
from text_generation_server.engine.engine import Engine, compute_thread
from text_generation_server.engine.memory import KVPlan, WarmupLimits
from text_generation_server.errors import first_line
from text_generation_server.generation.guidance import Guidance
from text_generation_server.generation.watermark import Watermark
from text_generation_server.library_logs import route_library_logs
from text_generation_server.model.footprint import Footprint
from text_generation_server.model.loader import load_model
from text_generation_server.model.runner import ModelInfo, ModelRunner
from text_generation_server.model.transformers_runner import TransformersRunner
from text_generation_server.planning import plan_loaded, read_device, require_room
from text_generation_server.rpc.server import listen
from text_generation_server.rpc.service import TextGenerationService
from text_generation_server.serve import stop_signals, timed
from text_generation_server.weights.download import EVENT_INTERVAL_S
from text_generation_server.weights.hub import ModelSource
from text_generation_server.weights.tokenizer import tokenizer_eos_ids, tokenizer_folder

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 5.0
"""For the step that runs when the shard is told to end; a rank whose peers are gone would wait for ever."""
FAREWELL_S = 1.0
"""For the router to read why the last step failed, when the shard ends with it."""


def run_shard(
    config: ShardConfig,
    source: ModelSource,
    env: Mapping[str, str],
    seconds: dict[str, float],
    on_ready: Callable[[], None],
) -> int:
    """Serve ``source`` until SIGTERM, or until no step can be computed any more; returns the exit code.

    ``seconds`` has what starting took so far, by step.

    Raises: ConfigError if it cannot start.
    """
    route_library_logs("huggingface_hub", "transformers")
    compute = compute_thread(_num_threads(config, env))
    with timed(seconds, "join"):
        group = compute.submit(join, config).result()
    with timed(seconds, "plan"):
        embeds = compute.submit(is_encoder, config, source.folder).result()
        if not embeds:
            found = compute.submit(_require_room, config, source.folder, group).result()
    # All is imported. What loading a model leaves behind is as large as the model, and has to go.
    gc.freeze()
    gc.enable()
    if embeds:
        return _run_encoder(config, source, compute, group, seconds, on_ready)
    with contextlib.ExitStack() as stack:
        with timed(seconds, "load"):
            tokenizer = stack.enter_context(tokenizer_folder(source.folder, trust_remote_code=config.trust_remote_code))
            runner = compute.submit(load_model, config, source.folder, group, _progress_reporter()).result()
        compute.submit(_log_model, runner.info).result()  # each thread has its own number of threads
        info = _info(config, source, runner, tokenizer)
        guidance = None
        if config.rank == 0:  # who samples
            guidance = Guidance(Path(info.tokenizer_path), info.vocab_size, info.eos_token_ids)
            guidance.prepare()
        engine = Engine(
            with_graphs(runner, config.cuda_graphs, max_total_tokens=config.max_total_tokens),
            lambda _, limits: _plan(runner, limits, found, config),
            block_size=config.block_size,
            prefill_logprobs=config.prefill_logprobs,
            is_leader=config.rank == 0,
            broadcast=_broadcast(group),
            compute=compute,
            guidance=guidance,
            watermark=Watermark(config.watermark_gamma, config.watermark_delta),
        )
        runner.on_progress = engine.note_progress
        # What is alive now stays: no collection between two steps looks at a million objects of the libraries again.
        gc.collect()
        gc.freeze()
        running = engine.start()
        service = TextGenerationService(engine, info, guidance)
        code = asyncio.run(_serve(config, engine, running, service, seconds, on_ready))
    if running.done() and running.exception() is None:  # else it would wait for peers that are gone
        compute.submit(group.close).result()
    return code


def _run_encoder(
    config: ShardConfig,
    source: ModelSource,
    compute: Executor,
    group: Group,
    seconds: dict[str, float],
    on_ready: Callable[[], None],
) -> int:
    """The same for a model that embeds: no KV cache, no steps."""
    with contextlib.ExitStack() as stack:
        with timed(seconds, "load"):
            tokenizer = stack.enter_context(tokenizer_folder(source.folder, trust_remote_code=config.trust_remote_code))
            encoder = compute.submit(load_encoder, config, source.folder, group.device, _progress_reporter()).result()
        compute.submit(_log_model, encoder.info).result()
        engine = EncoderEngine(encoder, compute)
        gc.collect()
        gc.freeze()
        service = EncoderService(engine, _encoder_info(config, source, encoder, tokenizer))
        return asyncio.run(_serve(config, engine, engine.start(), service, seconds, on_ready))


class Stoppable(Protocol):
    def stop(self, timeout_s: float) -> bool:
        """End once what runs has ended; whether that was in time."""


async def _serve(
    config: ShardConfig,
    engine: Stoppable,
    running: Future[None],
    service: TextGenerationServicer,
    seconds: dict[str, float],
    on_ready: Callable[[], None],
) -> int:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in stop_signals(config):
        loop.add_signal_handler(number, ended.set)
    running.add_done_callback(lambda _: loop.call_soon_threadsafe(ended.set))
    try:
        with timed(seconds, "listen"):
            listener = await listen(service, Path(f"{config.uds_path}-{config.rank}"))
        try:
            rounded = {step: round(duration, 3) for step, duration in seconds.items()}
            on_ready()
            send_event("ready", f"shard {config.rank} listens on {listener.url}", rank=config.rank, seconds=rounded)
            await ended.wait()
            code = _say_why(config.rank, running)
        finally:
            await listener.close(FAREWELL_S if running.done() else 0.0)
    finally:
        if not engine.stop(STOP_TIMEOUT_S):  # it hangs in a collective or a kernel
            logger.warning("the running step did not end within %g s", STOP_TIMEOUT_S)
    return code


def _say_why(rank: int, running: Future[None]) -> int:
    """Log why a shard ends; returns its exit code."""
    error = running.exception() if running.done() else None
    if error is None:
        logger.info("shard %d ends", rank)
        return 0
    logger.error("shard %d ends, it can compute no further step: %s", rank, first_line(error))
    logger.debug("traceback", exc_info=error)
    return 1


def _num_threads(config: ShardConfig, env: Mapping[str, str]) -> int | None:
    """Threads of one operator: this rank's share of the usable cores; None where the user has set OMP_NUM_THREADS."""
    if env.get("OMP_NUM_THREADS"):
        return None
    return max(1, usable_cores() // config.world_size)


def usable_cores(root: Path = Path("/")) -> int:
    """Cores of this process: its affinity, or less where the cgroup limits its time (rounded up)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (root / "sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, -(-int(quota) // int(period))))
    except (OSError, ValueError):
        pass  # no limit, or another cgroup version
    return cores


def _log_model(info: ModelInfo | EncoderInfo) -> None:
    """What a person asks first when the server is slow: which number format, where, with how many threads."""
    threads = f", {torch.get_num_threads()} threads" if info.device.type == "cpu" else ""
    dtype = str(info.dtype).removeprefix("torch.")
    logger.info("%s in %s on %s%s, attention %s", info.model_type, dtype, info.device, threads, info.attention)


def _progress_reporter() -> Callable[[str, int, int], None]:
    """Sends progress of loading as events: the ends of every stage, and at most four a second between."""
    last_event = 0.0

    def report(stage: str, done: int, total: int) -> None:
        nonlocal last_event
        now = time.monotonic()
        if done < total and now - last_event < EVENT_INTERVAL_S:
            return
        last_event = now
        send_event("progress", f"{stage}: {done} of {total}", stage=stage, done=done, total=total, unit="parts")

    return report


def _broadcast(group: Group) -> Any:
    return group.broadcast if group.world_size > 1 else None


def _require_room(config: ShardConfig, folder: Path, group: Group) -> Footprint:
    # What can be refused for free comes first.
    registry.candidates(config.attention, group.device)
    return require_room(config, folder, read_device(config, group.device))


def _plan(runner: TransformersRunner, limits: WarmupLimits, found: Footprint, config: ShardConfig) -> KVPlan:
    """Blocks for this device, from what is free on it now that the weights are loaded."""
    device = read_device(config, runner.info.device)
    if config.incarnation > 1:
        # As many blocks are asked for as there were before, where a little less memory may be free: the reserve is
        # for that.
        device = dataclasses.replace(device, share=1.0)
    return plan_loaded(found, runner.info, runner.layers, device, limits, config).kv


def _info(config: ShardConfig, source: ModelSource, runner: ModelRunner, tokenizer: Path) -> pb.InfoResponse:
    info = runner.info
    message = _identity(config, source, info, tokenizer)
    message.eos_token_ids.extend(info.eos_token_ids or tokenizer_eos_ids(tokenizer))
    message.max_position_embeddings = info.max_position_embeddings
    message.window_size = info.window_size
    message.prefill_logprobs = config.prefill_logprobs
    if info.hidden_size:
        message.embedding.dimensions = info.hidden_size
        message.embedding.pooling = Pooling.MEAN
    return message


def _encoder_info(config: ShardConfig, source: ModelSource, encoder: Encoder, tokenizer: Path) -> pb.InfoResponse:
    info, recipe = encoder.info, encoder.recipe
    message = _identity(config, source, info, tokenizer)
    message.is_encoder = True
    message.embedding.CopyFrom(
        pb.EmbeddingInfo(
            dimensions=info.dimensions,
            pooling=",".join(recipe.poolings),
            normalizes=recipe.normalizes,
            max_input_tokens=info.max_tokens,
            lower_case=recipe.lower_case,
            prompts=recipe.prompts,
            default_prompt=recipe.default_prompt,
            shorter=recipe.shorter,
        )
    )
    return message


def _identity(
    config: ShardConfig, source: ModelSource, info: ModelInfo | EncoderInfo, tokenizer: Path
) -> pb.InfoResponse:
    """What there is to say of any model."""
    return pb.InfoResponse(
        launcher_nonce=config.launcher_nonce,
        incarnation=config.incarnation,
        rank=config.rank,
        world_size=config.world_size,
        urls=[f"unix://{config.uds_path}-{rank}" for rank in range(config.world_size)],
        model_id=config.model_id,
        model_sha=source.sha,
        model_type=info.model_type,
        dtype=str(info.dtype).removeprefix("torch."),
        device_type=info.device.type,
        attention_impl=info.attention,
        block_size=config.block_size,
        tokenizer_path=str(tokenizer),
        vocab_size=info.vocab_size,
        pipeline_tag=source.pipeline_tag or config.pipeline_tag,
    )
