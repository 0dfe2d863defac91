"""Paged attention by ``torch.nn.attention.varlen.varlen_attn``, which torch has with block tables from 2.12 on.

Its kernels want pages of [block_size, heads, width]. Our cache is head-major, and a view with other strides is such
pages. Whether the kernels of this torch and GPU take the strides and the block size is tried before they serve
(`trial.py`): those of FlashAttention 2 want blocks of a multiple of 256 tokens, those of FlashAttention 3 take any.

Shape legend: T tokens of the step, R rows, H query heads, K key/value heads, D head width, S cache slots, B columns of
block tables, P blocks, L tokens of a block.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from text_generation_server.attention.interface import LayerCache, LayerSpec, Unsupported
from text_generation_server.engine.inputs import ForwardInputs
from text_generation_server.transfer import to_device

NEEDED = ("seqused_k", "block_table", "num_splits")
"""Arguments that earlier versions lack."""


@dataclass(slots=True)
class Plan:
    slots_T: Tensor
    num_tokens: int
    """Of the rows; the step may have padding behind them."""
    cu_seqlens_q: Tensor
    """int32 [R + 1]."""
    cu_seqlens_k: Tensor
    """The same of whole sequences."""
    contexts_R: Tensor
    """int32; tokens of whole sequences."""
    tables_RB: Tensor
    """int32; unused columns are 0."""
    longest_query: int
    longest_context: int


class VarlenPaged:
    """Raises: Unsupported for what these kernels do not know: sinks, soft caps, chunked attention, other widths."""

    def __init__(
        self,
        *,
        layers: list[LayerSpec],
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        if device.type != "cuda":
            raise Unsupported(f"it is for GPUs, not for {device.type}")
        if dtype not in (torch.float16, torch.bfloat16) or kv_dtype not in (None, dtype):
            raise Unsupported(f"it does not compute in {dtype} from a cache in {kv_dtype or dtype}")
        for layer in layers:
            if layer.key_dim != layer.value_dim or layer.key_dim % 8 or layer.key_dim > 256:
                raise Unsupported(
                    f"heads {layer.key_dim} and {layer.value_dim} wide are not of one width, a multiple of 8 up to 256"
                )
            if layer.chunk or layer.has_sinks:
                raise Unsupported(f"it has no {'chunked attention' if layer.chunk else 'sinks'}")
        self.check_softcaps([layer.softcap for layer in layers])
        self.block_size = block_size
        self.dtype = dtype
        self.device = device
        self._kernel = self.load()

    def check_softcaps(self, softcaps: list[float]) -> None:
        """Raises: Unsupported."""
        if any(softcaps):
            raise Unsupported("it has no soft cap")

    def load(self) -> Callable[..., Any]:
        """Raises: Unsupported."""
        try:
            kernel: Callable[..., Any] = importlib.import_module("torch.nn.attention.varlen").varlen_attn
        except ImportError as error:
            raise Unsupported(f"torch {torch.__version__} does not have it") from error
        missing = [name for name in NEEDED if name not in inspect.signature(kernel).parameters]
        if missing:
            raise Unsupported(f"torch {torch.__version__} has it without `{missing[0]}`; 2.12 or newer is needed")
        return kernel

    def prepare(self, inputs: ForwardInputs) -> Plan:
        ends = [np.cumsum([0, *lens]) for lens in (inputs.query_lens, inputs.context_lens)]
        numbers = to_device(np.stack(ends), torch.int32, self.device)
        widths = [-(-context // self.block_size) for context in inputs.context_lens]
        tables = np.zeros((len(widths), max(widths)), dtype=np.int32)
        for row, (table, width) in enumerate(zip(inputs.block_tables, widths, strict=True)):
            tables[row, :width] = table[:width]
        return Plan(
            slots_T=inputs.slots_T,
            num_tokens=inputs.slots_T.shape[0],
            cu_seqlens_q=numbers[0],
            cu_seqlens_k=numbers[1],
            contexts_R=to_device(inputs.context_lens, torch.int32, self.device),
            tables_RB=to_device(tables, torch.int32, self.device),
            longest_query=max(inputs.query_lens),
            longest_context=max(inputs.context_lens),
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
        assert sinks_H is None, "a layer with sinks was not announced"
        cache.keys_KSD.index_copy_(1, plan.slots_T, key_KTD[:, : plan.num_tokens].to(self.dtype))
        cache.values_KSE.index_copy_(1, plan.slots_T, value_KTE[:, : plan.num_tokens].to(self.dtype))
        query_THD = query_HTD.transpose(0, 1)
        window = (layer.window - 1, 0) if layer.window else (-1, 0)
        attended = self.call(
            plan, query_THD[: plan.num_tokens].to(self.dtype).contiguous(),
            self._pages(cache.keys_KSD), self._pages(cache.values_KSE), scaling, softcap, window,
        )  # fmt: skip
        if query_THD.shape[0] == plan.num_tokens:
            return attended.to(query_HTD.dtype)
        out_THE = query_HTD.new_zeros((query_THD.shape[0], layer.query_heads, layer.value_dim))
        out_THE[: plan.num_tokens] = attended
        return out_THE

    def call(
        self,
        plan: Plan,
        query_THD: Tensor,
        keys_PLKD: Tensor,
        values_PLKD: Tensor,
        scaling: float,
        softcap: float,
        window: tuple[int, int],
    ) -> Tensor:
        assert softcap == 0, "a layer with a soft cap was not announced"
        out: Tensor = self._kernel(
            query_THD,
            keys_PLKD,
            values_PLKD,
            plan.cu_seqlens_q,
            None,  # block tables and cumulative lengths of keys exclude each other
            plan.longest_query,
            plan.longest_context,
            scale=scaling,
            window_size=window,
            enable_gqa=query_THD.shape[1] != keys_PLKD.shape[2],
            seqused_k=plan.contexts_R,
            block_table=plan.tables_RB,
            num_splits=1,  # else the longest row of a step decides how the others' sums are cut
        )
        return out

    def _pages(self, cached_KSD: Tensor) -> Tensor:
        """[P, L, K, D], a view."""
        heads, _, width = cached_KSD.shape
        return cached_KSD.view(heads, -1, self.block_size, width).permute(1, 2, 0, 3)
