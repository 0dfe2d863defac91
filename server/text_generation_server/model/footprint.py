"""What a model takes, before any of its weights is read: the model is built and run on the meta device, where tensors
have shapes and no memory.

So nothing here knows families. The weights are those of the library's own modules, keys and values are as wide as the
attention calls make them, and activations are what is alive at once in a forward pass of the library's modules; ours
hold less. A model whose forward pass asks for numbers that only weights have stays unknown until it is loaded.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from text_generation_server.attention.interface import LayerSpec
from text_generation_server.config import ConfigError, ShardConfig
from text_generation_server.engine.kv_cache import bytes_per_token
from text_generation_server.engine.memory import ModelSizes
from text_generation_server.errors import first_line
from text_generation_server.model import bridge, checkpoint, parallel
from text_generation_server.model.architecture import Architecture, read_architecture, refused
from text_generation_server.model.dtypes import has_products, resolve_dtype
from text_generation_server.model.live_bytes import LiveBytes

logger = logging.getLogger(__name__)

RUN_TOKENS = 256
"""Of the forward pass on the meta device: what does not grow with the tokens is little beside so many."""


MOST_LAYERS = 1000
"""Of a model whose weights are not here to be counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Of one rank, the first, which has the largest slices."""

    architecture: Architecture
    dtype: torch.dtype
    num_parameters: int
    """Of the whole model; tied ones count once."""
    sizes: ModelSizes
    head_copy_bytes: int
    """Part of the weights: a tied output layer's own copy, packed for the processor."""
    unknown: str
    """Why the KV cache's size is known only once the model is loaded; empty where it is known."""


def survey(config: ShardConfig, folder: Path, device_type: str, *, kv_dtype: torch.dtype | None = None) -> Footprint:
    """The footprint on a device of a type; nothing but config.json and the headers of the weights is read.

    ``kv_dtype``: of the cache, if it is not the model's. Raises: ConfigError if the model cannot be served.
    """
    architecture = read_architecture(config, folder)
    dtype = resolve_dtype(
        config.dtype,
        _stored_dtype(config, folder, architecture),
        torch.device(device_type),
        has_products=has_products(config, architecture.text_config),
    )
    if config.world_size > 1:
        parallel.check_splittable(
            architecture.config, architecture.text_config, architecture.model_type, config.world_size
        )
    _check_number_of_layers(folder, architecture)
    model = _build(architecture, dtype)
    plan: dict[str, str] = (getattr(model, "tp_plan", None) or {}) if config.world_size > 1 else {}
    weight_bytes = _weight_bytes(model, plan, config.world_size)
    copied = _head_copy_bytes(model, dtype, plan, config.world_size) if config.swaps and device_type == "cpu" else 0
    layers, step_bytes, logits_width, unknown = _run(model, architecture, dtype)
    if layers is not None and config.world_size > 1 and parallel.splits_attention(plan):
        layers = [_sliced(layer, config.world_size) for layer in layers]
    short = str(dtype).removeprefix("torch.")
    shard = f", one of {config.world_size} shards" if config.world_size > 1 else ""
    return Footprint(
        architecture=architecture,
        dtype=dtype,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        sizes=ModelSizes(
            weight_bytes=weight_bytes + copied,
            weights=f"in {short}{shard}",
            kv_bytes_per_token=bytes_per_token(layers, kv_dtype or dtype) if layers else None,
            layer_bytes_per_token=layer_bytes_per_token(layers or (), dtype),
            attention_bytes_per_token=attention_bytes_per_token(layers or (), dtype),
            step_bytes_per_token=step_bytes,
            logits_width=logits_width,
            max_position_embeddings=architecture.positions,
        ),
        head_copy_bytes=copied,
        unknown=unknown,
    )


def _stored_dtype(config: ShardConfig, folder: Path, architecture: Architecture) -> torch.dtype:
    if config.dtype is not None:
        return torch.float32  # nobody asks
    try:
        return checkpoint.stored_dtype(folder, architecture.raw)
    except checkpoint.NoWeights:
        raise ConfigError("config.json names no dtype, and the weights are not on this machine: give --dtype") from None


def _check_number_of_layers(folder: Path, architecture: Architecture) -> None:
    """A configuration that lies about its layers would keep us building for hours."""
    claimed = getattr(architecture.text_config, "num_hidden_layers", 0)
    tensors = checkpoint.num_tensors(folder)
    if not isinstance(claimed, int) or claimed <= (MOST_LAYERS if tensors is None else tensors):
        return
    weights = f"its weights are {tensors} tensors" if tensors is not None else "there are no weights that bear it out"
    raise refused(architecture.model_type, f"its config.json speaks of {claimed} layers, and {weights}")


def _build(architecture: Architecture, dtype: torch.dtype) -> nn.Module:
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "eager"}
    try:
        with torch.device("meta"):
            if architecture.trusted:
                model = architecture.factory.from_config(architecture.config, trust_remote_code=True, **options)
            else:
                model = architecture.factory._from_config(architecture.config, **options)
    except Exception as error:  # the library's code on a stranger's numbers
        raise refused(architecture.model_type, f"transformers cannot build it ({first_line(error)})") from error
    module: nn.Module = model.eval().requires_grad_(False)
    return module


