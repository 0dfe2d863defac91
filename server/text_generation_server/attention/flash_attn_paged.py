"""Paged attention by the ``flash-attn`` package (FlashAttention 2), an extra that is built on the user's machine.

Its paged kernels want blocks of a multiple of 256 tokens, which is the block size that a shard takes when it is told
``--attention flash-attn``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from text_generation_server.attention.interface import Unsupported
from text_generation_server.attention.varlen_paged import Plan, VarlenPaged

BLOCK_MULTIPLE = 256


class FlashAttnPaged(VarlenPaged):
    """Raises: Unsupported as its base does, but for soft caps, and for small blocks."""

    def check_softcaps(self, softcaps: list[float]) -> None:
        """All are served."""

    def load(self) -> Callable[..., Any]:
        try:
            package = importlib.import_module("flash_attn")
        except ImportError as error:
            raise Unsupported(
                f"flash-attn cannot be imported ({error}); the extra `flash-attn` of this package installs it"
            ) from error
        if self.block_size % BLOCK_MULTIPLE:
            raise Unsupported(f"its blocks hold multiples of {BLOCK_MULTIPLE} tokens, here they hold {self.block_size}")
        kernel: Callable[..., Any] = package.flash_attn_varlen_func
        return kernel

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
        out: Tensor = self._kernel(
            query_THD,
            keys_PLKD,
            values_PLKD,
            plan.cu_seqlens_q,
            plan.cu_seqlens_k,
            plan.longest_query,
            plan.longest_context,
            softmax_scale=scaling,
            causal=True,
            window_size=(window[0], 0 if window[0] >= 0 else -1),
            softcap=softcap,
            block_table=plan.tables_RB,
        )
        return out
