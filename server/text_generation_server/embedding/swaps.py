"""What makes the modules of an encoder faster on a processor: packed weights, fewer products, an activation within one.

Structure proposes, behaviour decides: the whole model has to compute what it did before.
"""

from __future__ import annotations

import gc
import logging
from typing import Any

import torch
from torch import Tensor, nn

from text_generation_server.errors import first_line
from text_generation_server.model.swaps import linears, projections
from text_generation_server.model.swaps.linears import PackedLinear

logger = logging.getLogger(__name__)

PROBE_TOKENS = 24
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest distance relative to the norm that is taken for roundings."""
NOT_PACKED = (torch.float32,)
"""Of many rows, where packing gains nothing: 384 wide on 2 cores with AVX2, texts of 5 to 22 tokens, 109 GFLOP/s as
they are and 100 packed, with the activation within."""
ACTIVATED = (("dense", "intermediate_act_fn"), ("lin1", "activation"))
"""Names of a layer and of what is applied to it, and to nothing else."""


class GeluLinear(nn.Module):
    """A packed layer and the activation behind it, in one product."""

    def __init__(self, packed: PackedLinear) -> None:
        super().__init__()
        self.packed = packed

    def forward(self, x: Tensor) -> Tensor:
        return self.packed.gelu(x)


def apply(model: nn.Module, *, vocab_size: int, dtype: torch.dtype) -> bool:
    """Swap in place; whether the model computes the same as before. If not, it is of no use any more."""
    ids_BT = torch.arange(1, PROBE_TOKENS + 1).remainder(vocab_size)[None]
    with torch.inference_mode():
        expected = _states(model, ids_BT)
        fused = sum(projections.replace_children(module) for module in list(model.modules()))
        packed = 0 if dtype in NOT_PACKED else _pack(model, _called(model, ids_BT))
        activated = sum(_activate(module) for module in list(model.modules()))
        gc.collect()
        logger.info("swapped: %d projections, %d linears, %d of them with activations", fused, packed, activated)
        try:
            distance = (_states(model, ids_BT) - expected).norm()
        except Exception as error:  # code that looks into its layers
            logger.debug("with swapped modules it fails: %s", first_line(error))
            return False
    return bool(distance <= TOLERANCE[dtype] * expected.norm())


def _states(model: nn.Module, ids_BT: Tensor) -> Tensor:
    states: Tensor = model(input_ids=ids_BT).last_hidden_state
    return states.float()


def _called(model: nn.Module, ids_BT: Tensor) -> set[nn.Module]:
    """The linear layers that compute something: of others the model reads the weight itself."""
    called: set[nn.Module] = set()

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        called.add(module)

    hooks = [module.register_forward_hook(note) for module in model.modules() if linears.plain_weights(module)]
    try:
        model(input_ids=ids_BT)
    finally:
        for hook in hooks:
            hook.remove()
    return called


def _pack(model: nn.Module, called: set[nn.Module]) -> int:
    packed = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            layer = linears.pack(child, with_kernels=False) if child in called else None
            if layer is not None:
                setattr(parent, name, layer)
                packed += 1
    return packed


def _activate(module: nn.Module) -> bool:
    for layer, activation in ACTIVATED:
        packed, function = getattr(module, layer, None), getattr(module, activation, None)
        if isinstance(packed, PackedLinear) and _is_gelu(function):
            setattr(module, layer, GeluLinear(packed))
            setattr(module, activation, nn.Identity())
            return True
    return False


def _is_gelu(function: object) -> bool:
    """The exact one: approximations have names of their own."""
    if isinstance(function, nn.GELU):
        return function.approximate == "none"
    return isinstance(function, nn.Module) and type(function).__name__ == "GELUActivation"
