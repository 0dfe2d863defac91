"""What a model's config.json says, checked before anything of its weights is touched."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from text_generation_server.config import ConfigError, ShardConfig
from text_generation_server.errors import first_line
from text_generation_server.model import checkpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    raw: dict[str, Any]
    """config.json as it is."""
    model_type: str
    config: Any
    """The library's configuration object."""
    text_config: Any
    """The same, or its part for the language model."""
    factory: Any
    """The library's class that builds and loads the model."""
    trusted: bool
    """Whether the model is built by the repository's own code."""
    positions: int
    """Longest sequence; 0 is unbounded."""


def read_architecture(config: ShardConfig, folder: Path) -> Architecture:
    """Raises: ConfigError, one line, if the model cannot be served as asked whatever its weights are."""
    import transformers

    raw, model_type, model_config = read_config(config, folder)
    text_config = model_config.get_text_config(decoder=True)
    if text_config is not model_config and not config.trust_remote_code:
        raise refused(model_type, "it is multimodal; only text models are served")
    positions = max_positions(text_config)
    _check_positions(config, positions)
    trusted = config.trust_remote_code and bool(getattr(model_config, "auto_map", None))
    factory: Any = transformers.AutoModelForCausalLM
    if not trusted:
        factory = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model_config), None)
        if factory is None:
            raise refused(model_type, "transformers has no causal language model class for it")
    return Architecture(
        raw=raw,
        model_type=model_type,
        config=model_config,
        text_config=text_config,
        factory=factory,
        trusted=trusted,
        positions=positions,
    )


def refused(model_type: str, reason: str) -> ConfigError:
    """The error for a model that is not served."""
    return ConfigError(f"model type `{model_type}` cannot be served: {reason}")


def read_config(config: ShardConfig, folder: Path) -> tuple[dict[str, Any], str, Any]:
    """config.json, its model type, and the library's configuration object, from data alone unless the user trusts the
    repository's code. Raises: ConfigError."""
    import transformers

    raw = checkpoint.read_json(folder / "config.json")
    model_type = str(raw.get("model_type", "(none)"))
    return raw, model_type, _model_config(transformers, config, folder, raw, model_type)


def _model_config(transformers: Any, config: ShardConfig, folder: Path, raw: dict[str, Any], model_type: str) -> Any:
    if raw.get("quantization_config"):
        raise refused(model_type, "its checkpoint is quantized in a way that is not supported")
    if config.trust_remote_code and "auto_map" in raw:
        try:
            return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
        except Exception as error:  # whatever the repository's code may raise
            raise refused(model_type, f"its own configuration code fails ({first_line(error)})") from error
    if model_type not in transformers.CONFIG_MAPPING:
        hint = "; --trust-remote-code would run the repository's own code" if "auto_map" in raw else ""
        raise refused(model_type, f"transformers {transformers.__version__} does not know it{hint}")
    clean = checkpoint.strip_code(raw)
    config_class: Any = transformers.CONFIG_MAPPING[model_type]
    try:  # infinities are stored as {"__float__": "Infinity"}
        return config_class.from_dict(getattr(config_class, "_decode_special_floats", lambda same: same)(clean))
    except Exception as error:  # the library validates with many exception types
        raise refused(model_type, f"its config.json is not valid ({first_line(error)})") from error


def _check_positions(config: ShardConfig, positions: int) -> None:
    longest = config.max_total_tokens
    if longest is not None and 0 < positions < longest:
        raise ConfigError(
            f"`max_total_tokens` must be <= the {positions} positions that the model was made for. Given: {longest}"
        )
    if config.max_input_tokens is not None and 0 < positions <= config.max_input_tokens:
        raise ConfigError(
            f"`max_input_tokens` must be < the {positions} positions that the model was made for. "
            f"Given: {config.max_input_tokens}"
        )


def max_positions(text_config: Any) -> int:
    """Longest sequence whose positions mean the same at every length; 0 if the configuration sets no limit.

    Some rotary scalings (longrope) change all angles once a sequence passes the original length. In a paged cache the
    earlier keys would keep their old angles, and a batch mate's length would decide: so the original length is the
    limit there.
    """
    limit = 0
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length"):
        value = getattr(text_config, name, None)
        if isinstance(value, int) and value > 0:
            limit = value
            break
    rope = getattr(text_config, "rope_parameters", None) or {}
    for scaling in (rope, *(each for each in rope.values() if isinstance(each, dict))):  # one, or one by layer type
        if scaling.get("rope_type") != "longrope":
            continue
        original = scaling.get("original_max_position_embeddings")
        original = original or getattr(text_config, "original_max_position_embeddings", None)
        if isinstance(original, int) and 0 < original < limit:
            logger.warning("longrope: sequences are limited to the original %d positions of %d", original, limit)
            return original
    return limit
