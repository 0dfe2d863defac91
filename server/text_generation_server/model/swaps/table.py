"""Which modules are replaced, in which order. An unknown architecture keeps its own modules.

Structure proposes a replacement, behaviour decides: the module's own inputs and outputs are recorded in one forward
pass, and the replacement takes its place only if it gives the same outputs.
"""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from text_generation_server.errors import first_line
from text_generation_server.model import bridge
from text_generation_server.model.bridge import Unservable
from text_generation_server.model.swaps import attention, layers, linears, mlp, norms, projections
from text_generation_server.model.swaps.layer_stack import Order

logger = logging.getLogger(__name__)

REPLACEMENTS: dict[str, Callable[[nn.Module], nn.Module | None]] = {
    "norms": norms.replace,  # first: the attention swap recognises head norms by it
    "attention": attention.replace,
    "mlp": mlp.replace,
    "layers": layers.replace,  # of parts that are swapped already
}
"""Checked against recorded calls of the modules as they were before the first swap."""

NAMES = (*REPLACEMENTS, "projections", "kernels", "stacks", "linears")

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest distance of outputs relative to their norm: a few roundings of the number format. In a short one that is more
than many a mistake makes."""
TOLERANCE_IN_FLOAT32 = {1: 1e-4, 64: 1e-2}
"""Of the first module of each kind, by the factor of its input. Some models clamp, which ordinary values do not show;
but scores grow with the square of the input, and their rounding errors with them."""
ROUNDING = 1e-6
"""Of float32 numbers, with room."""
PER_LAYER = frozenset({"layer_idx", "layer_id", bridge.LAYER_ATTRIBUTE})
"""Fields that differ between modules of one kind."""


@runtime_checkable
class HasKernels(Protocol):
    """A replacement that can compute with kernels of ours."""

    def compute_with_kernels(self) -> bool:
        """Do so from now on, where there is one for its shape and dtype; returns whether."""


@runtime_checkable
class HasGpuKernels(Protocol):
    """The same with Triton kernels."""

    def compute_with_gpu_kernels(self) -> bool:
        """Do so from now on, where there is one for what it does; returns whether."""


@dataclass(slots=True)
class Call:
    """One call of a module in the recorded pass."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


