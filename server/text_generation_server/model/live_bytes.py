"""The most bytes of tensors that are alive at once while code runs: counted, not measured, so it is the same each time.

It works on the meta device too, where tensors have shapes and no memory: what a forward pass will need is known before
there is anything to run it with.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is made inside; tensors that were there before are not counted.

    What a kernel takes and gives back inside of one operation is not seen. On the meta device, where numbers are not
    known, operations that need them get an answer all the same: indices of what is not zero are all of them, which is
    the most that there can be, and a single number is 0.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._live = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self._looks: dict[Any, tuple[torch.Size, tuple[int, ...], torch.dtype]] = {}
        """Results on the meta device, by operation and arguments."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with self:  # in inference mode operations arrive here whole that are made of others
            parts: Any = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        given = _with_storage((args, kwargs))
        result = self._on_meta(func, args, kwargs) if given and given[0].is_meta else func(*args, **kwargs)
        # A view, or what is computed in place, is no memory of its own.
        own = {id(tensor.untyped_storage()) for tensor in given}
        for tensor in _with_storage(result):
            storage = tensor.untyped_storage()
            if id(storage) not in own and storage not in self._known:
                self._count(storage)
        return result

    def _on_meta(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operation without numbers, worked out once for arguments that look the same: layers are alike, and the
        shape of a sum takes longer in Python than many a sum."""
        without_numbers = _WITHOUT_NUMBERS.get(func)
        if without_numbers is not None:
            return without_numbers(args[0])
        if any(argument.alias_info is not None for argument in func._schema.arguments):
            return func(*args, **kwargs)  # a view, or done in place
        key = func, _look(args), _look(tuple(kwargs.items()))
        if key in self._looks:
            shape, stride, dtype = self._looks[key]
            return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            self._looks[key] = result.shape, result.stride(), result.dtype
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        num_bytes = storage.nbytes()
        self._known.add(storage)
        self._live += num_bytes
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._release, num_bytes).atexit = False

    def _release(self, num_bytes: int) -> None:
        self._live -= num_bytes


def _with_storage(tree: Any) -> list[Tensor]:
    """The tensors in arguments or results, but for weights that oneDNN has packed."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and not leaf.is_mkldnn]


def _look(argument: Any) -> Any:
    """What decides about the shape of a result; equal for arguments that look the same."""
    if isinstance(argument, Tensor):
        return argument.shape, argument.stride(), argument.dtype
    if isinstance(argument, list | tuple):
        return tuple(_look(each) for each in argument)
    return type(argument), argument  # 1, 1.0 and True are equal, and make different results


def _all_indices(tensor: Tensor) -> Tensor:
    return tensor.new_empty((tensor.numel(), tensor.ndim), dtype=torch.int64)


def _zero(tensor: Tensor) -> bool | int | float:
    return False if tensor.dtype == torch.bool else 0.0 if tensor.is_floating_point() else 0


_WITHOUT_NUMBERS: dict[Any, Callable[[Tensor], Any]] = {
    torch.ops.aten.nonzero.default: _all_indices,
    torch.ops.aten._local_scalar_dense.default: _zero,
}
