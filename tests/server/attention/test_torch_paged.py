"""Paged attention against the obvious one: each sequence alone, all scores written out."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import paged_attention
import pytest
import torch
from text_generation_server.attention import torch_paged
from text_generation_server.attention.interface import LayerSpec
from text_generation_server.attention.torch_paged import TorchPaged
from text_generation_server.engine.inputs import ForwardInputs
from text_generation_server.engine.kv_cache import KVCache
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BLOCK_SIZE = 4
PLAIN = LayerSpec(query_heads=4, kv_heads=2, key_dim=8, value_dim=8)

DECODE_ONE = [(7, 1)]
DECODE_TWO = [(7, 1), (16, 1)]
DECODE_MANY = [(3, 1), (16, 1), (9, 1), (30, 1)]
FRESH = [(0, 9), (0, 1), (0, 16)]
CONTINUED = [(5, 6), (12, 3), (0, 5)]
MIXED = [(7, 1), (20, 1), (3, 1), (0, 9), (13, 8)]
"""Rows of a step: (tokens already cached, new tokens)."""


check = functools.partial(paged_attention.check, TorchPaged, block_size=BLOCK_SIZE)

ROWS = [
    pytest.param(DECODE_ONE, id="one decode row"),
    pytest.param(DECODE_TWO, id="two decode rows"),
    pytest.param(DECODE_MANY, id="many decode rows"),
    pytest.param(FRESH, id="fresh prompts"),
    pytest.param(CONTINUED, id="continued chunks"),
    pytest.param(MIXED, id="decode rows and chunks"),
]
LAYERS = [
    pytest.param(PLAIN, id="grouped heads"),
    pytest.param(dataclasses.replace(PLAIN, kv_heads=4), id="one kv head per query head"),
    pytest.param(dataclasses.replace(PLAIN, kv_heads=1), id="one kv head for all"),
    pytest.param(dataclasses.replace(PLAIN, value_dim=6), id="values narrower than keys"),
    pytest.param(dataclasses.replace(PLAIN, window=5), id="sliding window"),
    pytest.param(dataclasses.replace(PLAIN, window=1), id="window of itself"),
    pytest.param(dataclasses.replace(PLAIN, chunk=6), id="chunked"),
]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("layer", LAYERS)
def test_it_equals_attention_written_out(layer: LayerSpec, rows: list[tuple[int, int]]) -> None:
    check(layer, rows)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("window", [0, 5])
def test_soft_caps_and_sinks_are_honoured(rows: list[tuple[int, int]], window: int) -> None:
    layer = dataclasses.replace(PLAIN, window=window)
    check(layer, rows, softcap=1.5)
    check(layer, rows, sinks=True)
    check(layer, rows, softcap=1.5, sinks=True)


@pytest.mark.parametrize("rows", ROWS)
def test_consecutive_blocks_are_read_in_place(rows: list[tuple[int, int]]) -> None:
    check(PLAIN, rows, consecutive=True)


@pytest.mark.parametrize("rows", ROWS)
def test_padding_belongs_to_no_row(rows: list[tuple[int, int]]) -> None:
    check(PLAIN, rows, padding=3)


@pytest.mark.parametrize("gathered_bytes", [1, 2000])
def test_decode_rows_that_hold_much_are_gathered_in_parts(gathered_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_paged, "GATHERED_BYTES", gathered_bytes)
    check(PLAIN, [*DECODE_MANY, *DECODE_MANY])


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats(dtype: torch.dtype, layer: LayerSpec, rows: list[tuple[int, int]]) -> None:
    check(layer, rows, dtype=dtype)
    check(layer, rows, dtype=dtype, softcap=1.5)


@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("rows", ROWS)
def test_a_cache_of_eight_bits(rows: list[tuple[int, int]], kv_dtype: torch.dtype) -> None:
    check(PLAIN, rows, kv_dtype=kv_dtype)
    check(PLAIN, rows, kv_dtype=kv_dtype, dtype=torch.bfloat16, softcap=1.5, sinks=True)


def test_decode_rows_of_very_unlike_length_are_grouped_apart() -> None:
    check(PLAIN, [(5000 if row == 3 else row + 1, 1) for row in range(6)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_chunk_longer_than_the_query_block(dtype: torch.dtype) -> None:
    check(dataclasses.replace(PLAIN, window=40), [(30, 560)], dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("score_bytes", [1, 100_000])
@pytest.mark.parametrize(
    ("layer", "softcap", "sinks"),
    [
        pytest.param(PLAIN, 1.5, False, id="soft caps"),
        pytest.param(PLAIN, 0.0, True, id="sinks"),
        pytest.param(dataclasses.replace(PLAIN, window=40), 0.0, False, id="a mask"),
        pytest.param(dataclasses.replace(PLAIN, value_dim=6), 0.0, False, id="values narrower than keys"),
        pytest.param(dataclasses.replace(PLAIN, value_dim=12), 0.0, False, id="values wider than keys"),
    ],
)
def test_a_chunk_is_scored_in_blocks_of_bounded_size(
    layer: LayerSpec, softcap: float, sinks: bool, score_bytes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_paged, "SCORE_BYTES", score_bytes)
    monkeypatch.setattr(torch_paged, "MASK_BYTES", 0)
    check(layer, [(70, 90), (0, 130)], softcap=softcap, sinks=sinks, dtype=dtype)


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's own
    """Notes the largest tensor that is made."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.num_bytes = max([self.num_bytes, *(each.nbytes for each in tree_leaves(out) if isinstance(each, Tensor))])
        return out


