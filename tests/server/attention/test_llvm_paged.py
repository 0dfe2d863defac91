"""Decode rows by the kernel, chunks by torch, both in one step, against attention written out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import paged_attention
import pytest
import torch
from kernels_here import needs_kernels
from text_generation_server.attention import llvm_paged
from text_generation_server.attention.interface import LayerSpec, Unsupported
from text_generation_server.attention.llvm_paged import LlvmPaged
from text_generation_server.cpu_kernels import compiler
from text_generation_server.cpu_kernels.decode_attention import DecodeAttention
from text_generation_server.cpu_kernels.prefill_attention import PrefillAttention

BLOCK_SIZE = 16
PLAIN = LayerSpec(query_heads=4, kv_heads=2, key_dim=16, value_dim=16)
WIDE = dataclasses.replace(PLAIN, key_dim=32, value_dim=32)
"""Wide enough for chunks to be computed by a kernel too, in bfloat16."""

check = functools.partial(paged_attention.check, LlvmPaged, block_size=BLOCK_SIZE)

ROWS = [
    pytest.param([(7, 1)], id="one decode row"),
    pytest.param([(15, 1), (16, 1), (3, 1), (60, 1), (1, 1)], id="many decode rows"),
    pytest.param([(700, 1), (30, 1)], id="a long decode row"),
    pytest.param([(0, 9), (0, 1), (0, 40)], id="fresh prompts"),
    pytest.param([(5, 20), (18, 3), (0, 5)], id="continued chunks"),
    pytest.param([(40, 1), (0, 17)], id="a decode row and a prompt"),
    pytest.param([(7, 1), (40, 1), (3, 1), (0, 25), (13, 8)], id="decode rows and chunks"),
]
LAYERS = [
    pytest.param(PLAIN, id="grouped heads"),
    pytest.param(dataclasses.replace(PLAIN, kv_heads=4), id="one kv head per query head"),
    pytest.param(dataclasses.replace(PLAIN, kv_heads=1), id="one kv head for all"),
    pytest.param(dataclasses.replace(PLAIN, key_dim=32), id="values narrower than keys"),
    pytest.param(dataclasses.replace(PLAIN, value_dim=32), id="values wider than keys"),
    pytest.param(dataclasses.replace(PLAIN, window=21), id="sliding window"),
    pytest.param(dataclasses.replace(PLAIN, window=1), id="window of itself"),
    pytest.param(dataclasses.replace(PLAIN, chunk=6), id="chunked"),
    pytest.param(WIDE, id="wide heads"),
    pytest.param(dataclasses.replace(WIDE, window=21), id="wide heads, sliding window"),
    pytest.param(dataclasses.replace(WIDE, chunk=6), id="wide heads, chunked"),
]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module", autouse=True)
def compiled_once() -> Iterator[None]:
    """The kernel of a shape serves all tests: compiling takes longer than they do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llvm_paged, "DecodeAttention", functools.cache(DecodeAttention))
        patch.setattr(llvm_paged, "PrefillAttention", functools.cache(PrefillAttention))
        yield


@needs_kernels
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_equals_attention_written_out(dtype: torch.dtype, layer: LayerSpec, rows: list[tuple[int, int]]) -> None:
    check(layer, rows, dtype=dtype)


@needs_kernels
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("window", [0, 21])
@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_caps_and_sinks_are_honoured(dtype: torch.dtype, window: int, rows: list[tuple[int, int]]) -> None:
    layer = dataclasses.replace(WIDE, window=window)
    check(layer, rows, softcap=1.5, dtype=dtype)
    check(layer, rows, sinks=True, dtype=dtype)
    check(layer, rows, softcap=1.5, sinks=True, dtype=dtype)


@needs_kernels
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_belongs_to_no_row(dtype: torch.dtype, rows: list[tuple[int, int]]) -> None:
    check(PLAIN, rows, padding=3, dtype=dtype)
    check(WIDE, rows, padding=3, dtype=dtype)


@needs_kernels
@pytest.mark.parametrize("layer", LAYERS)
def test_blocks_may_be_of_several_tiles(layer: LayerSpec) -> None:
    paged_attention.check(LlvmPaged, layer, [(7, 1), (40, 1), (16, 1), (0, 25)], block_size=32)


@needs_kernels
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_of_a_model_see_each_what_is_theirs(layer: LayerSpec, rows: list[tuple[int, int]]) -> None:
    others = [dataclasses.replace(PLAIN, window=3), dataclasses.replace(PLAIN, chunk=16), PLAIN]
    check(layer, rows, others=others)


@needs_kernels
def test_short_floats_of_the_other_kind() -> None:
    check(PLAIN, [(7, 1), (40, 1), (0, 25)], dtype=torch.float16)


@needs_kernels
@pytest.mark.parametrize(
    ("layer", "block_size", "reason"),
    [
        pytest.param(
            dataclasses.replace(PLAIN, key_dim=8, value_dim=8),
            16,
            "heads 8 and 8 wide in blocks of 16 tokens are not multiples of 16",
            id="narrow heads",
        ),
        pytest.param(
            dataclasses.replace(PLAIN, value_dim=24),
            16,
            "heads 16 and 24 wide in blocks of 16 tokens are not multiples of 16",
            id="values of an odd width",
        ),
        pytest.param(PLAIN, 4, "heads 16 and 16 wide in blocks of 4 tokens are not multiples of 16", id="small blocks"),
    ],
)
def test_what_is_no_multiple_of_16_is_not_supported(layer: LayerSpec, block_size: int, reason: str) -> None:
    with pytest.raises(Unsupported) as refused:
        LlvmPaged(layers=[PLAIN, layer], block_size=block_size, dtype=torch.float32, device=torch.device("cpu"))
    assert str(refused.value) == reason


def test_it_is_for_processors() -> None:
    with pytest.raises(Unsupported, match=r"^it is for processors, not for cuda$"):
        LlvmPaged(layers=[PLAIN], block_size=BLOCK_SIZE, dtype=torch.float32, device=torch.device("cuda"))


def test_where_no_kernel_can_run_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "reason_unavailable", lambda: "nobody knows the threads")
    with pytest.raises(Unsupported, match=r"^nobody knows the threads$"):
        LlvmPaged(layers=[PLAIN], block_size=BLOCK_SIZE, dtype=torch.float32, device=torch.device("cpu"))


@needs_kernels
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("rows", [[(7, 1)], [(0, 9)], [(7, 1), (0, 9)]], ids=["decode", "prompt", "both"])
def test_queries_of_another_dtype_than_the_cache(
    rows: list[tuple[int, int]], dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    query, cache = dtypes
    check(WIDE, rows, dtype=cache, query_dtype=query)
