"""The paged key/value cache: per layer two head-major tensors, addressed by slot = block * block_size + offset.

Shape legend: K key/value heads, S slots, D key width, E value width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from text_generation_server.attention.interface import LayerCache, LayerSpec
from text_generation_server.transfer import to_device


class KVCache:
    """Block tensors of all layers on one rank. Block 0 is padding: rows that nobody reads may write there."""

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._device = device
        num_slots = (num_blocks + 1) * block_size
        self.layers = [
            LayerCache(
                keys_KSD=_zeros((layer.kv_heads, num_slots, layer.key_dim), dtype, device),
                values_KSE=_zeros((layer.kv_heads, num_slots, layer.value_dim), dtype, device),
            )
            for layer in layers
        ]

    @property
    def tensors(self) -> list[Tensor]:
        """Keys and values of all layers, [K, S, ...] each."""
        return [tensor for layer in self.layers for tensor in (layer.keys_KSD, layer.values_KSE)]

    def zero_blocks(self, block_ids: Iterable[int]) -> None:
        """Clear blocks whose content may be not-a-number: a masked slot still poisons attention (0 x NaN is NaN)."""
        ids_B = to_device(list(block_ids), torch.int64, self._device)
        for layer in self.layers:
            for cached in (layer.keys_KSD, layer.values_KSE):
                plain = (
                    cached.view(torch.uint8) if cached.dtype.itemsize == 1 else cached
                )  # torch has no fill for float8
                plain.view(cached.shape[0], -1, self.block_size, cached.shape[2]).index_fill_(1, ids_B, 0)


def bytes_per_token(layers: Iterable[LayerSpec], dtype: torch.dtype) -> int:
    """Keys and values of one token in all layers."""
    return sum(layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in layers) * dtype.itemsize


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zero-filled; on a CPU the pages come from the operating system when first touched, so an idle cache is free."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)
