"""Paged attention on a processor: decode rows by a kernel that reads the cache in place, prompt chunks by torch.

Shape legend: T tokens of the step, R decode rows, H query heads, K key/value heads, D key width, E value width, S cache
slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from text_generation_server.attention.interface import LayerCache, LayerSpec, Unsupported
from text_generation_server.attention.torch_paged import Plan as ChunksPlan
from text_generation_server.attention.torch_paged import TorchPaged, first_seen
from text_generation_server.cpu_kernels import compiler, decode_attention
from text_generation_server.cpu_kernels.decode_attention import DecodeAttention, Rows, Shape
from text_generation_server.engine.inputs import ForwardInputs


@dataclass(slots=True)
class Plan:
    num_rows: int
    """Decode rows: the first tokens of the step."""
    num_tokens: int
    """Of all rows; the step may have padding behind them."""
    slots_R: Tensor
    rows: dict[tuple[int, int], Rows]
    """By window and chunk."""
    chunks: ChunksPlan | None


class LlvmPaged:
    """Raises: Unsupported where the kernel cannot be compiled, or does not know what the layers want."""

    def __init__(self, *, layers: list[LayerSpec], block_size: int, dtype: torch.dtype, device: torch.device) -> None:
        if device.type != "cpu":
            raise Unsupported(f"it is for processors, not for {device.type}")
        reason = compiler.reason_unavailable()
        if reason is not None:
            raise Unsupported(reason)
        for layer in layers:
            if not decode_attention.supports(layer.key_dim, layer.value_dim, block_size, dtype):
                raise Unsupported(
                    f"heads {layer.key_dim} and {layer.value_dim} wide in blocks of {block_size} tokens are not "
                    "multiples of 16"
                )
        self.block_size = block_size
        self.dtype = dtype
        self._sights = sorted({(layer.window, layer.chunk) for layer in layers})
        self._chunks = TorchPaged(layers=layers, block_size=block_size, dtype=dtype, device=device)
        self._kernels: dict[tuple[LayerSpec, float, float, bool], DecodeAttention] = {}

    def prepare(self, inputs: ForwardInputs) -> Plan:
        num_rows = inputs.num_decode_rows
        has_chunks = len(inputs.query_lens) > num_rows
        stops = inputs.context_lens[:num_rows]
        return Plan(
            num_rows=num_rows,
            num_tokens=inputs.slots_T.shape[0],
            slots_R=inputs.slots_T[:num_rows],
            rows={
                (window, chunk): decode_attention.plan_rows(
                    inputs.block_tables[:num_rows],
                    [first_seen(stop - 1, window, chunk) for stop in stops],
                    stops,
                    self.block_size,
                )
                for window, chunk in self._sights
                if num_rows
            },
            chunks=self._chunks.prepare(inputs.without_decode_rows()) if has_chunks else None,
        )

    def attend(
        self,
        plan: Plan,
        layer: LayerSpec,
        cache: LayerCache,
        query_HTD: Tensor,
        key_KTD: Tensor,
        value_KTE: Tensor,
        *,
        scaling: float,
        softcap: float = 0.0,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        rows, dtype = plan.num_rows, query_HTD.dtype
        query_HTD, key_KTD, value_KTE = (self._readable(each) for each in (query_HTD, key_KTD, value_KTE))
        attended: Tensor | None = None
        if plan.chunks is not None:
            attended = self._chunks.attend(
                plan.chunks, layer, cache, query_HTD[:, rows:], key_KTD[:, rows:], value_KTE[:, rows:],
                scaling=scaling, softcap=softcap, sinks_H=sinks_H,
            )  # fmt: skip
            if not rows:
                return attended.to(dtype)
        out_THE = query_HTD.new_empty((query_HTD.shape[1], layer.query_heads, layer.value_dim))
        if attended is not None:
            out_THE[rows:] = attended
        elif query_HTD.shape[1] > plan.num_tokens:
            out_THE[plan.num_tokens :] = 0  # not what lay there: it may be not-a-number
        # The kernel reads memory as it was told the shapes are.
        assert query_HTD.shape[::2] == (layer.query_heads, layer.key_dim)
        assert key_KTD.shape[::2] == (layer.kv_heads, layer.key_dim)
        assert value_KTE.shape[::2] == (layer.kv_heads, layer.value_dim)
        self._kernel(layer, scaling, softcap, sinks_H is not None)(
            plan.rows[layer.window, layer.chunk],
            plan.slots_R,
            query_HTD,
            key_KTD,
            value_KTE,
            cache.keys_KSD,
            cache.values_KSE,
            out_THE,
            None if sinks_H is None else sinks_H.float().contiguous(),
        )
        return out_THE.to(dtype)

    def _kernel(self, layer: LayerSpec, scaling: float, softcap: float, has_sinks: bool) -> DecodeAttention:
        key = layer, scaling, softcap, has_sinks
        kernel = self._kernels.get(key)
        if kernel is None:
            shape = Shape(
                layer.query_heads, layer.kv_heads, layer.key_dim, layer.value_dim, self.block_size, self.dtype,
                scaling, softcap, has_sinks,
            )  # fmt: skip
            # Layers that differ in their windows alone share one.
            kernel = next((each for each in self._kernels.values() if each.shape == shape), None)
            kernel = self._kernels[key] = kernel or DecodeAttention(shape)
        return kernel

    def _readable(self, heads: Tensor) -> Tensor:
        """Of the cache's dtype, and each token's numbers in one place."""
        heads = heads.to(self.dtype)
        return heads if heads.stride(2) == 1 else heads.contiguous()