@pytest.mark.parametrize(
    ("layer", "softcap"), [(PLAIN, 1.5), (dataclasses.replace(PLAIN, value_dim=6), 0.0)], ids=["soft caps", "widths"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_take_no_more_memory_than_planned(
    layer: LayerSpec, softcap: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_paged, "SCORE_BYTES", 2**19)
    monkeypatch.setattr(torch_paged, "MASK_BYTES", 2**19)
    largest = Largest()  # type: ignore[no-untyped-call]
    own = TorchPaged._prefill

    def measured(*args: Any) -> None:
        with largest:
            own(*args)

    monkeypatch.setattr(TorchPaged, "_prefill", measured)
    heads, keys, queries, width = layer.query_heads, 1200, 200, layer.key_dim
    torch.manual_seed(0)
    cpu = torch.device("cpu")
    cache = KVCache([layer], num_blocks=keys // BLOCK_SIZE, block_size=BLOCK_SIZE, dtype=dtype, device=cpu)
    inputs = ForwardInputs(
        input_ids_T=torch.zeros(queries, dtype=torch.int64),
        position_ids_T=torch.arange(keys - queries, keys),
        slots_T=torch.arange(BLOCK_SIZE + keys - queries, BLOCK_SIZE + keys),
        num_decode_rows=0,
        query_lens=[queries],
        context_lens=[keys],
        block_tables=[list(range(1, keys // BLOCK_SIZE + 1))],
        logits_indices_L=torch.zeros(1, dtype=torch.int64),
    )
    backend = TorchPaged(layers=[layer], block_size=BLOCK_SIZE, dtype=dtype, device=cpu)
    backend.attend(
        backend.prepare(inputs),
        layer,
        cache.layers[0],
        torch.randn(heads, queries, width, dtype=dtype),
        torch.randn(layer.kv_heads, queries, width, dtype=dtype),
        torch.randn(layer.kv_heads, queries, layer.value_dim, dtype=dtype),
        scaling=0.3,
        softcap=softcap,
    )
    assert 0 < largest.num_bytes <= 2**19 < heads * queries * keys * dtype.itemsize


def test_an_idle_cache_costs_nothing_and_starts_at_zero() -> None:
    cache = KVCache([PLAIN], num_blocks=1 << 22, block_size=16, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert cache.layers[0].keys_KSD.shape == (2, ((1 << 22) + 1) * 16, 8)
    assert not cache.layers[0].keys_KSD[:, -100:].any()


def test_blocks_are_cleared_of_not_a_number() -> None:
    cache = KVCache([PLAIN], num_blocks=3, block_size=4, dtype=torch.float32, device=torch.device("cpu"))
    for tensor in (cache.layers[0].keys_KSD, cache.layers[0].values_KSE):
        tensor.fill_(math.nan)
    cache.zero_blocks([1, 3])
    for tensor in (cache.layers[0].keys_KSD, cache.layers[0].values_KSE):
        assert tensor.view(2, 4, 4, 8).isnan().all(-1).all(-1).tolist() == [[True, False, True, False]] * 2