def _weight_bytes(model: nn.Module, plan: dict[str, str], world_size: int) -> int:
    """Parameters and buffers on the first rank; tied ones count once."""
    total = 0
    for name, parameter in model.named_parameters():
        split = parallel.is_split(name, plan)
        total += -(-parameter.nbytes // world_size) if split else parameter.nbytes
    return total + sum(buffer.nbytes for buffer in model.buffers())


def _head_copy_bytes(model: nn.Module, dtype: torch.dtype, plan: dict[str, str], world_size: int) -> int:
    """Linear layers are packed in place of their weights (`swaps/linears.py`), but a tied one shares its weight with
    the embedding, which stays."""
    if dtype == torch.float16 or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return 0
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return sum(
        module.weight.nbytes // (world_size if parallel.is_split(f"{name}.weight", plan) else 1)
        for name, module in model.named_modules()
        if type(module) is nn.Linear and id(module.weight) in embeddings
    )


def layer_bytes_per_token(layers: Sequence[LayerSpec], dtype: torch.dtype) -> int:
    """Keys and values of the layer that has most."""
    return max((bytes_per_token([layer], dtype) for layer in layers), default=0)


def attention_bytes_per_token(layers: Sequence[LayerSpec], dtype: torch.dtype) -> int:
    """What goes into the attention of one layer and comes out of it, at most."""
    return max((_call_width(layer) for layer in layers), default=0) * dtype.itemsize


def _call_width(layer: LayerSpec) -> int:
    """Numbers of one token that go into a layer's attention and come out of it."""
    return (layer.query_heads + layer.kv_heads) * (layer.key_dim + layer.value_dim)


def _sliced(layer: LayerSpec, world_size: int) -> LayerSpec:
    return LayerSpec(
        query_heads=layer.query_heads // world_size,
        kv_heads=layer.kv_heads // world_size,
        key_dim=layer.key_dim,
        value_dim=layer.value_dim,
        window=layer.window,
        chunk=layer.chunk,
    )


def _run(
    model: nn.Module, architecture: Architecture, dtype: torch.dtype
) -> tuple[list[LayerSpec] | None, int, int, str]:
    """Layers, activations in bytes per token, width of the logits, and why the layers are not known if they are not.

    Some operations exist on the meta device in bfloat16 alone: then the pass runs in that, and all of it counts as if
    it were in ``dtype``, which is too much and never too little.
    """
    number = int(getattr(architecture.text_config, "vocab_size", 0) or 0)
    bridge.register()
    bridge.use_implementation(model, bridge.PAGED)
    reason = ""
    for candidate in dict.fromkeys((dtype, torch.bfloat16)):
        try:
            made = _pass(model.to(candidate), RUN_TOKENS)
        except Exception as error:  # whatever the library's code does without numbers
            reason = first_line(error)
            logger.debug("%s does not run on the meta device: %s", architecture.model_type, reason)
            continue
        step_bytes = -(-made.bytes // RUN_TOKENS) * max(1, dtype.itemsize // candidate.itemsize)
        expected = int(getattr(architecture.text_config, "num_hidden_layers", 0) or 0)
        if len(made.layers) != expected:
            return None, step_bytes, made.logits_width, "not all of its layers attend as expected"
        return made.layers, step_bytes, made.logits_width, ""
    return None, _step_bytes_by_widths(architecture.text_config), number, reason


@dataclass(frozen=True, slots=True)
class _Pass:
    layers: list[LayerSpec]
    bytes: int
    logits_width: int


@torch.no_grad()
def _pass(model: Any, num_tokens: int) -> _Pass:
    """One forward pass over so many tokens, in which attention takes no memory but its result."""
    layers: list[LayerSpec] = []

    def attend(
        module: nn.Module, query_HTD: Tensor, key_KTD: Tensor, value_KTE: Tensor, arguments: dict[str, Any]
    ) -> Tensor:
        layers.append(
            LayerSpec(
                query_heads=query_HTD.shape[0],
                kv_heads=key_KTD.shape[0],
                key_dim=key_KTD.shape[2],
                value_dim=value_KTE.shape[2],
            )
        )
        return query_HTD.new_empty((query_HTD.shape[1], query_HTD.shape[0], value_KTE.shape[2]))

    ids_T = torch.zeros(num_tokens, dtype=torch.int64, device="meta")
    options = {"logits_to_keep": ids_T[:1]} if keeps_logits(model) else {}
    with bridge.handling(attend), LiveBytes() as live:
        output = model(input_ids=ids_T[None], position_ids=ids_T[None], use_cache=False, **options)
        return _Pass(layers, live.peak, output.logits.shape[-1])


def _step_bytes_by_widths(text_config: Any) -> int:
    """A generous guess from config.json, for a model that does not run without numbers.

    At one time a layer holds the residual stream, the norm's result, queries, keys, values and the attention's result
    (8 hidden sizes), then gate, up, their product and a copy (4 intermediate sizes, for each expert of a token).
    """

    def first(*names: str) -> int:
        found = (getattr(text_config, name, None) for name in names)
        return next((value for value in found if isinstance(value, int) and not isinstance(value, bool)), 0)

    hidden_size = first("hidden_size", "n_embd", "d_model") or 4096
    inner_size = first("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size") or 4 * hidden_size
    experts = first("num_experts_per_tok", "moe_topk", "moe_k") or 1
    return (8 * hidden_size + 4 * experts * (inner_size + hidden_size)) * 4


def keeps_logits(model: Any) -> bool:
    """Whether the model can be asked for the logits of some tokens alone."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters
