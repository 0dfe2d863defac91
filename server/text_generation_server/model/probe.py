"""What is served is found out, not declared: the load-time probe.

A model's own attention over whole sequences gives reference logits. The same tokens then go through the paged path as
the server runs it - two sequences packed together, prefilled in uneven chunks, then decoded token by token - and the
logits must agree. State that lives outside of attention (convolutions, recurrences), positions taken from a mask,
biases that never reach the attention interface: all of it shows as a difference.

Shape legend: T tokens, H query heads, K key/value heads, D key width, E value width, V vocabulary.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from text_generation_server.attention.interface import LayerSpec, Rotation
from text_generation_server.engine.batch import Row, Sequence
from text_generation_server.engine.inputs import ForwardInputs, build_inputs
from text_generation_server.errors import first_line
from text_generation_server.generation.parameters import SamplingParameters
from text_generation_server.model import bridge
from text_generation_server.model.bridge import Unservable

MAX_PROBE_TOKENS = 64
SHORT_PROBE_TOKENS = 21
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}
"""Largest mean error of a row of logits relative to its spread; rounding stays a factor of five below."""


@dataclass(slots=True)
class Recorder:
    """Handler of the recording forward pass: notes how each layer attends, and attends densely."""

    layers: list[LayerSpec]
    modules: list[nn.Module]

    def __call__(
        self, module: nn.Module, query_HTD: Tensor, key_KTD: Tensor, value_KTE: Tensor, arguments: dict[str, Any]
    ) -> Tensor:
        bridge.check_arguments(arguments)
        if any(module is known for known in self.modules):
            raise Unservable("a layer attends more than once in a forward pass")
        if key_KTD.shape[1] != query_HTD.shape[1] or value_KTE.shape[1] != query_HTD.shape[1]:
            raise Unservable("its layers do not attend over the tokens they are given")
        if query_HTD.shape[0] % key_KTD.shape[0] or key_KTD.shape[0] != value_KTE.shape[0]:
            raise Unservable("its query heads do not share key/value heads evenly")
        mask = arguments.get("attention_mask")
        # A mask that carries nothing has been changed or made by the model, and may hide anything.
        unmarked = None if isinstance(mask, Tensor) else (arguments.get("sliding_window") or 0, 0)
        sight = getattr(mask, "text_generation_sight", unmarked)
        if sight is None:
            raise Unservable("its attention mask is neither causal, sliding nor chunked")
        window, chunk = sight
        self.modules.append(module)
        self.layers.append(
            LayerSpec(
                query_heads=query_HTD.shape[0],
                kv_heads=key_KTD.shape[0],
                key_dim=key_KTD.shape[2],
                value_dim=value_KTE.shape[2],
                window=window,
                chunk=chunk,
                softcap=float(arguments.get("softcap") or 0.0),
                has_sinks=arguments.get("s_aux") is not None,
            )
        )
        return dense(module, query_HTD, key_KTD, value_KTE, arguments)


def dense(
    module: nn.Module, query_HTD: Tensor, key_KTD: Tensor, value_KTE: Tensor, arguments: dict[str, Any]
) -> Tensor:
    """Handler that attends causally without a cache: enough to see shapes, and to compare modules with each other."""
    rotation: Rotation | None = arguments.get("rotation")
    if rotation is not None:
        query_HTD, key_KTD = rotation.plainly(query_HTD, key_KTD)
    out = F.scaled_dot_product_attention(
        query_HTD[None],
        key_KTD[None],
        value_KTE[None],
        is_causal=True,
        scale=arguments.get("scaling"),
        enable_gqa=True,
    )
    return out[0].transpose(0, 1).contiguous()


@dataclass(frozen=True, slots=True)
class Reference:
    """Two prompts and the logits of the model's own attention at each of their positions."""

    prompts: tuple[Tensor, Tensor]
    logits: tuple[Tensor, Tensor]
    """float32 [T, V] each."""
    dtype: torch.dtype
    """Of the model: what sets the tolerance."""


@torch.inference_mode()
def record(model: nn.Module, *, vocab_size: int, num_layers: int, device: torch.device) -> list[LayerSpec]:
    """Learn how each layer attends and number its module. Raises: Unservable."""
    recorder = Recorder([], [])
    bridge.use_implementation(model, bridge.RECORDING)
    ids = _token_ids(SHORT_PROBE_TOKENS, vocab_size, 1, device)
    try:
        with bridge.handling(recorder):
            _run(model, ids)
    except Unservable:
        raise
    except Exception as error:  # any failure of library code on packed input is a reason to refuse, not to crash
        raise Unservable(f"it does not run with our attention function ({first_line(error)})") from error
    calls = len(recorder.layers)
    if calls == 0:
        raise Unservable("its attention does not go through transformers' attention interface")
    if calls != num_layers:
        raise Unservable(f"only {calls} of its {num_layers} layers use attention through transformers' interface")
    for index, module in enumerate(recorder.modules):
        setattr(module, bridge.LAYER_ATTRIBUTE, index)
    return recorder.layers


