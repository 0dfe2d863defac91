"""A transformers model that makes vectors of whole texts.

Shape legend: B texts, T tokens of the longest, H hidden size, D dimensions of a vector.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from text_generation_server.config import ConfigError, ShardConfig
from text_generation_server.embedding import swaps
from text_generation_server.embedding.batches import group_by_length
from text_generation_server.embedding.pooling import pool
from text_generation_server.embedding.recipe import Recipe, has_recipe, read_recipe
from text_generation_server.errors import first_line
from text_generation_server.model import checkpoint
from text_generation_server.model.architecture import max_positions, read_config, refused
from text_generation_server.model.dtypes import resolve_dtype
from text_generation_server.model.loader import Progress, only_weights, reported
from text_generation_server.transfer import to_device

logger = logging.getLogger(__name__)

MAX_PASS_TOKENS = {"cpu": 512, "cuda": 16_384}
"""Of one forward pass, padding included: beyond that a device computes no faster, and holds more activations."""
_GENERATE = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def is_encoder(config: ShardConfig, folder: Path) -> bool:
    """Whether a model embeds, and generates nothing: it says so by sentence-transformers' files, or is of a family
    that fills in blanks. Raises: ConfigError."""
    import transformers

    if has_recipe(folder):
        return True
    raw, _, model_config = read_config(config, folder)
    names = raw.get("architectures") or ()
    if any(str(name).endswith(_GENERATE) for name in names) or getattr(model_config, "is_encoder_decoder", False):
        return False
    return type(model_config) in transformers.MODEL_FOR_MASKED_LM_MAPPING


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderInfo:
    model_type: str
    dtype: torch.dtype
    device: torch.device
    attention: str
    vocab_size: int
    dimensions: int
    max_tokens: int
    """Longest text, special tokens included."""


class Encoder:
    """Everything but ``info`` and ``recipe`` is for the thread that loaded it."""

    def __init__(self, model: nn.Module, head: nn.Module, recipe: Recipe, info: EncoderInfo, pad_token_id: int) -> None:
        self.recipe = recipe
        self.info = info
        self._model = model
        self._head = head
        self._pad_token_id = pad_token_id

    @torch.inference_mode()
    def embed(self, texts: Sequence[Sequence[int]], on_progress: Callable[[], None] = lambda: None) -> Tensor:
        """Float32 [B, D] on the CPU, in the order of the texts, each of which has a token at least."""
        vectors_BD = torch.empty(len(texts), self.info.dimensions)
        most = MAX_PASS_TOKENS.get(self.info.device.type, MAX_PASS_TOKENS["cpu"])
        for group in group_by_length([len(text) for text in texts], most):
            vectors_BD[group] = self._embed_together([texts[index] for index in group]).cpu()
            on_progress()
        return vectors_BD

    def _embed_together(self, texts: Sequence[Sequence[int]]) -> Tensor:
        lengths = [len(text) for text in texts]
        longest = max(lengths)
        padded = np.full((len(texts), longest), self._pad_token_id, np.int64)
        for row, text in enumerate(texts):
            padded[row, : len(text)] = text
        ids_BT = to_device(padded, torch.int64, self.info.device)
        lengths_B = to_device(lengths, torch.int64, self.info.device)
        options: dict[str, Tensor] = {}
        if min(lengths) < longest:
            places_T = torch.arange(longest, device=self.info.device)
            options["attention_mask"] = (places_T < lengths_B[:, None]).long()
        states_BTH: Tensor = self._model(input_ids=ids_BT, **options).last_hidden_state
        vectors_BD: Tensor = self._head(pool(states_BTH, lengths_B, self.recipe.poolings))
        return vectors_BD


def load_encoder(
    config: ShardConfig, folder: Path, device: torch.device, progress: Progress = lambda what, done, total: None
) -> Encoder:
    """Raises: ConfigError, one line, if the model cannot be served as asked."""
    if config.world_size > 1:
        raise ConfigError("a model that embeds is served by one shard: leave `--num-shard` out, or give 1")
    recipe = read_recipe(folder)
    raw, model_type, model_config = read_config(config, folder)
    stored = checkpoint.stored_dtype(folder, raw)
    dtype = resolve_dtype(config.dtype, stored, device, has_products=False)
    model = _load(config, folder, model_type, model_config, dtype, device, progress)
    text_config = model_config.get_text_config()
    head = _head(recipe, device)
    if (
        config.swaps
        and device.type == "cpu"
        and not swaps.apply(model, vocab_size=int(text_config.vocab_size), dtype=dtype)
    ):
        # What was packed is no more: the weights are loaded again.
        logger.warning("model type `%s` runs with its own modules, which is slower", model_type)
        model = _load(config, folder, model_type, model_config, dtype, device, progress)
    hidden = int(text_config.hidden_size)
    with torch.inference_mode():
        dimensions = head(torch.zeros(1, hidden * len(recipe.poolings), device=device)).shape[1]
    longest = _longest(recipe, config, model_type, text_config)
    info = EncoderInfo(
        model_type=model_type,
        dtype=dtype,
        device=device,
        attention=str(getattr(model.config, "_attn_implementation", "eager")),
        vocab_size=int(text_config.vocab_size),
        dimensions=dimensions,
        max_tokens=longest,
    )
    pad = getattr(text_config, "pad_token_id", None)
    return Encoder(model, head, recipe, info, pad if isinstance(pad, int) and pad >= 0 else 0)


def _load(
    config: ShardConfig,
    folder: Path,
    model_type: str,
    model_config: Any,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
) -> Any:
    import transformers

    trusted = config.trust_remote_code and bool(getattr(model_config, "auto_map", None))
    factory: Any = transformers.AutoModel
    if not trusted:
        factory = transformers.MODEL_MAPPING.get(type(model_config), None)
        if factory is None or getattr(model_config, "is_encoder_decoder", False):
            raise refused(model_type, "transformers has no model class for it that embeds")
    options: dict[str, Any] = {"config": model_config, "dtype": dtype}
    if device.type != "cpu":
        options["device_map"] = {"": device}
    if trusted:
        options["trust_remote_code"] = True
    if "add_pooling_layer" in factory.__init__.__code__.co_varnames:
        options["add_pooling_layer"] = False  # a layer for other tasks, which checkpoints often lack
    with only_weights(folder, checkpoint.weight_files(folder)) as clean_folder, reported(progress):
        try:
            model, loaded = factory.from_pretrained(
                folder if trusted else clean_folder,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **options,
            )
        except Exception as error:
            raise refused(model_type, f"transformers cannot load it ({first_line(error)})") from error
    missing = sorted(key for key in loaded["missing_keys"] if "pooler" not in key)
    if missing:
        raise refused(model_type, f"its checkpoint lacks {len(missing)} weights, the first is {missing[0]}")
    return model.eval().requires_grad_(False)


def _head(recipe: Recipe, device: torch.device) -> nn.Module:
    """The dense layers behind the pooling. Raises: ConfigError."""
    head = nn.Sequential()
    for folder in recipe.dense:
        settings = checkpoint.read_json(folder / "config.json")
        from safetensors.torch import load_file

        try:
            weights = load_file(folder / "model.safetensors")
            weight, bias = weights["linear.weight"], weights.get("linear.bias")
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
            layer.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
        except Exception as error:  # a file that is missing, cut off, or of other shapes
            raise ConfigError(
                f"the layer in {folder.name} cannot be loaded from its model.safetensors ({first_line(error)})"
            ) from error
        head.append(layer.float())
        head.append(_activation(str(settings.get("activation_function", "torch.nn.modules.activation.Tanh"))))
    return head.eval().requires_grad_(False).to(device)


def _activation(name: str) -> nn.Module:
    """sentence-transformers writes the class, with its package, which is never imported."""
    known: dict[str, type[nn.Module]] = {
        "Identity": nn.Identity, "Tanh": nn.Tanh, "ReLU": nn.ReLU, "GELU": nn.GELU, "SiLU": nn.SiLU,
        "Sigmoid": nn.Sigmoid,
    }  # fmt: skip
    short = name.rpartition(".")[2]
    if short not in known:
        raise ConfigError(f"the model's dense layer has the activation `{name}`, which is not supported here")
    return known[short]()


def _longest(recipe: Recipe, config: ShardConfig, model_type: str, text_config: Any) -> int:
    positions = max_positions(text_config)
    if positions and model_type in _OFFSET_POSITIONS:
        # Positions are counted from behind the padding's id.
        positions -= int(getattr(text_config, "pad_token_id", 1) or 0) + 1
    limits = [each for each in (recipe.max_tokens, positions, config.max_input_tokens) if each]
    return min(limits, default=_MAX_TOKENS)


_OFFSET_POSITIONS = (
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "longformer",
    "mpnet",
    "ibert",
    "data2vec-text",
)
_MAX_TOKENS = 32_768
"""Where nothing says how long a text may be."""
