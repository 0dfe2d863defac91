"""Layers one after another in a single launch, where a step is short.

What Python does between two layers is a few hundred microseconds when the weights have just gone through the caches:
with a 1.1B model a tenth of a decode step, with a 135M model more.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from text_generation_server.cpu_kernels.compiler import Kernel, Launch, Sequence
from text_generation_server.model import bridge
from text_generation_server.model.swaps.layer_kernels import LayerKernels, Step
from text_generation_server.model.swaps.layers import FusedLayer

MAX_TOKENS = 64
"""Of a step that is one launch. In longer ones each layer is a sign of progress, and Python a small part of it."""


class LayerStack:
    """The first layer computes all; the others are called, and find it done."""

    def __init__(self, layers: list[LayerKernels]) -> None:
        self._layers = layers
        self._known: Hashable = None
        """What the launch's arguments were made of."""
        self._kernels: tuple[Kernel, ...] = ()
        self._sequence = Sequence()
        for layer in layers:
            layer.stack = self

    def computes(self, layer: LayerKernels, step: Step) -> bool:
        """Whether this call of a layer is done with, here or by the first one's."""
        if layer is self._layers[0]:
            step.computed = iter(self._layers[1:]) if self._run(step) else None
            return step.computed is not None
        if step.computed is None:
            return False
        assert next(step.computed) is layer, "the layers are called in another order than at the start"
        return True

    def _run(self, step: Step) -> bool:
        key = bridge.launch_key() if step.num_tokens <= MAX_TOKENS else None
        if key is None:
            return False
        known = step.addresses, key
        if known == self._known:
            bridge.launched_again(len(self._layers))
        else:
            self._fill([launch for layer in self._layers for launch in layer.launches(step)])
            self._known = known
        self._sequence.run()
        return True

    def _fill(self, launches: list[Launch]) -> None:
        kernels = tuple(kernel for kernel, _ in launches)
        if kernels != self._kernels:
            self._kernels, self._sequence = kernels, Sequence(*kernels)
        self._sequence.fill(*(arguments for _, arguments in launches))


class Order:
    """Recorded in a forward pass: which layers get just what the one before them returned, and its angles."""

    def __init__(self) -> None:
        self._last: tuple[nn.Module, Tensor, Tensor, Any] | None = None
        """The last layer, its output, what that was then, and its angles."""
        self._before: dict[nn.Module, nn.Module | None] = {}
        self._called_again: set[nn.Module] = set()

    def note(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A call has returned."""
        hidden = args[0] if args else kwargs.get("hidden_states")
        angles = kwargs.get("position_embeddings")
        output = output[0] if isinstance(output, tuple) else output
        if layer in self._before:
            self._called_again.add(layer)
        self._before[layer] = None
        if self._last is not None:
            before, returned, copy, its_angles = self._last
            if hidden is returned and torch.equal(hidden, copy) and angles is its_angles:
                self._before[layer] = before
        self._last = (layer, output, output.clone(), angles) if isinstance(output, Tensor) else None

    def follows(self, layer: nn.Module, before: nn.Module) -> bool:
        """Whether both were called once, and the layer got just what the one before it had returned."""
        return self._before.get(layer) is before and self._called_again.isdisjoint((layer, before))

    def stack(self, lists: Iterable[tuple[list[nn.Module], list[nn.Module]]]) -> int:
        """Stack what may be; returns how many stacks. ``lists``: of layers as they were recorded, and what is in their
        places now."""
        stacks: list[list[LayerKernels]] = []
        for recorded, now in lists:
            before: nn.Module | None = None
            for layer, module in zip(recorded, now, strict=True):
                kernels = module.kernels if isinstance(module, FusedLayer) else None
                if kernels is None or not kernels.is_plain:
                    before = None
                    continue
                if before is not None and self.follows(layer, before) and stacks[-1][-1].shape == kernels.shape:
                    stacks[-1].append(kernels)
                else:
                    stacks.append([kernels])
                before = layer
        stacks = [layers for layers in stacks if len(layers) > 1]
        for layers in stacks:
            LayerStack(layers)
        return len(stacks)
