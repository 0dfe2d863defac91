"""How a model's folder says that texts become vectors: the files of sentence-transformers beside the weights.

`modules.json` lists what comes behind the transformer: a pooling, dense layers, a normalization. Without it the mean
is taken, as sentence-transformers does with any other model.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from text_generation_server.config import ConfigError
from text_generation_server.model.checkpoint import read_json, read_json_objects

MODULES_FILE = "modules.json"


class Pooling(enum.StrEnum):
    """One vector for all tokens of a text; the values are sentence-transformers' names."""

    CLS = "cls"
    """That of the first token."""
    LAST = "lasttoken"
    MAX = "max"
    MEAN = "mean"
    MEAN_SQRT = "mean_sqrt_len_tokens"
    """The sum, by the root of the number of tokens."""
    WEIGHTED_MEAN = "weightedmean"
    """By the place of the token, from 1."""


_FLAGS = {
    "pooling_mode_cls_token": Pooling.CLS,
    "pooling_mode_max_tokens": Pooling.MAX,
    "pooling_mode_mean_tokens": Pooling.MEAN,
    "pooling_mode_mean_sqrt_len_tokens": Pooling.MEAN_SQRT,
    "pooling_mode_weightedmean_tokens": Pooling.WEIGHTED_MEAN,
    "pooling_mode_lasttoken": Pooling.LAST,
}
"""In the order in which sentence-transformers puts the vectors side by side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    poolings: tuple[Pooling, ...] = (Pooling.MEAN,)
    """Several give vectors side by side."""
    dense: tuple[Path, ...] = ()
    """Folders of linear layers behind the pooling, in their order."""
    normalizes: bool = False
    max_tokens: int | None = None
    """Longest text; None is what the model's positions allow."""
    lower_case: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str = ""
    shorter: tuple[int, ...] = ()


def has_recipe(folder: Path) -> bool:
    """Whether a model is made for embedding, whatever its architecture is."""
    return (folder / MODULES_FILE).is_file()


def read_recipe(folder: Path) -> Recipe:
    """Raises: ConfigError for what is not known here: a vector of another kind would be of no use."""
    if not has_recipe(folder):
        return Recipe()
    poolings: tuple[Pooling, ...] = ()
    dense: list[Path] = []
    normalizes = False
    prompts, default_prompt = _prompts(folder)
    for kind, path in _modules(folder):
        if kind == "Transformer" and not path:
            continue
        if kind == "Pooling" and not poolings:
            settings = read_json(folder / path / "config.json")
            poolings = _poolings(settings)
            if settings.get("include_prompt") is False:
                prompts, default_prompt = {}, ""  # it would leave them out of the pooling: nobody may ask for one
        elif kind == "Dense" and poolings and not normalizes:
            dense.append(folder / path)
        elif kind == "Normalize" and poolings:
            normalizes = True
        else:
            where = f" in `{path}`" if path else ""
            raise ConfigError(f"{MODULES_FILE} names a module of the type `{kind}`{where}, which is not supported here")
    texts = _settings(folder / "sentence_bert_config.json")
    longest = texts.get("max_seq_length")
    shorter = read_json(folder / "config.json").get("matryoshka_dimensions") or ()
    return Recipe(
        poolings=poolings or (Pooling.MEAN,),
        dense=tuple(dense),
        normalizes=normalizes,
        max_tokens=longest if isinstance(longest, int) and longest > 0 else None,
        lower_case=texts.get("do_lower_case") is True,
        prompts=prompts,
        default_prompt=default_prompt,
        shorter=tuple(sorted(each for each in shorter if isinstance(each, int) and each > 0)),
    )


def _modules(folder: Path) -> Iterator[tuple[str, str]]:
    """Type, without the package it is from, and folder of each module."""
    for module in read_json_objects(folder / MODULES_FILE):
        path = str(module.get("path") or "")
        if Path(path).name != path or path == "..":
            raise ConfigError(f"{MODULES_FILE} names a folder outside of the model's: `{path}`")
        yield str(module.get("type", "")).rpartition(".")[2], path


def _poolings(settings: Mapping[str, Any]) -> tuple[Pooling, ...]:
    mode = settings.get("pooling_mode")  # as newer releases write it
    if mode is not None:
        names = mode if isinstance(mode, list) else [mode]
        try:
            return tuple(Pooling(name) for name in names)
        except ValueError as error:
            raise ConfigError(f"the model's pooling is not supported: {error}") from None
    chosen = tuple(pooling for flag, pooling in _FLAGS.items() if settings.get(flag) is True)
    if not chosen:
        raise ConfigError("the configuration of the model's pooling names none")
    return chosen


def _prompts(folder: Path) -> tuple[dict[str, str], str]:
    settings = _settings(folder / "config_sentence_transformers.json")
    prompts = settings.get("prompts")
    prompts = prompts if isinstance(prompts, dict) else {}
    named = {str(name): text for name, text in prompts.items() if isinstance(text, str)}
    default = settings.get("default_prompt_name")
    return named, default if isinstance(default, str) and default in named else ""


def _settings(file: Path) -> Mapping[str, Any]:
    return read_json(file) if file.is_file() else {}
