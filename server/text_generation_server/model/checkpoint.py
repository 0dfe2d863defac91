"""A model folder's configuration files, read as data: nothing of the repository reaches the library unexamined."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from text_generation_server.config import ConfigError
from text_generation_server.weights.checks import check_file

FORBIDDEN_KEYS = frozenset(
    {
        # Keys that make the library import, fetch or replace code, or open files that the configuration names.
        "auto_map", "custom_pipelines", "trust_remote_code", "kernels", "kernel_config", "use_kernels",
        "fusion_config", "transformers_weights", "gguf_file", "adapter_kwargs", "distributed_config",
        "custom_generate", "_name_or_path", "name_or_path",
    }
)  # fmt: skip
FORBIDDEN_PREFIXES = (
    "_attn_implementation",
    "attn_implementation",
    "_experts_implementation",
    "experts_implementation",
)


class NoWeights(ConfigError):
    """A model folder without any, or with too few of them."""


def read_json(path: Path) -> dict[str, Any]:
    """Raises: ConfigError if the file is not a JSON object."""
    content = _parsed(path)
    if not isinstance(content, dict):
        raise ConfigError(f"{path.name} of the model is not a JSON object")
    return content


def read_json_objects(path: Path) -> list[dict[str, Any]]:
    """Raises: ConfigError if the file is not a list of JSON objects."""
    content = _parsed(path)
    if not isinstance(content, list) or not all(isinstance(each, dict) for each in content):
        raise ConfigError(f"{path.name} of the model is not a list of JSON objects")
    return content


def _parsed(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path.name} of the model cannot be read: {error}") from error


def strip_code(content: Any) -> Any:
    """A copy of a configuration, at any depth, without the keys that name code or implementations."""
    if isinstance(content, dict):
        return {
            key: strip_code(value)
            for key, value in content.items()
            if key not in FORBIDDEN_KEYS and not key.startswith(FORBIDDEN_PREFIXES)
        }
    if isinstance(content, list):
        return [strip_code(value) for value in content]
    return content


def eos_token_ids(folder: Path, config: dict[str, Any], vocab_size: int) -> tuple[int, ...]:
    """Of generation_config.json if it names any, else of config.json; there may be several, or none.

    Files say -1 or null for "none": what is no token id is passed over.
    """
    generation_file = folder / "generation_config.json"
    generation = read_json(generation_file) if generation_file.is_file() else {}
    for source in (generation, *_levels(config)):
        named = source.get("eos_token_id")
        named = named if isinstance(named, list) else [named]
        ids = [each for each in named if type(each) is int and 0 <= each < vocab_size]  # a bool is no id either
        if ids:
            return tuple(dict.fromkeys(ids))
    return ()


def stored_dtype(folder: Path, config: dict[str, Any]) -> torch.dtype:
    """The checkpoint's own: what config.json says, else that of its first floating point tensor."""
    for source in _levels(config):
        name = source.get("dtype") or source.get("torch_dtype")
        if isinstance(name, str):
            dtype = getattr(torch, name.removeprefix("torch."), None)
            if not isinstance(dtype, torch.dtype):
                raise ConfigError(f"config.json names an unknown dtype: {name!r}")
            return dtype
    from safetensors import safe_open

    for path in weight_files(folder):
        with safe_open(path, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a mapping
                name = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(tensors.get_slice(key).get_dtype())
                if name:
                    stored: torch.dtype = getattr(torch, name)
                    return stored
    return torch.float32


def _levels(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Where config.json may say something: at its top, or of a text model inside."""
    text_config = config.get("text_config")
    return [config, text_config] if isinstance(text_config, dict) else [config]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: one, or those that its index names.

    Raises: NoWeights; ConfigError if the index leads out of the folder.
    """
    index_file = folder / "model.safetensors.index.json"
    if index_file.is_file():
        names = set(read_json(index_file).get("weight_map", {}).values())
        if any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise ConfigError("model.safetensors.index.json names a file outside of the model's folder")
        files = [folder / name for name in sorted(names)]
    else:
        files = [folder / "model.safetensors"]
    missing = [path.name for path in files if not path.is_file()]
    if missing or not files:
        raise NoWeights(f"the model has no weights in safetensors format: {missing[0] if missing else 'empty index'}")
    return files


def num_tensors(folder: Path) -> int | None:
    """How many tensors the weights have, from their headers; None where there are no weights yet."""
    try:
        files = weight_files(folder)
    except NoWeights:
        return None
    return sum(len(check_file(path)) for path in files)
