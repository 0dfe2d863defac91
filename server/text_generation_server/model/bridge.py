"""Where a transformers model's attention calls arrive: one function in its attention interface, one handler behind it.

Two implementations are registered. ``RECORDING`` has a mask function too, so that the library tells us each layer's
mask; ``PAGED`` has none, so that no mask is ever made. Which one a model uses is a field of its configuration.

Shape legend: T tokens, H query heads, K key/value heads, D key width, E value width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from text_generation_server.cpu_kernels.compiler import Launch

PAGED = "text_generation_paged"
RECORDING = "text_generation_recording"

LAYER_ATTRIBUTE = "text_generation_layer"
"""Set on an attention module by the probe: the index of its cache."""

IGNORED = frozenset(
    {
        # What the library hands down to every layer, which is ours to decide or has no effect on one attention call.
        "attention_mask", "cache_position", "dropout", "is_causal", "logits_to_keep", "output_attentions",
        "output_hidden_states", "output_router_logits", "past_key_values", "position_embeddings", "position_ids",
        "return_dict", "scaling", "sliding_window", "softcap", "s_aux", "use_cache",
    }
)  # fmt: skip


class Unservable(Exception):
    """The model does something that paged attention cannot honour; the text is the reason, without a subject."""


class Handler(Protocol):
    """What a forward pass does with an attention call."""

    def __call__(
        self, module: nn.Module, query_HTD: Tensor, key_KTD: Tensor, value_KTE: Tensor, arguments: dict[str, Any]
    ) -> Tensor: ...


_handler: Handler | None = None


@contextlib.contextmanager
def handling(handler: Handler) -> Iterator[None]:
    """Send the attention calls of the forward passes inside to ``handler``. One thread runs models in a process."""
    global _handler
    previous, _handler = _handler, handler
    try:
        yield
    finally:
        _handler = previous


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **arguments: Any
) -> tuple[Tensor, None]:
    """The function in transformers' attention interface. Query is [1, H, T, D]; the result is [1, T, H, E]."""
    arguments["attention_mask"] = attention_mask
    return attend(module, query[0], key[0], value[0], arguments)[None], None


def attend(
    module: nn.Module, query_HTD: Tensor, key_KTD: Tensor, value_KTE: Tensor, arguments: dict[str, Any]
) -> Tensor:
    """The same call from a module of ours, which need not pretend to have a batch; [T, H, E].

    It may leave the rotation of queries and keys to the back end, as the argument ``rotation``, where that knows of it.
    """
    if _handler is None:
        raise RuntimeError("attention was called outside of a step")
    return _handler(module, query_HTD, key_KTD, value_KTE, arguments)


def launches(
    module: nn.Module,
    query_HTD: Tensor,
    key_KTD: Tensor,
    value_KTE: Tensor,
    out_THE: Tensor,
    arguments: dict[str, Any],
) -> tuple[Launch, ...] | None:
    """The same call as a part of a launch of the caller's, which is to run now; see ``LaunchingBackend``. None where
    the handler only knows of calls."""
    launching = getattr(_handler, "launches", None)
    return None if launching is None else launching(module, query_HTD, key_KTD, value_KTE, out_THE, arguments)


def launch_key() -> Hashable | None:
    """Equal in two steps: `launches` returns for every module what it returned then, if given the same memory. None:
    ask it again."""
    key = getattr(_handler, "launch_key", None)
    return None if key is None else key()


def launched_again(num_calls: int) -> None:
    """Of so many modules the launches of an earlier step are run, whose key is equal."""
    assert _handler is not None
    _handler.launched_again(num_calls)  # type: ignore[attr-defined]


def recorded_mask(
    *,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any],
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor:
    """The mask function of ``RECORDING``: an empty tensor that carries the mask's (window, chunk), or None for a mask
    that we cannot honour. Some models make masks that no layer uses, so only a layer that gets one is an error."""
    mask = torch.empty((1, 1, q_length, kv_length), device=device)
    mask.text_generation_sight = _sight(mask_function, local_size or 0, torch.device(device))  # type: ignore[attr-defined]
    return mask


def _sight(mask_function: Callable[..., Any], size: int, device: torch.device) -> tuple[int, int] | None:
    """Ask a mask what a far query sees: (window, 0), (0, chunk), (0, 0) for all before it, None for anything else."""
    query = 3 * size + 5 if size else 1024
    keys = torch.arange(query + 3, device=device)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    try:
        seen = mask_function(zero, zero, torch.tensor(query, device=device), keys)
    except (IndexError, RuntimeError):  # it looks at more than positions
        return None
    seen = torch.as_tensor(seen, device=device).expand_as(keys)
    causal = keys <= query
    candidates = {(0, 0): causal}
    if size:
        candidates[size, 0] = causal & (keys > query - size)
        candidates[0, size] = causal & (keys // size == query // size)
    for sight, expected in candidates.items():
        if torch.equal(seen, expected):
            return sight
    return None


def register() -> None:
    """Make both implementations known to transformers; again is harmless."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(PAGED, attention)
    AttentionInterface.register(RECORDING, attention)
    AttentionMaskInterface.register(RECORDING, recorded_mask)


def use_implementation(model: nn.Module, name: str) -> None:
    """Switch every configuration inside a model to an attention implementation, without the library's own checks:
    they ask what a class declares, while the probe asks what it does."""
    seen: set[int] = set()
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation") and id(config) not in seen:
            seen.add(id(config))
            config._attn_implementation = name


def check_arguments(arguments: dict[str, Any]) -> None:
    """Raises: Unservable for an attention argument that changes the result in a way we do not know."""
    if arguments.get("is_causal") is False:
        raise Unservable("its attention is not causal")
    for name, value in arguments.items():
        if name not in IGNORED and value is not None and value is not False:
            raise Unservable(f"its attention takes `{name}`, which is not known here")
