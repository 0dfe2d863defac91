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
from typing import Any

import torch
from torch import Tensor, nn

from text_generation_server.model.bridge import Unservable
from text_generation_server.model.swaps import attention, layers, linears, mlp, norms, projections

logger = logging.getLogger(__name__)

REPLACEMENTS: dict[str, Callable[[nn.Module], nn.Module | None]] = {
    "norms": norms.replace,  # first: the attention swap recognises head norms by it
    "attention": attention.replace,
    "mlp": mlp.replace,
    "layers": layers.replace,  # of parts that are swapped already
}
"""Checked against recorded calls."""

NAMES = (*REPLACEMENTS, "projections", "linears")

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest distance of outputs relative to their norm; a few roundings of the number format."""
LARGE_INPUT = 64
LARGE_INPUT_TOLERANCE = 1e-2
"""In float32. Scores grow with the square of the input, and their rounding errors with them."""


@dataclass(slots=True)
class Call:
    """One call of a module in the recorded pass."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


def apply(
    model: nn.Module, *, dtype: torch.dtype, run: Callable[[], object], without: Iterable[str] = ()
) -> dict[str, int]:
    """Replace modules in place; returns how many by each swap.

    ``run`` makes one forward pass in which attention is answered without a cache. ``without`` leaves swaps out.
    """
    left_out = frozenset(without)
    unknown = left_out - set(NAMES)
    assert not unknown, f"no such swap: {unknown}"
    counts = dict.fromkeys(NAMES, 0)
    with torch.inference_mode():
        for name, replace in REPLACEMENTS.items():
            if name not in left_out:
                counts[name] = _replace_checked(model, replace, run, TOLERANCE[dtype])
        if "projections" not in left_out:
            counts["projections"] = sum(projections.replace_children(module) for module in list(model.modules()))
        if "linears" not in left_out:
            # Only layers that are called: of others the model reads the weight itself.
            called = _record(model, [module for module in model.modules() if linears.plain_weights(module)], run)
            counts["linears"] = _replace(model, lambda module: linears.pack(module) if module in called else None)
    gc.collect()
    logger.info("swapped modules: %s", ", ".join(f"{count} {name}" for name, count in counts.items() if count))
    return counts


def _replace_checked(
    model: nn.Module, replace: Callable[[nn.Module], nn.Module | None], run: Callable[[], object], tolerance: float
) -> int:
    calls = _record(model, [module for module in model.modules() if _might_replace(module)], run)
    equal_far_out: dict[type, bool] = {}

    def checked(module: nn.Module) -> nn.Module | None:
        call = calls.get(module)
        replacement = replace(module) if call is not None else None
        if call is None or replacement is None:
            return None
        try:
            same = _same(replacement.eval()(*call.args, **call.kwargs), call.output, tolerance)
            if same and type(module) not in equal_far_out:
                equal_far_out[type(module)] = _same_far_out(module, replace, call)
        except (Unservable, RuntimeError, TypeError, AssertionError, IndexError) as error:
            logger.debug("%s keeps its own forward: %s", type(module).__name__, error)
            return None
        return replacement if same and equal_far_out[type(module)] else None

    return _replace(model, checked)


def _same_far_out(module: nn.Module, replace: Callable[[nn.Module], nn.Module | None], call: Call) -> bool:
    """Compare on a hidden state far out of range, in float32: some models clamp, which ordinary values do not show.

    Done on a copy of one module of each class, so that weights of a whole model are not converted.
    """
    own = copy.deepcopy(module).float()
    replacement = replace(own)
    if replacement is None:
        return False
    args, kwargs = _as_float(call.args), _as_float(call.kwargs)
    if args and isinstance(args[0], Tensor):
        args = (args[0] * LARGE_INPUT, *args[1:])
    elif isinstance(kwargs.get("hidden_states"), Tensor):
        kwargs["hidden_states"] = kwargs["hidden_states"] * LARGE_INPUT
    output = own(*args, **kwargs)
    return _same(replacement.eval()(*args, **kwargs), output, LARGE_INPUT_TOLERANCE)


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


def _record(model: nn.Module, modules: list[nn.Module], run: Callable[[], object]) -> dict[nn.Module, Call]:
    calls: dict[nn.Module, Call] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls[module] = Call(args, kwargs, output)

    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in modules]
    try:
        run()
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


def _same(ours: Any, theirs: Any, tolerance: float) -> bool:
    if isinstance(theirs, tuple):
        ours, theirs = ours[0], theirs[0]
    if not isinstance(ours, Tensor) or ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    ours, theirs = ours.float().nan_to_num(), theirs.float().nan_to_num()
    return bool((ours - theirs).norm() <= tolerance * theirs.norm())
