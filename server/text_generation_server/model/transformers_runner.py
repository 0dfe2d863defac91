"""A transformers model that runs packed steps over a paged cache.

Shape legend: T tokens of the step, L rows whose logits are wanted, V vocabulary, H query heads, K key/value heads,
D key width, E value width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from text_generation_server.attention.interface import AttentionBackend, LaunchingBackend, LayerSpec, Rotation
from text_generation_server.engine.inputs import ForwardInputs
from text_generation_server.engine.kv_cache import KVCache
from text_generation_server.engine.page_touch import PageTouch
from text_generation_server.model import bridge
from text_generation_server.model.runner import ModelInfo
from text_generation_server.model.temperature import Temperature

if TYPE_CHECKING:
    from text_generation_server.cpu_kernels.compiler import Launch


class PagedStep:
    """The handler of a running step: attention calls go to the back end, with the cache of the calling layer."""

    __slots__ = ("cache", "calls", "plan", "positions_T", "runner")

    def __init__(self, runner: TransformersRunner, cache: KVCache, plan: Any, positions_T: Tensor) -> None:
        self.runner = runner
        self.cache = cache
        self.plan = plan
        self.positions_T = positions_T
        self.calls = 0

    def __call__(
        self, module: nn.Module, query_HTD: Tensor, key_KTD: Tensor, value_KTE: Tensor, arguments: dict[str, Any]
    ) -> Tensor:
        index: int = getattr(module, bridge.LAYER_ATTRIBUTE)
        runner = self.runner
        self.calls += 1
        runner.on_progress()
        options: dict[str, Any] = {}
        rotation: Rotation | None = arguments.get("rotation")
        temperature = runner.temperatures.get(index)
        if temperature is not None:
            if rotation is not None:  # the norms before it would undo the scaling
                query_HTD, key_KTD = rotation.plainly(query_HTD, key_KTD)
            query_HTD = temperature.apply(query_HTD, self.positions_T)
        elif rotation is not None:
            options["rotation"] = rotation
        return runner.backend.attend(
            self.plan,
            runner.layers[index],
            self.cache.layers[index],
            query_HTD,
            key_KTD,
            value_KTE,
            **_options(arguments, query_HTD),
            **options,
        )

    def launches(
        self,
        module: nn.Module,
        query_HTD: Tensor,
        key_KTD: Tensor,
        value_KTE: Tensor,
        out_THE: Tensor,
        arguments: dict[str, Any],
    ) -> tuple[Launch, ...] | None:
        index: int = getattr(module, bridge.LAYER_ATTRIBUTE)
        runner = self.runner
        if runner.launching is None or index in runner.temperatures:
            return None
        launches = runner.launching.launches(
            self.plan,
            runner.layers[index],
            self.cache.layers[index],
            query_HTD,
            key_KTD,
            value_KTE,
            out_THE,
            **_options(arguments, query_HTD),
        )
        if launches is not None:
            self.launched_again(1)
        return launches

    def launch_key(self) -> Hashable | None:
        runner = self.runner
        if runner.launching is None or runner.temperatures:
            return None
        key = runner.launching.launch_key(self.plan)
        return None if key is None else (runner.num_caches, key)

    def launched_again(self, num_calls: int) -> None:
        self.calls += num_calls
        self.runner.on_progress()


def _options(arguments: dict[str, Any], query_HTD: Tensor) -> dict[str, Any]:
    """What a back end calls the arguments of an attention call."""
    scaling = arguments.get("scaling")
    return {
        "scaling": query_HTD.shape[2] ** -0.5 if scaling is None else scaling,
        "softcap": arguments.get("softcap") or 0.0,
        "sinks_H": arguments.get("s_aux"),
    }


def base_model(model: Any) -> Any:
    """The part of a model that its output layer stands on; the model itself where there is no such part."""
    return getattr(model, "base_model", model)


class TransformersRunner:
    """Implements ``model/runner.py``'s ModelRunner."""

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: list[LayerSpec],
        temperatures: Mapping[int, Temperature],
        backend: AttentionBackend,
        block_size: int,
        info: ModelInfo,
    ) -> None:
        self.model = model
        self.layers = layers
        self.temperatures = temperatures
        """By layer, of those that have one."""
        self.backend = backend
        self.launching = backend if isinstance(backend, LaunchingBackend) else None
        self.block_size = block_size
        self.kv_dtype = info.dtype
        self.pads_steps = info.device.type == "cpu"
        self.cache: KVCache | None = None
        self.num_caches = 0
        """So far: which of them a launch reads."""
        self._page_touch: PageTouch | None = None
        self.on_progress: Callable[[], None] = lambda: None
        """Called by every layer of a step: a long prefill is no hang."""
        self._info = info
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    @property
    def info(self) -> ModelInfo:
        return self._info

    def allocate_kv_cache(self, num_blocks: int) -> None:
        self.release_kv_cache()  # before the new one is made
        self.num_caches += 1
        self.cache = KVCache(
            self.layers,
            num_blocks=num_blocks,
            block_size=self.block_size,
            dtype=self.kv_dtype,
            device=self._info.device,
        )
        if self._info.device.type == "cpu":
            self._page_touch = PageTouch(self.cache.tensors)

    def release_kv_cache(self) -> None:
        """Give the cache's memory back; `allocate_kv_cache` makes the next one."""
        if self._page_touch is not None:
            self._page_touch.stop()
        self.cache = self._page_touch = None

    def zero_blocks(self, block_ids: Iterable[int]) -> None:
        """Clear blocks of a request that failed with not-a-number, before they are handed out again."""
        assert self.cache is not None
        self.cache.zero_blocks(block_ids)

    @torch.inference_mode()
    def forward(self, inputs: ForwardInputs) -> Tensor:
        with nullcontext() if self._page_touch is None else self._page_touch.step(int(inputs.slots_T.max())):
            plan = self.backend.prepare(inputs)
            return self.compute(inputs.input_ids_T, inputs.position_ids_T, inputs.logits_indices_L, plan)

    def forward_with_states(self, inputs: ForwardInputs) -> tuple[Tensor, Tensor]:
        states: list[Tensor] = []

        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            states.append(output[0] if isinstance(output, tuple) else output.last_hidden_state)

        hook = base_model(self.model).register_forward_hook(note)
        try:
            logits_LV = self.forward(inputs)
        finally:
            hook.remove()
        return logits_LV, states[0][0]

    @torch.inference_mode()
    def compute(self, ids_T: Tensor, positions_T: Tensor, logits_indices_L: Tensor, plan: Any) -> Tensor:
        """A step whose ``plan`` the back end has made; logits [L, V].

        On a GPU nothing in here waits for it, unless the model's own code does.
        """
        assert self.cache is not None, "allocate_kv_cache comes first"
        step = PagedStep(self, self.cache, plan, positions_T)
        # Where all are wanted, they are wanted in their order: 0 means all, and copies nothing.
        wanted = 0 if logits_indices_L.shape[0] == ids_T.shape[0] else logits_indices_L
        options = {"logits_to_keep": wanted} if self._keeps_logits else {}
        with bridge.handling(step):
            output = self.model(
                input_ids=ids_T[None],
                position_ids=positions_T[None],
                use_cache=False,
                **options,
            )
        assert step.calls == len(self.layers), f"{step.calls} of {len(self.layers)} layers attended"
        logits: Tensor = output.logits[0]
        if not self._keeps_logits:
            logits = logits[logits_indices_L]
        return logits
