"""The back end of Triton kernels, in Triton's interpreter, against attention written out and against torch's.

The interpreter multiplies bfloat16 matrices wrongly, so that kernels compute from float32 there: rounding as on a GPU
is tested on one, in tests/gpu. Memory that is not written, and slots that no row owns, hold not-a-number in every test.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
from array import array
from typing import Any

import numpy as np
import paged_attention
import pytest
import torch
from paged_attention import uninitialised_is_nan
from text_generation_server.attention.interface import AttentionBackend, LayerCache, LayerSpec, Unsupported
from text_generation_server.attention.torch_paged import TorchPaged
from text_generation_server.engine.batch import Row, Sequence
from text_generation_server.engine.inputs import build_inputs
from text_generation_server.engine.kv_cache import KVCache
from text_generation_server.generation.parameters import SamplingParameters
from torch import Tensor

pytest.importorskip("triton")
from text_generation_server.attention.triton_paged import TritonPaged
from text_generation_server.gpu_kernels import arithmetic, paged_decode, paged_prefill

pytestmark = pytest.mark.skipif(not arithmetic.INTERPRETED, reason="kernels run on a GPU here: pytest -m gpu")

CPU = torch.device("cpu")
BLOCK_SIZE = 16
PLAIN = LayerSpec(query_heads=4, kv_heads=2, key_dim=16, value_dim=16)

check = functools.partial(paged_attention.check, TritonPaged, block_size=BLOCK_SIZE, poisoned=True)

DECODE = [(15, 1), (16, 1), (60, 1), (1, 1), (300, 1)]
MIXED = [(7, 1), (40, 1), (0, 25), (13, 8), (100, 3), (0, 1)]
ROWS = [
    pytest.param(DECODE, id="decode rows"),
    pytest.param(MIXED, id="decode rows and chunks"),
]
LAYERS = [
    pytest.param(PLAIN, id="grouped heads"),
    pytest.param(dataclasses.replace(PLAIN, query_heads=3, kv_heads=1), id="three query heads for one"),
    pytest.param(dataclasses.replace(PLAIN, query_heads=16), id="eight query heads for one"),
    pytest.param(dataclasses.replace(PLAIN, kv_heads=4), id="one kv head per query head"),
    pytest.param(dataclasses.replace(PLAIN, key_dim=24, value_dim=8), id="widths that are no power of two"),
    pytest.param(dataclasses.replace(PLAIN, window=21), id="sliding window"),
    pytest.param(dataclasses.replace(PLAIN, window=1), id="window of itself"),
    pytest.param(dataclasses.replace(PLAIN, chunk=6), id="chunked"),
    pytest.param(dataclasses.replace(PLAIN, chunk=40), id="chunks longer than a tile"),
]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("layer", LAYERS)
def test_it_equals_attention_written_out(layer: LayerSpec, rows: list[tuple[int, int]]) -> None:
    check(layer, rows)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("window", [0, 21])
def test_soft_caps_and_sinks_are_honoured(window: int, rows: list[tuple[int, int]]) -> None:
    layer = dataclasses.replace(PLAIN, window=window)
    check(layer, rows, softcap=1.5)
    check(layer, rows, softcap=1.5, sinks=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", ROWS)
def test_short_floats(dtype: torch.dtype, rows: list[tuple[int, int]]) -> None:
    check(PLAIN, rows, dtype=dtype)
    check(PLAIN, rows, dtype=dtype, query_dtype=torch.float32, sinks=True)


@pytest.mark.parametrize("rows", ROWS)
def test_padding_belongs_to_no_row(rows: list[tuple[int, int]]) -> None:
    check(PLAIN, rows, padding=3)


@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("rows", ROWS)
def test_a_cache_of_eight_bits(rows: list[tuple[int, int]], kv_dtype: torch.dtype) -> None:
    """Without rounding: where that carries into the exponent, Triton's interpreter loses the carry."""
    check(PLAIN, rows, kv_dtype=kv_dtype, exact=True)
    check(PLAIN, rows, kv_dtype=kv_dtype, exact=True, dtype=torch.bfloat16, softcap=1.5, sinks=True)


def test_groups_of_more_heads_than_a_product_has_rows() -> None:
    check(LayerSpec(query_heads=70, kv_heads=1, key_dim=16, value_dim=16), [(20, 1), (0, 5)])


def test_layers_of_several_windows_and_groups_share_a_plan() -> None:
    others = [dataclasses.replace(PLAIN, window=21), dataclasses.replace(PLAIN, kv_heads=1), PLAIN]
    for index, layer in enumerate(others):
        check(layer, MIXED, others=others[:index] + others[index + 1 :])


