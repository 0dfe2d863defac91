"""RMS norms in few operations, instead of the six that models spell out."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from text_generation_server.cpu_kernels import rms_norm

FEW_ROWS = 64


class FastRMSNorm(nn.Module):
    """On a CPU, ``F.rms_norm`` in half precision is nine operations, and in a decode step their number is what costs.

    A layer norm is one operation, and of ``(x, -x)`` it is the RMS norm of x: the mean is 0 and the variance the mean
    square. With weights out of the cache, one row takes 27 us so instead of 42; from about 64 rows on, the same in
    place in float32 is faster. In float32 the library's own order of operations is kept.
    """

    def __init__(self, weight: Tensor, eps: float, dtype: torch.dtype) -> None:
        """``dtype`` is the input's; on a CPU the weight may be in float32 all the same."""
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.shape = tuple(weight.shape)
        self.eps = eps
        self.mirror: Tensor
        self.mirrored_weight: Tensor
        mirror = torch.tensor([[1.0], [-1.0]], dtype=dtype, device=weight.device)
        self.register_buffer("mirror", mirror, persistent=False)
        self.register_buffer("mirrored_weight", torch.stack((weight, weight)).detach(), persistent=False)
        self.kernel_weight: Tensor | None = None
        self.gpu_kernels: Any = None
        """The module of the Triton kernels, once they are used."""

    def compute_with_kernels(self) -> bool:
        """Compute with a kernel of ours, where there is one; returns whether. In float32 it stays as it is."""
        if self.mirror.dtype == torch.float32 or not rms_norm.supports(self.shape[0], self.mirror.dtype):
            return False
        self.kernel_weight = self.weight.float()
        del self.mirror, self.mirrored_weight
        return True

    def compute_with_gpu_kernels(self) -> bool:
        """Compute with a Triton kernel; returns whether, which is always."""
        from text_generation_server.gpu_kernels import rms_norm as gpu_rms_norm

        self.gpu_kernels = gpu_rms_norm
        return True

    def after_sum(self, x: Tensor, addend: Tensor) -> tuple[Tensor, Tensor]:
        """``x + addend``, and its norm."""
        if self.gpu_kernels is not None:
            total, normed = self.gpu_kernels.add_rms_norm(x, addend, self.weight, self.eps)
            return total, normed
        total = x + addend
        return total, self(total)

    def forward(self, x: Tensor) -> Tensor:
        if self.gpu_kernels is not None:
            normed: Tensor = self.gpu_kernels.rms_norm(x, self.weight, self.eps)
            return normed
        if self.kernel_weight is not None:
            return rms_norm.rms_norm(x, self.kernel_weight, self.eps)
        if x.dtype == torch.float32 or x.device.type != "cpu":
            return F.rms_norm(x, self.shape, self.weight, self.eps)
        if x.numel() <= FEW_ROWS * x.shape[-1]:
            mirrored = x.unsqueeze(-2) * self.mirror
            return F.layer_norm(mirrored, (2, *self.shape), self.mirrored_weight, None, self.eps).select(-2, 0)
        wide = x.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = scale.square_().div_(x.shape[-1]).add_(self.eps).rsqrt_()
        return wide.mul_(scale).mul_(self.weight).to(x.dtype)


def replace(module: nn.Module) -> nn.Module | None:
    """By name and fields an RMS norm; whether it is one with ``weight`` or ``1 + weight`` shows in what it does."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
    if "RMSNorm" not in type(module).__name__ or not isinstance(weight, Tensor) or not isinstance(eps, float):
        return None
    if weight.ndim != 1 or getattr(module, "bias", None) is not None:
        return None
    if len(inspect.signature(module.forward).parameters) != 1:  # a gate, or a residual
        return None
    own = copy.deepcopy(module).float()
    own_weight = weight.detach().float()
    x = torch.sin(torch.arange(4 * len(weight), device=weight.device).view(4, -1).float())
    with torch.inference_mode():
        expected = own(x)
        for offset in (0, 1):
            found = F.rms_norm(x, (len(weight),), own_weight + offset, eps)
            if (found - expected).norm() <= 1e-5 * expected.norm():
                if offset == 0:
                    return FastRMSNorm(weight.detach(), eps, weight.dtype)
                if weight.dtype == torch.float32 or weight.device.type == "cpu":
                    return FastRMSNorm(own_weight + 1, eps, weight.dtype)  # the sum has more digits than the weight
    return None
