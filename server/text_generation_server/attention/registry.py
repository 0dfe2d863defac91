"""Attention back ends by name, imported on demand: one that cannot be imported here does not break the others."""

from __future__ import annotations

import importlib
import logging

import torch

from text_generation_server.attention import trial
from text_generation_server.attention.interface import AttentionBackend, LayerSpec, Unsupported
from text_generation_server.config import ConfigError

logger = logging.getLogger(__name__)

BACKENDS = {
    "flash-attn": "text_generation_server.attention.flash_attn_paged:FlashAttnPaged",
    "llvm": "text_generation_server.attention.llvm_paged:LlvmPaged",
    "torch": "text_generation_server.attention.torch_paged:TorchPaged",
    "triton": "text_generation_server.attention.triton_paged:TritonPaged",
    "varlen": "text_generation_server.attention.varlen_paged:VarlenPaged",
}

PREFERRED_BY_DEVICE = {"cpu": ("llvm", "torch"), "cuda": ("triton", "varlen", "flash-attn", "torch")}
"""The first that can serve a model's layers is taken. On a GPU `triton` leads because it serves every kind of layer,
and its decode steps go into CUDA graphs; which is fastest has not been measured."""


def candidates(name: str | None, device: torch.device) -> tuple[str, ...]:
    """The back ends to try, the best first. Raises: ConfigError for a name that is not in the table."""
    if name is None:
        return PREFERRED_BY_DEVICE.get(device.type, ("torch",))
    if name not in BACKENDS:
        raise ConfigError(f"attention `{name}` is not known: choose one of {', '.join(sorted(BACKENDS))}")
    return (name,)


def create(
    names: tuple[str, ...],
    *,
    layers: list[LayerSpec],
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    kv_dtype: torch.dtype | None = None,
) -> tuple[str, AttentionBackend]:
    """The first of the back ends that can serve these layers here, and its name.

    ``kv_dtype``: of the cache; None: ``dtype``. On a GPU a back end has to give the reference's results first: whether
    its kernels can be compiled, and take our cache, shows only there.
    Raises: ConfigError if none can, with the reason of the last.
    """
    assert names
    for name in names:
        try:
            backend = _load(name)(layers=layers, block_size=block_size, dtype=dtype, device=device, kv_dtype=kv_dtype)
            if device.type == "cuda" and name != "torch":
                trial.attempt(backend, layers, block_size=block_size, dtype=dtype, kv_dtype=kv_dtype, device=device)
            return name, backend
        except (ImportError, Unsupported) as error:
            reason = f"attention `{name}` cannot be used here: {error}"
            if name != names[-1]:
                logger.info("%s", reason)
    raise ConfigError(reason)


def _load(name: str) -> type[AttentionBackend]:
    module_name, _, class_name = BACKENDS[name].partition(":")
    backend: type[AttentionBackend] = getattr(importlib.import_module(module_name), class_name)
    return backend