WIDE = [
    pytest.param(query_heads, kv_heads, width, window, chunk, id=f"{query_heads}:{kv_heads}x{width} {window} {chunk}")
    for (query_heads, kv_heads), width, (window, chunk) in itertools.product(
        [(1, 1), (3, 1), (4, 1), (8, 1)], [64, 80, 96, 128, 256], [(0, 0), (70, 0), (0, 100)]
    )
]


@pytest.mark.slow
@pytest.mark.parametrize(("query_heads", "kv_heads", "width", "window", "chunk"), WIDE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_shapes_of_real_models(
    dtype: torch.dtype, query_heads: int, kv_heads: int, width: int, window: int, chunk: int
) -> None:
    layer = LayerSpec(
        query_heads=query_heads, kv_heads=kv_heads, key_dim=width, value_dim=width, window=window, chunk=chunk
    )
    rng = random.Random(width + query_heads)
    rows = [(rng.randint(1, 400), 1) for _ in range(3)] + [(rng.randint(0, 200), rng.randint(2, 90)) for _ in range(2)]
    for softcap, sinks in ((0.0, False), (3.0, True)):
        check(layer, rows, dtype=dtype, softcap=softcap, sinks=sinks, scaling=width**-0.5, seed=width)


# -- against torch's back end, on the same cache -----------------------------------------------------------------


def sequence(length: int, table: list[int]) -> Sequence:
    return Sequence(
        sequence_id=table[0], token_ids=array("q", [1] * (length + 1)), num_prompt_tokens=length + 1,
        num_given=length + 1, block_table=table, num_computed=0, num_cached=0, num_verified=0,
        sampling=SamplingParameters(), top_n_tokens=0, prefill_logprobs=False,
    )  # fmt: skip


class Step:
    """Random tokens of sequences that all live in one cache, and attention over any rows of them."""

    def __init__(self, layer: LayerSpec, lengths: list[int], dtype: torch.dtype = torch.float32) -> None:
        self.layer, self.dtype = layer, dtype
        counts = [-(-length // BLOCK_SIZE) for length in lengths]
        blocks = list(range(1, sum(counts) + 1))
        random.Random(0).shuffle(blocks)
        self.sequences = [
            sequence(length, [blocks.pop() for _ in range(count)])
            for length, count in zip(lengths, counts, strict=True)
        ]
        torch.manual_seed(0)
        self.cache = KVCache([layer], num_blocks=sum(counts), block_size=BLOCK_SIZE, dtype=dtype, device=CPU)
        for cached in (self.cache.layers[0].keys_KSD, self.cache.layers[0].values_KSE):
            cached.normal_()
        heads = (layer.query_heads, layer.kv_heads, layer.kv_heads)
        widths = (layer.key_dim, layer.key_dim, layer.value_dim)
        self.tokens = [
            [torch.randn(head, length, width, dtype=dtype) for head, width in zip(heads, widths, strict=True)]
            for length in lengths
        ]

    def attend(self, backend: AttentionBackend, rows: list[tuple[int, int, int]]) -> list[Tensor]:
        """``rows``: (sequence, first token, number of tokens), those of one token first; each row's [N, H, E]."""
        made = [Row(self.sequences[index], start, count, is_decode=count == 1) for index, start, count in rows]
        inputs = build_inputs(made, block_size=BLOCK_SIZE, device=CPU, pads=True)[0]
        query, key, value = (
            torch.cat([self.tokens[index][part][:, start : start + count] for index, start, count in rows], 1)
            for part in range(3)
        )
        first = self.cache.layers[0]
        cache = LayerCache(first.keys_KSD.clone(), first.values_KSE.clone())
        with uninitialised_is_nan():
            out = backend.attend(backend.prepare(inputs), self.layer, cache, query, key, value, scaling=0.2)
        return list(torch.split(out, [count for _, _, count in rows]))

    def backend(self) -> TritonPaged:
        return TritonPaged(layers=[self.layer], block_size=BLOCK_SIZE, dtype=self.dtype, device=CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_it_is_as_near_as_roundings_allow_to_the_reference(dtype: torch.dtype) -> None:
    layer = LayerSpec(query_heads=6, kv_heads=2, key_dim=80, value_dim=80)
    step = Step(layer, [290, 33, 70], dtype)
    rows = [(0, 289, 1), (1, 32, 1), (2, 30, 40)]
    torch_backend = TorchPaged(layers=[layer], block_size=BLOCK_SIZE, dtype=dtype, device=CPU)
    for ours, reference in zip(step.attend(step.backend(), rows), step.attend(torch_backend, rows), strict=True):
        error = (ours.float() - reference.float()).norm() / reference.float().norm()
        assert error <= (1e-6 if dtype == torch.float32 else 2e-3)


LAST = [(0, 289, 1), (1, 32, 1), (2, 69, 1)]


def test_a_decode_row_does_not_depend_on_its_batch_mates() -> None:
    step = Step(PLAIN, [290, 33, 70])
    together = step.attend(step.backend(), LAST)
    for row, expected in zip(LAST, together, strict=True):
        assert torch.equal(step.attend(step.backend(), [row])[0], expected)


def test_a_decode_row_does_not_depend_on_how_many_programs_share_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_decode, "SEGMENT", 64)
    step = Step(PLAIN, [290])
    results = []
    for programs in (1, 2, 4, 100):
        backend = step.backend()
        backend._programs = programs
        results.append(step.attend(backend, LAST[:1])[0])
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.fixture
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter multiplies by numpy, whose sums depend on where in a matrix a row lies; a GPU's do not."""
    matmul = np.matmul

    def by_float64(left: Any, right: Any, dtype: Any) -> Any:
        return matmul(left.astype(np.float64), right.astype(np.float64)).astype(dtype)

    monkeypatch.setattr(np, "matmul", by_float64)


def test_many_parts_are_merged_in_several_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_decode, "SEGMENT", 64)
    monkeypatch.setattr(paged_decode, "MERGED_AT_ONCE", 2)
    check(PLAIN, [(500, 1), (64, 1), (63, 1)], sinks=True)
    check(dataclasses.replace(PLAIN, window=150), [(500, 1), (64, 1), (63, 1)])


def test_a_prompt_does_not_depend_on_how_it_is_cut_or_on_its_batch_mates(exact_products: None) -> None:
    step = Step(PLAIN, [90, 40])
    backend = step.backend()
    whole = step.attend(backend, [(0, 0, 90)])[0]
    # The cache holds what the first tokens' keys and values are once they have been written.
    first = step.cache.layers[0]
    slots = [step.sequences[0].block_table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(90)]
    first.keys_KSD[:, slots], first.values_KSE[:, slots] = step.tokens[0][1], step.tokens[0][2]
    for cut in (17, 64, 77):
        parts = step.attend(backend, [(0, cut, 90 - cut), (1, 0, 40)])[0]
        assert torch.equal(parts, whole[cut:])


def test_units_cover_every_query_once() -> None:
    lengths = [1, 70, 16, 17]
    made = paged_prefill.units(lengths, 3, torch.bfloat16)
    rows = [(chunk, row) for chunk, first in made.tolist() for row in range(first, first + 64)]
    wanted = {(chunk, row) for chunk, length in enumerate(lengths) for row in range(length * 3)}
    assert len(set(rows)) == len(rows)
    assert wanted <= set(rows)


@pytest.mark.parametrize(
    ("first", "stop", "parts"),
    [
        pytest.param(0, 1, 1, id="one key"),
        pytest.param(0, 256, 1, id="a part filled"),
        pytest.param(0, 257, 2, id="one key more"),
        pytest.param(255, 257, 2, id="a window across the edge"),
        pytest.param(256, 257, 1, id="a window behind the edge"),
    ],
)
def test_parts_begin_at_multiples_of_their_size(first: int, stop: int, parts: int) -> None:
    assert paged_decode.num_parts(first, stop) == parts


# -- what is refused ---------------------------------------------------------------------------------------------


def test_a_processor_is_refused_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "INTERPRETED", False)
    with pytest.raises(Unsupported, match=r"^Triton has no back end for cpu$"):
        TritonPaged(layers=[PLAIN], block_size=BLOCK_SIZE, dtype=torch.float32, device=CPU)


def test_number_formats_and_widths_without_a_kernel_are_refused() -> None:
    with pytest.raises(Unsupported, match=r"^it does not compute in torch\.float64$"):
        TritonPaged(layers=[PLAIN], block_size=BLOCK_SIZE, dtype=torch.float64, device=CPU)
    with pytest.raises(Unsupported, match=r"^its heads are 512 wide, more than 256$"):
        wide = dataclasses.replace(PLAIN, value_dim=512)
        TritonPaged(layers=[PLAIN, wide], block_size=BLOCK_SIZE, dtype=torch.float32, device=CPU)
