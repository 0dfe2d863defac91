"""transformers builds and loads the model; the probe accepts or refuses it; the swaps make it fast."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sized
from pathlib import Path
from typing import Any

import torch
from torch import nn

from text_generation_server.attention import registry
from text_generation_server.config import ConfigError, ShardConfig
from text_generation_server.distributed import Group, alone
from text_generation_server.engine.kv_cache import bytes_per_token
from text_generation_server.errors import first_line
from text_generation_server.model import bridge, checkpoint, parallel, probe, temperature
from text_generation_server.model.architecture import Architecture, read_architecture, refused
from text_generation_server.model.bridge import Unservable
from text_generation_server.model.dtypes import has_products, resolve_dtype, resolve_kv_dtype
from text_generation_server.model.runner import ModelInfo
from text_generation_server.model.swaps import linears
from text_generation_server.model.swaps import table as swaps
from text_generation_server.model.transformers_runner import TransformersRunner, base_model

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""What is being done, how many parts are done, of how many."""


def load_model(
    config: ShardConfig,
    folder: Path,
    group: Group | None = None,
    progress: Progress | None = None,
    *,
    without_swaps: Iterable[str] = (),
) -> TransformersRunner:
    """Load a model folder (config.json, safetensors) on this rank, probe it, and make it fast.

    ``without_swaps`` names single swaps to leave out, for tests and diagnosis; ``config.swaps`` leaves out all.
    Raises: ConfigError, one line, if the model cannot be served as asked.
    """
    group = group or alone()
    progress = progress or (lambda what, done, total: None)
    # What can be refused without the weights is refused before they are read.
    architecture = read_architecture(config, folder)
    registry.candidates(config.attention, group.device)
    model_type = architecture.model_type
    dtype = resolve_dtype(
        config.dtype,
        checkpoint.stored_dtype(folder, architecture.raw),
        group.device,
        has_products=has_products(config, architecture.text_config),
    )
    model = _load(folder, architecture, dtype, group, progress)
    try:
        return _prepare(config, folder, architecture, model, dtype, group, progress, frozenset(without_swaps))
    except Unservable as reason:
        split = f" when split over {group.world_size} shards; try --num-shard 1" if group.world_size > 1 else ""
        raise refused(model_type, f"{reason}{split}") from reason
    except _SwapsFailed as reason:
        logger.warning("model type `%s` runs with its own modules, which is slower: %s", model_type, reason)
    del model  # what was swapped is no more: the weights are loaded again
    gc.collect()
    return load_model(dataclasses.replace(config, swaps=False), folder, group, progress)


class _SwapsFailed(Exception):
    """The model can be served, but not with its modules swapped."""


def _load(folder: Path, architecture: Architecture, dtype: torch.dtype, group: Group, progress: Progress) -> nn.Module:
    """Weights in place, on this rank's device, each rank with its slices."""
    model_config, model_type, trusted = architecture.config, architecture.model_type, architecture.trusted
    options: dict[str, Any] = {"config": model_config, "dtype": dtype, "attn_implementation": "eager"}
    splitting: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if group.world_size > 1:
        parallel.check_splittable(model_config, model_config.get_text_config(), model_type, group.world_size)
        splitting = parallel.loading(group)
    elif group.device.type != "cpu":
        options["device_map"] = {"": group.device}
    if trusted:
        options["trust_remote_code"] = True
    files = checkpoint.weight_files(folder)
    with only_weights(folder, files) as clean_folder, reported(progress), splitting as distributed_config:
        if distributed_config is not None:
            options["distributed_config"] = distributed_config
        try:
            model, loaded = architecture.factory.from_pretrained(
                folder if trusted else clean_folder,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **options,
            )
        except ConfigError:
            raise
        except Exception as error:
            raise refused(model_type, f"transformers cannot load it ({first_line(error)})") from error
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise refused(model_type, f"its checkpoint lacks {len(missing)} weights, the first is {missing[0]}")
    model.eval().requires_grad_(False)
    module: nn.Module = model
    return module