def dense_pass(model: nn.Module, *, vocab_size: int, max_positions: int, device: torch.device) -> Callable[[], Tensor]:
    """A forward pass over one short sequence, to be run with the handler `dense`.

    Its positions are spread up to the last one: some models scale by position, but only far from the beginning.
    """
    ids = _token_ids(SHORT_PROBE_TOKENS, vocab_size, 3, device)
    stride = max(1, (max_positions or 100_000) // SHORT_PROBE_TOKENS)
    positions = torch.arange(SHORT_PROBE_TOKENS, device=device) * stride

    def run() -> Tensor:
        logits: Tensor = model(input_ids=ids[None], position_ids=positions[None], use_cache=False).logits
        return logits

    return run


@torch.inference_mode()
def reference(
    model: nn.Module, layers: list[LayerSpec], *, vocab_size: int, dtype: torch.dtype, device: torch.device
) -> Reference:
    """Logits of the model's own attention, whole sequences at once, with its full mask."""
    small = [size for layer in layers for size in (layer.window, layer.chunk) if size]
    longest = min(MAX_PROBE_TOKENS, max([SHORT_PROBE_TOKENS + 8, *(size + 12 for size in small)]))
    prompts = (_token_ids(longest, vocab_size, 1, device), _token_ids(SHORT_PROBE_TOKENS, vocab_size, 2, device))
    bridge.use_implementation(model, "eager")
    try:
        logits = (_run(model, prompts[0]).float(), _run(model, prompts[1]).float())
    except Exception as error:
        raise Unservable(f"its own attention does not run ({first_line(error)})") from error
    for each in logits:
        if not bool(each.isfinite().all()):
            raise Unservable("its logits are not finite; try another --dtype")
    return Reference(prompts, logits, dtype)


@torch.inference_mode()
def verify(forward: Callable[[ForwardInputs], Tensor], expected: Reference, *, block_size: int, what: str) -> None:
    """Compare the paged path with the reference. ``forward`` writes to a cache of at least ``blocks_needed`` blocks.

    Raises: Unservable, naming ``what`` was run.
    """
    found = distance(forward, expected, block_size=block_size, what=what)
    if not found <= TOLERANCE[expected.dtype]:
        raise Unservable(f"{what} gives other logits than the model's own attention (relative error {found:.2g})")


@torch.inference_mode()
def distance(forward: Callable[[ForwardInputs], Tensor], expected: Reference, *, block_size: int, what: str) -> float:
    """The error of the paged path's logits, relative to their spread. Raises: Unservable if it does not run."""
    rows: tuple[list[Tensor], list[Tensor]] = ([], [])
    for step in probe_steps(expected.prompts, block_size):
        device = expected.prompts[0].device
        inputs, counts = build_inputs(step, block_size=block_size, device=device, pads=device.type == "cpu")
        try:
            logits = forward(inputs)
        except Exception as error:
            raise Unservable(f"{what} fails ({first_line(error)})") from error
        for row, count in zip(step, counts, strict=True):
            rows[row.sequence.sequence_id].append(logits[:count].float())
            logits = logits[count:]
    errors = torch.cat([_row_errors(torch.cat(ours), own) for ours, own in zip(rows, expected.logits, strict=True)])
    # In a short float a near-tie in a router sends single tokens elsewhere; a real mismatch shows in most rows.
    return float(errors.max() if expected.dtype == torch.float32 else errors.mean())


def probe_steps(prompts: tuple[Tensor, Tensor], block_size: int) -> list[list[Row]]:
    """Every token of both prompts once, in five steps that mix decode rows and chunks of uneven length."""
    first, second = (len(prompt) for prompt in prompts)
    cuts = [
        [(0, 0, 13), (1, 0, 6)],
        [(1, 6, 7), (0, 13, first - 2)],
        [(0, first - 2, first - 1), (1, 7, second - 2)],
        [(0, first - 1, first), (1, second - 2, second - 1)],
        [(1, second - 1, second)],
    ]
    sequences = [
        Sequence(
            sequence_id=index,
            token_ids=array("q", prompt.tolist()),
            num_prompt_tokens=len(prompt),
            num_given=len(prompt),
            block_table=list(range(1 + index, 1 + blocks_needed(block_size), 2)),  # no two of them lie together
            num_computed=0,
            num_cached=0,
            num_verified=0,
            sampling=SamplingParameters(),
            top_n_tokens=0,
            prefill_logprobs=True,  # logits of every token
        )
        for index, prompt in enumerate(prompts)
    ]
    return [
        [Row(sequences[index], start, stop - start, is_decode=stop - start == 1) for index, start, stop in step]
        for step in cuts
    ]


def blocks_needed(block_size: int) -> int:
    """Of the probe's cache, padding not counted."""
    return 2 * -(-MAX_PROBE_TOKENS // block_size)


def _run(model: nn.Module, ids_T: Tensor) -> Tensor:
    """A plain forward pass over one whole sequence; logits [T, V]."""
    positions = torch.arange(len(ids_T), device=ids_T.device)
    logits: Tensor = model(input_ids=ids_T[None], position_ids=positions[None], use_cache=False).logits
    return logits[0]


def _token_ids(length: int, vocab_size: int, seed: int, device: torch.device) -> Tensor:
    """Spread over the vocabulary, the same every time, without the first ids, where special tokens live."""
    first = min(10, vocab_size // 2)
    spread = (torch.arange(length, dtype=torch.int64) * 2654435761 + seed * 40503) % 2**31
    return (first + spread % (vocab_size - first)).to(device)


def _row_errors(ours_TV: Tensor, theirs_TV: Tensor) -> Tensor:
    """Distance of each row relative to the spread of the reference row; [T]. Rows that are not finite count as 1e9."""
    spread = (theirs_TV - theirs_TV.mean(-1, keepdim=True)).norm(dim=-1).clamp_min(1e-6)
    errors: Tensor = (ours_TV - theirs_TV).norm(dim=-1) / spread
    return errors.nan_to_num(1e9, 1e9, 1e9)