def apply(
    model: nn.Module,
    *,
    dtype: torch.dtype,
    run: Callable[[], object],
    without: Iterable[str] = (),
    on_gpu: bool = False,
) -> dict[str, int]:
    """Replace modules in place; returns how many by each swap.

    ``run`` makes one forward pass in which attention is answered without a cache. ``without`` leaves swaps out.
    ``on_gpu``: kernels are Triton's, and the attention back end is one that rotates; else they are a processor's.
    """
    left_out = frozenset(without)
    unknown = left_out - set(NAMES)
    assert not unknown, f"no such swap: {unknown}"
    counts = dict.fromkeys(NAMES, 0)
    lists = [(list(module), module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    order = None if on_gpu or left_out & {"kernels", "stacks"} else Order()
    with torch.inference_mode():
        calls = _record(model, [module for module in model.modules() if _might_replace(module)], run, order)
        for name, replace in REPLACEMENTS.items():
            if name not in left_out:
                counts[name] = _replace_checked(model, replace, calls, TOLERANCE[dtype])
        if "projections" not in left_out:
            counts["projections"] = sum(projections.replace_children(module) for module in list(model.modules()))
        if on_gpu and "kernels" not in left_out:
            gpu_swapped = [module for module in reversed(list(model.modules())) if isinstance(module, HasGpuKernels)]
            counts["kernels"] = sum(module.compute_with_gpu_kernels() for module in gpu_swapped)
            left_out |= {"kernels"}
        if "kernels" not in left_out:
            # Parts first: a whole layer has kernels only if all its parts have.
            swapped = [module for module in reversed(list(model.modules())) if isinstance(module, HasKernels)]
            counts["kernels"] = sum(module.compute_with_kernels() for module in swapped)
        if order is not None:
            counts["stacks"] = order.stack((recorded, list(module)) for recorded, module in lists)
        if "linears" not in left_out:
            # Only layers that are called: of others the model reads the weight itself.
            called = _record(model, [module for module in model.modules() if linears.plain_weights(module)], run)

            def packed(module: nn.Module) -> nn.Module | None:
                return linears.pack(module, with_kernels="kernels" not in left_out) if module in called else None

            counts["linears"] = _replace(model, packed)
    gc.collect()
    logger.info("swapped modules: %s", ", ".join(f"{count} {name}" for name, count in counts.items() if count))
    return counts


def _replace_checked(
    model: nn.Module, replace: Callable[[nn.Module], nn.Module | None], calls: dict[nn.Module, Call], tolerance: float
) -> int:
    kinds: dict[Any, bool] = {}

    def checked(module: nn.Module) -> nn.Module | None:
        call = calls.get(module)
        if call is None:
            return None
        try:
            replacement = replace(module)
            if replacement is None:
                return None
            kind = _kind(module)
            if kind not in kinds:
                kinds[kind] = False  # also if the comparison fails
                kinds[kind] = _same_in_float32(module, replace, call)
            same = kinds[kind] and _same(replacement.eval()(*call.args, **call.kwargs), call.output, tolerance)
        except Exception as error:  # whatever a stranger's module may raise where it does not fit
            logger.debug("%s keeps its own forward: %s", type(module).__name__, error)
            return None
        return replacement if same else None

    return _replace(model, checked)


def _kind(module: nn.Module) -> Any:
    """What decides how a module computes, but the values of its weights: equal for modules of one kind."""
    return tuple(
        (
            name,
            type(each),
            *((key, _value(value)) for key, value in vars(each).items() if key not in _INTERNAL | PER_LAYER),
            *((key, _value(tensor)) for key, tensor in each.named_parameters(recurse=False)),
            *((key, _value(tensor)) for key, tensor in each.named_buffers(recurse=False)),
        )
        for name, each in module.named_modules()
    )


_INTERNAL = frozenset(vars(nn.Module()))


def _value(value: Any) -> Any:
    """What is compared of a field. Objects that are not plain values are equal only to themselves."""
    if isinstance(value, dict):
        return tuple((key, _value(each)) for key, each in value.items())
    if isinstance(value, list | tuple):
        return tuple(_value(each) for each in value)
    if isinstance(value, Tensor):  # a single number may switch something off
        return value.shape, value.dtype, value.item() if value.numel() == 1 else None
    return value if value is None or isinstance(value, bool | int | float | str | torch.dtype) else id(value)


def _same_in_float32(module: nn.Module, replace: Callable[[nn.Module], nn.Module | None], call: Call) -> bool:
    """Compare on the recorded input and far out of range, in float32, where roundings hide nothing.

    Done on a copy of one module of each kind, so that weights of a whole model are not converted.
    """
    own = copy.deepcopy(module).float()
    replacement = replace(own)
    if replacement is None:
        return False
    replacement.eval()
    for factor, tolerance in TOLERANCE_IN_FLOAT32.items():
        args, kwargs = _as_float(call.args), _as_float(call.kwargs)
        if args and isinstance(args[0], Tensor):
            hidden = args[0] * factor
            args = (hidden, *args[1:])
        else:
            hidden = kwargs["hidden_states"] = kwargs["hidden_states"] * factor
        # What a layer adds to its input is all that it does: the sum would hide it.
        added_to = hidden if isinstance(replacement, layers.FusedLayer) else None
        if not _same(replacement(*args, **kwargs), own(*args, **kwargs), tolerance, added_to):
            return False
    return True


def _as_float(value: Any) -> Any:
    """The same arguments with every floating point tensor in float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(_as_float(each) for each in value)
    if isinstance(value, dict):
        return {key: _as_float(each) for key, each in value.items()}
    return value


def _might_replace(module: nn.Module) -> bool:
    return "RMSNorm" in type(module).__name__ or any(
        name in dict(module.named_children()) for name in ("q_proj", "gate_proj", "self_attn")
    )


def _record(
    model: nn.Module, modules: list[nn.Module], run: Callable[[], object], order: Order | None = None
) -> dict[nn.Module, Call]:
    """``order`` is told of layers."""
    calls: dict[nn.Module, Call] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls[module] = Call(args, kwargs, output)
        if order is not None and hasattr(module, "self_attn"):
            order.note(module, args, kwargs, output)

    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in modules]
    try:
        run()
    except Unservable:
        raise
    except Exception as error:
        raise Unservable(f"it does not run with positions spread far ({first_line(error)})") from error
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _replace(model: nn.Module, replace: Callable[[nn.Module], nn.Module | None]) -> int:
    """Walk the tree and put replacements in place; a module that occurs twice stays one module."""
    done: dict[nn.Module, nn.Module] = {}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child not in done:
                replacement = replace(child)
                if replacement is None:
                    continue
                done[child] = replacement
            setattr(parent, name, done[child])
    return len(done)


def _same(ours: Any, theirs: Any, tolerance: float, added_to: Tensor | None = None) -> bool:
    """Whether outputs, or first outputs, are equal but for roundings. ``added_to`` is the part that needs no look."""
    if isinstance(theirs, tuple):
        ours, theirs = ours[0], theirs[0]
    if not isinstance(ours, Tensor) or ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    ours, theirs = ours.float().nan_to_num(), theirs.float().nan_to_num()
    distance = (ours - theirs).norm()
    if added_to is None:
        return bool(distance <= tolerance * theirs.norm())
    return bool(distance <= tolerance * (theirs - added_to).norm() + ROUNDING * theirs.norm())
