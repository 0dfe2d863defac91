"""A step of an attention back end against the obvious one: each sequence alone, all scores written out."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from text_generation_server.attention.interface import AttentionBackend, LayerSpec
from text_generation_server.attention.torch_paged import as_bytes
from text_generation_server.engine.inputs import ForwardInputs
from text_generation_server.engine.kv_cache import KVCache
from torch import Tensor


@contextlib.contextmanager
def uninitialised_is_nan() -> Iterator[None]:
    """Memory that torch hands out inside holds not-a-number: what is not written is seen."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def obvious(
    query_HND: Tensor,
    keys_KLD: Tensor,
    values_KLE: Tensor,
    layer: LayerSpec,
    scaling: float,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """The last N of L positions attend; [N, H, E]."""
    each = layer.query_heads // layer.kv_heads
    keys, values = keys_KLD.repeat_interleave(each, 0), values_KLE.repeat_interleave(each, 0)
    scores = query_HND @ keys.transpose(1, 2) * scaling
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    num_queries, num_keys = scores.shape[1:]
    position_N1, key_L = torch.arange(num_keys - num_queries, num_keys)[:, None], torch.arange(num_keys)
    hidden_NL = key_L > position_N1
    if layer.window:
        hidden_NL |= key_L <= position_N1 - layer.window
    if layer.chunk:
        hidden_NL |= key_L // layer.chunk != position_N1 // layer.chunk
    scores = scores.masked_fill(hidden_NL, -math.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.view(-1, 1, 1).expand(-1, num_queries, 1)), -1)
    return (scores.softmax(-1)[..., :num_keys] @ values).transpose(0, 1)