def _prepare(
    config: ShardConfig,
    folder: Path,
    architecture: Architecture,
    model: Any,
    dtype: torch.dtype,
    group: Group,
    progress: Progress,
    without_swaps: frozenset[str],
) -> TransformersRunner:
    """Record what the model does, swap modules, probe it. Raises: Unservable; _SwapsFailed, after which the probe of
    the model as it is has the last word."""
    if group.world_size > 1:
        parallel.parallelize(model, group)
    text_config = model.config.get_text_config(decoder=True)
    vocab_size = int(text_config.vocab_size)
    num_layers = int(text_config.num_hidden_layers)
    bridge.register()
    progress("probe", 0, 2)
    layers = probe.record(model, vocab_size=vocab_size, num_layers=num_layers, device=group.device)
    expected = probe.reference(model, layers, vocab_size=vocab_size, dtype=dtype, device=group.device)
    kv_dtype = resolve_kv_dtype(config.kv_cache_dtype)
    names = registry.candidates(config.attention, group.device)
    options: dict[str, Any] = {
        "layers": layers, "block_size": config.block_size, "dtype": dtype, "device": group.device
    }  # fmt: skip
    attention, serving = registry.create(names, **options, kv_dtype=kv_dtype)
    # The probe compares without what a narrower cache rounds off.
    backend = serving if kv_dtype is None else registry.create((attention,), **options)[1]
    logits_width = expected.logits[0].shape[-1]
    info = ModelInfo(
        model_type=architecture.model_type,
        dtype=dtype,
        device=group.device,
        attention=attention,
        vocab_size=logits_width,
        eos_token_ids=checkpoint.eos_token_ids(folder, architecture.raw, logits_width),
        max_position_embeddings=architecture.positions,
        window_size=min((layer.window or layer.chunk for layer in layers if layer.window or layer.chunk), default=0),
        kv_bytes_per_token=bytes_per_token(layers, kv_dtype or dtype),
        hidden_size=0 if base_model(model) is model else int(text_config.hidden_size),
    )
    runner = TransformersRunner(
        model,
        layers=layers,
        temperatures=temperature.take_over(model),
        backend=backend,
        block_size=config.block_size,
        info=info,
    )
    bridge.use_implementation(model, bridge.PAGED)
    runner.allocate_kv_cache(probe.blocks_needed(config.block_size))
    if not config.swaps:
        probe.verify(runner.forward, expected, block_size=config.block_size, what="the paged forward pass")
    else:
        progress("probe", 1, 2)
        run = probe.dense_pass(model, vocab_size=vocab_size, max_positions=architecture.positions, device=group.device)
        try:
            with bridge.handling(probe.dense):
                without = without_swaps if attention in ("llvm", "triton") else without_swaps | {"kernels"}
                swaps.apply(model, dtype=dtype, run=run, without=without, on_gpu=attention == "triton")
            runner.pads_steps = group.device.type == "cpu" and linears.multiplies_with_library(model)
            runner.allocate_kv_cache(probe.blocks_needed(config.block_size))
            probe.verify(runner.forward, expected, block_size=config.block_size, what="the pass with swapped modules")
        except Unservable as reason:
            raise _SwapsFailed(reason) from reason
    if kv_dtype is not None:
        runner.backend, runner.kv_dtype = serving, kv_dtype
        runner.allocate_kv_cache(probe.blocks_needed(config.block_size))
        error = probe.distance(runner.forward, expected, block_size=config.block_size, what="the narrower KV cache")
        logger.info("KV cache in %s: the probe's logits differ by %.2g of their spread", config.kv_cache_dtype, error)
    runner.release_kv_cache()
    progress("probe", 2, 2)
    return runner


@contextlib.contextmanager
def only_weights(folder: Path, files: list[Path]) -> Iterator[Path]:
    """A folder that shows the library nothing but the weights: no code, no adapters, no other configuration."""
    with tempfile.TemporaryDirectory(prefix="text-generation-weights-") as name:
        for path in (*files, folder / "model.safetensors.index.json"):
            if path.is_file():
                (Path(name) / path.name).symlink_to(path.resolve())
        (Path(name) / "generation_config.json").write_text("{}", encoding="utf-8")  # the library insists on one
        yield Path(name)


@contextlib.contextmanager
def reported(progress: Progress) -> Iterator[None]:
    """Send the library's progress bars to ``progress`` while it loads."""
    from transformers.utils import logging as library_logging

    if not hasattr(library_logging, "set_tqdm_hook"):  # older releases print or stay silent
        yield
        return

    def hook(factory: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Bar:
        return _Bar(progress, *args, **kwargs)

    previous = library_logging.set_tqdm_hook(hook)
    try:
        yield
    finally:
        library_logging.set_tqdm_hook(previous)


class _Bar:
    """As much of tqdm as the library uses."""

    def __init__(self, progress: Progress, iterable: Iterable[Any] = (), *_: Any, **options: Any) -> None:
        self._progress = progress
        self._iterable = iterable
        self._what = str(options.get("desc") or "loading")
        self._done = 0
        self._total = int(options.get("total") or (len(iterable) if isinstance(iterable, Sized) else 0))
        self._step = max(1, self._total // 100)

    def __iter__(self) -> Iterator[Any]:
        for item in self._iterable:
            yield item
            self.update()

    def update(self, count: int = 1) -> None:
        self._done += count
        if self._done % self._step == 0 or self._done == self._total:
            self._progress(self._what, self._done, self._total)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None
