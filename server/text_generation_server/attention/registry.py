"""Attention back ends by name, imported on demand: one that cannot be imported here does not break the others."""

from __future__ import annotations

import importlib
import logging

import torch

from text_generation_server.attention.interface import AttentionBackend, LayerSpec, Unsupported
from text_generation_server.config import ConfigError

logger = logging.getLogger(__name__)

BACKENDS = {
    "llvm": "text_generation_server.attention.llvm_paged:LlvmPaged",
    "torch": "text_generation_server.attention.torch_paged:TorchPaged",
}

PREFERRED_BY_DEVICE = {"cpu": ("llvm", "torch"), "cuda": ("torch",)}
"""The first that can serve a model's layers is taken."""


def candidates(name: str | None, device: torch.device) -> tuple[str, ...]:
    """The back ends to try, the best first. Raises: ConfigError for a name that is not in the table."""
    if name is None:
        return PREFERRED_BY_DEVICE.get(device.type, ("torch",))
    if name not in BACKENDS:
        raise ConfigError(f"attention `{name}` is not known: choose one of {', '.join(sorted(BACKENDS))}")
    return (name,)


def create(
    names: tuple[str, ...], *, layers: list[LayerSpec], block_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[str, AttentionBackend]:
    """The first of the back ends that can serve these layers here, and its name.

    Raises: ConfigError if none can, with the reason of the last.
    """
    assert names
    for name in names:
        try:
            return name, _load(name)(layers=layers, block_size=block_size, dtype=dtype, device=device)
        except (ImportError, Unsupported) as error:
            reason = f"attention `{name}` cannot be used here: {error}"
            if name != names[-1]:
                logger.info("%s", reason)
    raise ConfigError(reason)


def _load(name: str) -> type[AttentionBackend]:
    module_name, _, class_name = BACKENDS[name].partition(":")
    backend: type[AttentionBackend] = getattr(importlib.import_module(module_name), class_name)
    return backend