def cut_off(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """In another format, what is too large for it being the largest that it has."""
    largest = torch.finfo(dtype).max
    return numbers.float().clamp(-largest, largest).to(dtype)


def attended(
    backend_class: type[AttentionBackend],
    layer: LayerSpec,
    rows: list[tuple[int, int]],
    *,
    block_size: int,
    others: Sequence[LayerSpec] = (),
    scaling: float = 0.3,
    softcap: float = 0.0,
    sinks: bool = False,
    consecutive: bool = False,
    padding: int = 0,
    poisoned: bool = False,
    exact: bool = False,
    dtype: torch.dtype = torch.float32,
    query_dtype: torch.dtype | None = None,
    kv_dtype: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """What a back end gives for one step of one layer, and what is right, both [T, H, E] on the CPU.

    ``rows`` are (tokens already cached, new tokens), one-token rows with a past first. ``others`` are further layers of
    the model. Blocks are handed out in random order, unless ``consecutive``. Queries have the cache's ``dtype``, unless
    they are given one; the cache may have another, ``kv_dtype``, which holds keys and values without rounding if they
    are to be ``exact``. With ``poisoned``, slots that no token of a row has written hold not-a-number, and so does all
    memory that the back end asks for. The back end's result has rows for the padding too.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    contexts = [cached + new for cached, new in rows]
    counts = [-(-context // block_size) for context in contexts]
    free = list(range(1, sum(counts) + 1))
    if not consecutive:
        rng.shuffle(free)
    tables = [[free.pop(0) for _ in range(count)] for count in counts]
    where = torch.device(device)
    cache = KVCache(
        [layer], num_blocks=sum(counts), block_size=block_size, dtype=kv_dtype or dtype, device=torch.device(device)
    )
    if poisoned:
        cache.layers[0].keys_KSD.copy_(torch.tensor(math.nan))
        cache.layers[0].values_KSE.copy_(torch.tensor(math.nan))
    queries = [torch.randn(layer.query_heads, new, layer.key_dim, dtype=dtype) for _, new in rows]
    keys = [torch.randn(layer.kv_heads, context, layer.key_dim, dtype=dtype) for context in contexts]
    values = [torch.randn(layer.kv_heads, context, layer.value_dim, dtype=dtype) for context in contexts]
    kept_keys, kept_values = keys, values
    if kv_dtype is not None:
        if exact:
            keys, values = ([each.to(kv_dtype).to(dtype) for each in numbers] for numbers in (keys, values))
        values[-1][:, -1] *= 1e6  # no room for it
        kept_keys, kept_values = ([cut_off(each, kv_dtype) for each in numbers] for numbers in (keys, values))
    slots = []
    for (cached, new), table, key, value in zip(rows, tables, kept_keys, kept_values, strict=True):
        places = [table[p // block_size] * block_size + p % block_size for p in range(cached + new)]
        as_bytes(cache.layers[0].keys_KSD)[:, places[:cached]] = as_bytes(key[:, :cached]).to(device)
        as_bytes(cache.layers[0].values_KSE)[:, places[:cached]] = as_bytes(value[:, :cached]).to(device)
        slots += places[cached:]
    num_tokens = len(slots)

    def packed(parts: list[Tensor]) -> Tensor:
        """[heads, T, width], with padding that would poison everything it is mixed with."""
        heads, _, width = parts[0].shape
        return torch.cat([*parts, torch.full((heads, padding, width), math.nan, dtype=dtype)], 1).to(device)

    inputs = ForwardInputs(
        input_ids_T=torch.zeros(num_tokens + padding, dtype=torch.int64),
        position_ids_T=torch.cat([*(torch.arange(cached, cached + new) for cached, new in rows), torch.zeros(padding)]),
        slots_T=torch.tensor(slots, device=device),
        num_decode_rows=sum(new == 1 and cached > 0 for cached, new in rows),
        query_lens=[new for _, new in rows],
        context_lens=contexts,
        block_tables=[[*table, 0, 0] for table in tables],  # a table may be longer than its context
        logits_indices_L=torch.zeros(1, dtype=torch.int64),
    )
    sinks_H = torch.randn(layer.query_heads) if sinks else None
    backend = backend_class(
        layers=[*others, layer],
        block_size=block_size,
        dtype=dtype,
        device=where,
        kv_dtype=kv_dtype,
    )
    with uninitialised_is_nan() if poisoned else contextlib.nullcontext():
        out_THE = backend.attend(
            backend.prepare(inputs),
            layer,
            cache.layers[0],
            packed(queries).to(query_dtype or dtype),
            packed([key[:, cached:] for (cached, _), key in zip(rows, keys, strict=True)]),
            packed([value[:, cached:] for (cached, _), value in zip(rows, values, strict=True)]),
            scaling=scaling,
            softcap=softcap,
            sinks_H=None if sinks_H is None else sinks_H.to(device),
        ).cpu()
    expected = torch.cat(
        [
            obvious(query.float(), key.float(), value.float(), layer, scaling, softcap, sinks_H)
            for query, key, value in zip(queries, kept_keys, kept_values, strict=True)
        ]
    )
    return out_THE, expected


def check(
    backend_class: type[AttentionBackend],
    layer: LayerSpec,
    rows: list[tuple[int, int]],
    *,
    dtype: torch.dtype = torch.float32,
    query_dtype: torch.dtype | None = None,
    kv_dtype: torch.dtype | None = None,
    **options: Any,
) -> None:
    """Compare a step of `attended`, which has the options, element by element."""
    out_THE, expected = attended(
        backend_class, layer, rows, dtype=dtype, query_dtype=query_dtype, kv_dtype=kv_dtype, **options
    )
    num_tokens = expected.shape[0]
    assert out_THE.dtype == (query_dtype or dtype)
    assert out_THE.shape == (num_tokens + options.get("padding", 0), layer.query_heads, layer.value_dim)
    tolerance = 1e-5 if out_THE.dtype == dtype == torch.float32 else 3e-2
    if kv_dtype is not None:  # the numbers without room are large: measured by them
        out_THE, expected = out_THE / expected.abs().max(), expected / expected.abs().max()
    torch.testing.assert_close(out_THE[:num_tokens].float(), expected, rtol=tolerance, atol=tolerance)
    assert not out_THE[num_tokens:].any()
