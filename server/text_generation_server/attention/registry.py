"""Attention back ends by name, imported on demand: one that cannot be imported here does not break the others."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import torch

from text_generation_server.config import ConfigError

if TYPE_CHECKING:
    from text_generation_server.attention.interface import AttentionBackend

BACKENDS = {
    "torch": "text_generation_server.attention.torch_paged:TorchPaged",
}

DEFAULT_BY_DEVICE = {"cpu": "torch", "cuda": "torch"}


def resolve(name: str | None, device: torch.device) -> str:
    """The back end's name for this device. Raises: ConfigError for a name that is not in the table."""
    if name is None:
        return DEFAULT_BY_DEVICE.get(device.type, "torch")
    if name not in BACKENDS:
        raise ConfigError(f"attention `{name}` is not known: choose one of {', '.join(sorted(BACKENDS))}")
    return name


def load(name: str) -> type[AttentionBackend]:
    """Import a back end's class. Raises: ConfigError if its libraries are not installed."""
    module_name, _, class_name = BACKENDS[name].partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"attention `{name}` cannot be used here: {error}") from error
    backend: type[AttentionBackend] = getattr(module, class_name)
    return backend
