"""Linear layers whose weight is packed once into the order in which it is multiplied."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from text_generation_server.cpu_kernels import packed_product
from text_generation_server.cpu_kernels.packed_product import PackedProduct
from text_generation_server.cpu_kernels.panels import Epilogue


class FusingLinear(nn.Module):
    """A linear layer that keeps its weight in another order, and can do at once what follows the product."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype, self.device = weight.dtype, weight.device
        self.bias = bias

    def silu(self, x: Tensor) -> Tensor:
        """``silu(self(x))``"""
        return F.silu(self(x), inplace=True)

    def plus(self, x: Tensor, addend: Tensor) -> Tensor:
        """``self(x) + addend``"""
        out: Tensor = self(x).add_(addend)
        return out

    def times(self, x: Tensor, factor: Tensor) -> Tensor:
        """``self(x) * factor``"""
        out: Tensor = self(x).mul_(factor)
        return out

    @property
    def weight(self) -> Tensor:
        """Shape, dtype and device, for models that ask their layers for them.

        Not-a-number that occupies nothing: what computes with it does not go unnoticed.
        """
        nan = torch.full((), math.nan, dtype=self.dtype, device=self.device)
        return nan.expand(self.out_features, self.in_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class PackedLinear(FusingLinear):
    """By oneDNN, over a weight packed once; the plain weight is not kept.

    Measured on 2 cores with AVX512-BF16, 576 -> 960 in bfloat16: 29 us plain, 16 us packed for one row; 60 and 49 for
    32.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        self.packed: Tensor
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        self.register_buffer("packed", packed, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self.packed, self.bias, "none", [], "")
        return out

    def silu(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self.packed, self.bias, "swish", [], "")
        return out

    def gelu(self, x: Tensor) -> Tensor:
        """``gelu(self(x))``, the exact one."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self.packed, self.bias, "gelu", [], "none")
        return out

    def plus(self, x: Tensor, addend: Tensor) -> Tensor:
        return self._and(x, addend, "add")

    def times(self, x: Tensor, factor: Tensor) -> Tensor:
        return self._and(x, factor, "mul")

    def _and(self, x: Tensor, other: Tensor, operation: str) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self.packed, self.bias, operation)
        return out


class KernelLinear(FusingLinear):
    """By a kernel of ours, over a weight packed once; the plain weight is not kept."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        self.packed: Tensor
        self.register_buffer("packed", packed_product.pack(weight), persistent=False)
        self.product = PackedProduct(self.packed, self.out_features, self.in_features, bias, Epilogue.NONE)
        self.sum: PackedProduct | None = None
        if has_kernel(weight, Epilogue.ADD):
            self.sum = PackedProduct(self.packed, self.out_features, self.in_features, bias, Epilogue.ADD)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)

    def plus(self, x: Tensor, addend: Tensor) -> Tensor:
        return super().plus(x, addend) if self.sum is None else self.sum(x, addend)


def has_kernel(weight: Tensor, epilogue: Epilogue = Epilogue.NONE) -> bool:
    """Whether there is a kernel of ours for a weight of this shape."""
    num_outputs, num_inputs = weight.shape
    return weight.device.type == "cpu" and packed_product.supports(num_outputs, num_inputs, weight.dtype, epilogue)


def linear_plus(layer: nn.Module, x: Tensor, addend: Tensor) -> Tensor:
    """``layer(x) + addend`` in as few operations as the layer allows."""
    if isinstance(layer, FusingLinear):
        return layer.plus(x, addend)
    out: Tensor = layer(x)
    return out + addend


def linear_add_to(layer: nn.Module, x: Tensor, total: Tensor) -> Tensor:
    """``layer(x) + total``, in place of ``total`` where a product can add to what lies at its destination."""
    weights = plain_weights(layer)
    if weights is not None and weights[1] is None:
        total.view(-1, total.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), weights[0].t())
        return total
    return linear_plus(layer, x, total)


def plain_weights(module: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight [out, in] and bias of a module that is a linear layer and nothing more, else None."""
    if type(module) is nn.Linear:
        return module.weight.detach(), None if module.bias is None else module.bias.detach()
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # GPT-2's linear layer, stored transposed
        weight, bias = module.weight, module.bias
        assert isinstance(weight, Tensor) and isinstance(bias, Tensor)
        return weight.detach().T, bias.detach()
    return None


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN does. float32 gains too; float16 has no packed product on most processors."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def multiplies_with_library(model: nn.Module) -> bool:
    """Whether any product of the model is not computed by kernels of ours."""
    return any(isinstance(module, PackedLinear | nn.Linear) for module in model.modules())


def pack(module: nn.Module, *, with_kernels: bool) -> nn.Module | None:
    """The faster equal of a plain linear layer; ``with_kernels`` allows ours."""
    weights = plain_weights(module)
    if weights is None:
        return None
    weight, bias = weights
    if with_kernels and has_kernel(weight):
        return KernelLinear(weight, bias)
    if not can_pack(weight):
        return None
    return PackedLinear(weight.contiguous(), bias)


def fuse(modules: list[nn.Module]) -> nn.Linear | None:
    """One linear layer whose output is the outputs of all, side by side. None if they do not fit together."""
    parts = [plain_weights(module) for module in modules]
    if any(part is None for part in parts):
        return None
    weights = [part[0] for part in parts if part is not None]
    biases = [part[1] for part in parts if part is not None]
    if len({(weight.shape[1], weight.dtype, weight.device) for weight in weights}) != 1:
        return None
    given = [bias for bias in biases if bias is not None]
    if given and len(given) != len(biases):
        return None
    fused = nn.Linear(1, 1, bias=False, device="meta")
    fused.weight = nn.Parameter(torch.cat(weights), requires_grad=False)
    fused.register_parameter("bias", nn.Parameter(torch.cat(given), requires_grad=False) if given else None)
    fused.out_features, fused.in_features = fused.weight.shape
    return fused
