"""A decoder layer of the Llama pattern in one launch with the kernels of attention inside, or in two where attention
is not kernels alone.

Launching a kernel costs a few microseconds, and so does each operation of torch around it: in a decode step of a small
model that is as much as the work itself.

Shape legend: T tokens, C width of the hidden states, H query heads, K key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from text_generation_server.cpu_kernels import rms_norm, rotary
from text_generation_server.cpu_kernels.compiler import Kernel, Launch, Sequence
from text_generation_server.cpu_kernels.packed_product import PackedProduct
from text_generation_server.cpu_kernels.panels import Epilogue
from text_generation_server.model import bridge
from text_generation_server.model.swaps.attention import FusedAttention
from text_generation_server.model.swaps.linears import KernelLinear, has_kernel, plain_weights
from text_generation_server.model.swaps.mlp import GatedMLP, PackedMLP
from text_generation_server.model.swaps.norms import FastRMSNorm

if TYPE_CHECKING:
    from text_generation_server.model.swaps.layer_stack import LayerStack


class LayerKernels:
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``, in place of x."""

    def __init__(
        self,
        norms: tuple[FastRMSNorm, FastRMSNorm],
        attention: FusedAttention,
        qkv: PackedProduct,
        out: PackedProduct,
        gated: PackedProduct,
        down: PackedProduct,
    ) -> None:
        self._first_weight, self._second_weight = (_kernel_weight(norm) for norm in norms)
        self._attention, self._qkv, self._out, self._gated, self._down = attention, qkv, out, gated, down
        self.shape = _Shape(
            width=norms[0].shape[0],
            query_heads=attention.query_heads,
            kv_heads=attention.kv_heads,
            head_dim=attention.head_dim,
            inner_width=gated.width,
            dtype=attention.dtype,
        )
        self._addresses: tuple[int, ...] = ()
        """That the two launches know."""
        first_norm, second_norm = (rms_norm.kernel(norm.shape[0], attention.dtype, norm.eps) for norm in norms)
        has_head_norms = attention.kernel_norm_weight is not None
        rotate = rotary.kernel(
            attention.query_heads + 2 * attention.kv_heads,
            attention.query_heads + attention.kv_heads,
            attention.head_dim,
            attention.dtype,
            attention.norm_eps if has_head_norms else None,
        )
        self._before_kernels = first_norm, qkv.kernel, rotate
        self._after_kernels = out.kernel, second_norm, gated.kernel, down.kernel
        self._before, self._after = Sequence(*self._before_kernels), Sequence(*self._after_kernels)
        self.stack: LayerStack | None = None
        """The layers that it is launched with, where it may be."""
        self._singles: dict[tuple[Kernel, ...], _Single] = {}
        """By the kernels of attention: those of decode rows, of prompts, or of both."""

    @classmethod
    def of(
        cls, first: FastRMSNorm, attention: FusedAttention, second: FastRMSNorm, mlp: GatedMLP
    ) -> LayerKernels | None:
        """None if a part has no kernel. The plain linear layers among the parts are replaced: their weights are not
        needed any more."""
        if not attention.has_kernel or not isinstance(mlp, PackedMLP) or mlp.gated is None:
            return None
        if first.kernel_weight is None or second.kernel_weight is None:
            return None
        plain = [plain_weights(each) for each in (attention.qkv, attention.out, mlp.down)]
        epilogues = Epilogue.NONE, Epilogue.ADD, Epilogue.ADD
        if any(
            each is None or not has_kernel(each[0], follows) for each, follows in zip(plain, epilogues, strict=True)
        ):
            return None  # before any is packed: that is a copy
        qkv, out, down = (KernelLinear(*weights) for weights in plain if weights is not None)
        assert out.sum is not None and down.sum is not None
        attention.qkv, attention.out, mlp.down = qkv, out, down
        return cls((first, second), attention, qkv.product, out.sum, mlp.gated, down.sum)

    @property
    def is_plain(self) -> bool:
        """Whether attention is kernels alone wherever all of its tokens are decode rows."""
        return self._attention.arguments["s_aux"] is None

    def __call__(self, hidden_1TC: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        step = _step_of(hidden_1TC, position_embeddings, self.shape)
        if self.stack is not None and self.stack.computes(self, step):
            return step.hidden_1TC
        attention = self._attention_launches(step)
        if attention is not None:
            self._run_at_once(step, attention)
            return step.hidden_1TC
        if self._addresses != step.addresses:  # decode steps of one size mostly find the same memory again
            self._addresses = step.addresses
            before, after = self._arguments(step)
            self._before.fill(*before)
            self._after.fill(*after)
        self._before.run()
        attended = bridge.attend(self._attention, *step.heads, self._attention.arguments).contiguous()
        self._after.set(0, attended.data_ptr())
        self._after.run()
        return step.hidden_1TC

    def launches(self, step: Step) -> list[Launch]:
        """All of the layer's, of a step whose attention is kernels alone."""
        attention = self._attention_launches(step)
        assert attention is not None
        before, after = self._arguments(step)
        return [
            *zip(self._before_kernels, before, strict=True),
            *attention,
            *zip(self._after_kernels, after, strict=True),
        ]

    def _attention_launches(self, step: Step) -> tuple[Launch, ...] | None:
        return bridge.launches(self._attention, *step.heads, step.attended_THD, self._attention.arguments)

    def _run_at_once(self, step: Step, attention: tuple[Launch, ...]) -> None:
        kernels = tuple(kernel for kernel, _ in attention)
        single = self._singles.get(kernels)
        if single is None:
            single = _Single(Sequence(*self._before_kernels, *kernels, *self._after_kernels))
            self._singles[kernels] = single
        if single.addresses != step.addresses:
            single.addresses = step.addresses
            before, after = self._arguments(step)
            single.sequence.fill(*before, *(arguments for _, arguments in attention), *after)
        else:
            for place, (_, arguments) in enumerate(attention, len(self._before_kernels)):
                single.sequence.set(place, *arguments)
        single.sequence.run()

    def _arguments(self, step: Step) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        """Of the kernels before attention, and of those after it."""
        num_tokens, x, normed, heads, attended, inner, cos, sin = step.addresses
        norm = self._attention.kernel_norm_weight
        before = [
            (x, normed, self._first_weight.data_ptr(), num_tokens),
            self._qkv.arguments(num_tokens, normed, heads),
            (heads, cos, sin, 0 if norm is None else norm.data_ptr(), num_tokens),
        ]
        after = [
            self._out.arguments(num_tokens, attended, x, x),
            (x, normed, self._second_weight.data_ptr(), num_tokens),
            self._gated.arguments(num_tokens, normed, inner),
            self._down.arguments(num_tokens, inner, x, x),
        ]
        return before, after


@dataclass(slots=True)
class _Single:
    """A layer's launch with attention inside."""

    sequence: Sequence
    addresses: tuple[int, ...] = ()
    """That it knows."""


def _kernel_weight(norm: FastRMSNorm) -> Tensor:
    assert norm.kernel_weight is not None
    return norm.kernel_weight


@dataclass(frozen=True, slots=True)
class _Shape:
    """What decides how memory is laid out between the kernels of a layer."""

    width: int
    query_heads: int
    kv_heads: int
    head_dim: int
    inner_width: int
    dtype: torch.dtype


class Step:
    """What kernels read and write besides weights: the same memory for all layers of a step, and for most steps. New
    memory would cost a page fault for each 4 KB."""

    def __init__(
        self, hidden_1TC: Tensor, position_embeddings: tuple[Tensor, Tensor], shape: _Shape, memory: Tensor
    ) -> None:
        self.given = position_embeddings[0], shape
        self.computed: Iterator[LayerKernels] | None = None
        """Layers that a stack has computed, and that are still to be called."""
        self.num_tokens = num_tokens = hidden_1TC.shape[1]
        heads = [shape.query_heads, shape.kv_heads, shape.kv_heads]
        widths = [
            shape.width,
            shape.width,
            sum(heads) * shape.head_dim,
            shape.query_heads * shape.head_dim,
            shape.inner_width,
            shape.head_dim,
            shape.head_dim,
        ]
        sizes = [-(-num_tokens * width // ALIGNED) * ALIGNED for width in widths]
        if memory.dtype != shape.dtype or memory.numel() < sum(sizes):
            memory = torch.zeros(sum(sizes), dtype=shape.dtype)  # rows of padding are computed too
        self.memory = memory
        parts = torch.split(memory[: sum(sizes)], sizes)
        self.addresses = num_tokens, *(part.data_ptr() for part in parts)
        hidden_TC, _, heads_TN, attended_TN, _, cos_TD, sin_TD = (
            part[: num_tokens * width].view(num_tokens, width) for part, width in zip(parts, widths, strict=True)
        )
        # All that kernels read is here, at the same addresses step after step: their arguments seldom change.
        self.hidden_1TC = hidden_TC[None]
        self.hidden_1TC.copy_(hidden_1TC)
        for own, given in zip((cos_TD, sin_TD), position_embeddings, strict=True):
            own.copy_(given[0])
        heads_HTD = heads_TN.view(num_tokens, sum(heads), shape.head_dim).transpose(0, 1)
        self.attended_THD = attended_TN.view(num_tokens, shape.query_heads, shape.head_dim)
        query_HTD, key_KTD, value_KTD = torch.split(heads_HTD, heads)
        self.heads = query_HTD, key_KTD, value_KTD


ALIGNED = 64
"""Numbers: parts begin where lines of the cache do."""

_last: Step | None = None


def _step_of(hidden_1TC: Tensor, position_embeddings: tuple[Tensor, Tensor], shape: _Shape) -> Step:
    """The step that a layer is called in: the model hands all layers the same angles, and each the result of the one
    before, which is the same tensor. They are held, so that no other can be taken for them."""
    global _last
    if _last is not None:
        cos, known_shape = _last.given
        if _last.hidden_1TC is hidden_1TC and cos is position_embeddings[0] and known_shape == shape:
            return _last
    memory = torch.empty(0) if _last is None else _last.memory
    _last = Step(hidden_1TC, position_embeddings, shape, memory)
    return _last
