"""Chunks of prompts over a paged cache, against attention written out in float64."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import soft_tiles
import torch
from hypothesis import given
from hypothesis import strategies as st
from text_generation_server.attention.torch_paged import first_seen
from text_generation_server.cpu_kernels import compiler, prefill_attention, tiles
from text_generation_server.cpu_kernels.decode_attention import Shape
from text_generation_server.cpu_kernels.language import Code
from text_generation_server.cpu_kernels.prefill_attention import SEGMENT, PrefillAttention, Registers
from text_generation_server.cpu_kernels.tiles import Tiles
from text_generation_server.cpu_kernels.vector_tiles import VectorTiles
from torch import Tensor

pytestmark = pytest.mark.skipif(
    compiler.reason_unavailable() is not None, reason=f"no kernels here: {compiler.reason_unavailable()}"
)
MakeRegisters = Callable[[Code], Registers]


def tiles_in_software(code: Code) -> Tiles:
    return Tiles(code)


PLAIN = Shape(
    query_heads=4, kv_heads=2, key_dim=32, value_dim=32, block_size=16, dtype=torch.bfloat16, scaling=0.2, softcap=0.0,
    has_sinks=False,
)  # fmt: skip


@dataclass(slots=True)
class Case:
    """A step of prompt chunks, everything of it random."""

    chunks: prefill_attention.Chunks
    queries_HTD: Tensor
    keys_KSD: Tensor
    values_KSE: Tensor
    sinks_H: Tensor | None
    slots: list[list[int]]
    """Of each chunk's whole context."""
    rows: list[tuple[int, int]]


@pytest.fixture(
    params=[
        pytest.param(
            Tiles,
            id="tiles",
            marks=pytest.mark.skipif(not tiles.are_available(), reason="the processor has no tiles (AMX)"),
        ),
        pytest.param(tiles_in_software, id="tiles in software"),
        pytest.param(VectorTiles, id="vectors"),
    ]
)
def registers(request: pytest.FixtureRequest) -> MakeRegisters:
    """What a processor may compute products in."""
    kind: MakeRegisters = request.param
    return kind


@functools.cache
def compiled(registers: MakeRegisters, shape: Shape, window: int, chunk: int) -> PrefillAttention:
    with soft_tiles.emulated() if registers is tiles_in_software else contextlib.nullcontext():
        return PrefillAttention(shape, window=window, chunk=chunk, registers=registers)


def made(shape: Shape, rows: list[tuple[int, int]], common: int = 0) -> Case:
    """``rows``: tokens in the cache before the chunk, and those of the chunk; the first ``common`` are the same of all.
    All other slots hold not-a-number."""
    generator = torch.Generator().manual_seed(0)
    size = shape.block_size
    counts = [-(-(cached + new) // size) for cached, new in rows]
    order = (torch.randperm(sum(counts), generator=generator) + 1).tolist()
    tables = [[order.pop() for _ in range(count)] for count in counts]
    for table in tables[1:]:
        table[: common // size] = tables[0][: common // size]
    slots = [
        [table[place // size] * size + place % size for place in range(cached + new)]
        for table, (cached, new) in zip(tables, rows, strict=True)
    ]
    num_tokens, num_slots = sum(new for _, new in rows), (sum(counts) + 1) * size
    heads = shape.query_heads + 3  # as a projection leaves them: between others
    packed = torch.randn(num_tokens, heads, shape.key_dim, generator=generator).to(shape.dtype)
    caches = []
    for width in (shape.key_dim, shape.value_dim):
        cache = torch.full((shape.kv_heads, num_slots, width), math.nan, dtype=shape.dtype)
        for places in slots:
            numbers = torch.randn(shape.kv_heads, len(places), width, generator=generator)
            cache[:, places] = numbers.to(shape.dtype)
        caches.append(cache)
    contexts = [cached + new for cached, new in rows]
    chunks = prefill_attention.plan_chunks(tables, [new for _, new in rows], contexts, size, shape.group)
    sinks = torch.randn(shape.query_heads, generator=generator) if shape.has_sinks else None
    queries = packed[:, 1 : 1 + shape.query_heads].transpose(0, 1)
    return Case(chunks, queries, caches[0], caches[1], sinks, slots, rows)


def attended(registers: MakeRegisters, shape: Shape, case: Case, window: int = 0, chunk: int = 0) -> Tensor:
    out = torch.full((case.queries_HTD.shape[1], shape.query_heads, shape.value_dim), 7.0, dtype=shape.dtype)
    kernel = compiled(registers, shape, window, chunk)
    kernel(case.chunks, case.queries_HTD, case.keys_KSD, case.values_KSE, out, case.sinks_H)
    return out


def obvious(shape: Shape, case: Case, window: int = 0, chunk: int = 0) -> Tensor:
    outputs, token = [], 0
    for places, (cached, new) in zip(case.slots, case.rows, strict=True):
        keys = case.keys_KSD[:, places].double().repeat_interleave(shape.group, 0)
        values = case.values_KSE[:, places].double().repeat_interleave(shape.group, 0)
        for position in range(cached, cached + new):
            seen = slice(first_seen(position, window, chunk), position + 1)
            scores = (keys[:, seen] @ case.queries_HTD[:, token, :, None].double())[..., 0] * shape.scaling
            if shape.softcap:
                scores = shape.softcap * torch.tanh(scores / shape.softcap)
            if case.sinks_H is not None:
                scores = torch.cat((scores, case.sinks_H.double()[:, None]), -1)
            weights = scores.softmax(-1)[:, : position + 1 - seen.start]
            outputs.append((weights[:, None] @ values[:, seen])[:, 0])
            token += 1
    return torch.stack(outputs)


def check(registers: MakeRegisters, shape: Shape, rows: list[tuple[int, int]], window: int = 0, chunk: int = 0) -> None:
    case = made(shape, rows)
    ours, expected = attended(registers, shape, case, window, chunk).double(), obvious(shape, case, window, chunk)
    errors = (ours - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert errors.max() < 0.02, "weights and results are rounded to bfloat16"


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([(0, 1)], id="one token"),
        pytest.param([(0, 16)], id="one part"),
        pytest.param([(0, 17)], id="a part of one query"),
        pytest.param([(0, 40), (0, 3), (0, 16)], id="several prompts"),
        pytest.param([(5, 20), (18, 3), (32, 32), (0, 5)], id="continued chunks"),
        pytest.param([(SEGMENT - 3, 7)], id="over the edge of a segment"),
        pytest.param([(3 * SEGMENT + 5, 30), (0, 2 * SEGMENT)], id="many segments"),
    ],
)
@pytest.mark.parametrize("block_size", [16, 32])
def test_chunks(registers: MakeRegisters, rows: list[tuple[int, int]], block_size: int) -> None:
    check(registers, replace(PLAIN, block_size=block_size), rows)


def test_vectors_of_pairs() -> None:
    """What a processor without tiles does that multiplies pairs (AVX512-BF16), by whatever instructions there are."""
    pairs = functools.partial(VectorTiles, dtype=torch.bfloat16)
    check(pairs, PLAIN, [(5, 20), (SEGMENT - 3, 7), (0, 2 * SEGMENT)])


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"query_heads": 3, "kv_heads": 3}, id="a query head each"),
        pytest.param({"query_heads": 9, "kv_heads": 3, "key_dim": 64, "value_dim": 64}, id="three"),
        pytest.param({"query_heads": 14, "kv_heads": 1}, id="fourteen of one"),
        pytest.param({"key_dim": 192, "value_dim": 128}, id="wide heads"),
        pytest.param({"key_dim": 96, "value_dim": 48}, id="narrow values"),
        pytest.param({"softcap": 3.0, "scaling": 1.0}, id="capped"),
        pytest.param({"has_sinks": True}, id="sinks"),
    ],
)
def test_shapes_of_heads(registers: MakeRegisters, changes: dict[str, float]) -> None:
    check(registers, replace(PLAIN, **changes), [(300, 20), (0, 35), (70, 8), (33, 5), (SEGMENT, 4), (9, 1)])  # type: ignore[arg-type]


@pytest.mark.parametrize(("window", "chunk"), [(1, 0), (5, 0), (16, 0), (40, 0), (300, 0), (0, 8), (0, 100), (0, 16)])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_queries_see_their_window_or_their_chunk(
    registers: MakeRegisters, window: int, chunk: int, has_sinks: bool
) -> None:
    check(registers, replace(PLAIN, has_sinks=has_sinks), [(0, 60), (333, 50), (90, 1), (64, 7)], window, chunk)


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("cut", [48, 41, 93, 97])
def test_a_prompt_is_the_same_alone_and_among_others_and_in_one_piece_or_several(
    registers: MakeRegisters, cut: int, window: int
) -> None:
    together = made(PLAIN, [(0, 100), (50, 30)])
    whole = attended(registers, PLAIN, together, window)[:100]
    for first, count in ((0, cut), (cut, 100 - cut)):
        table = together.chunks.tables_RB[:1].tolist()
        chunks = prefill_attention.plan_chunks(table, [count], [first + count], 16, PLAIN.group)
        queries = together.queries_HTD[:, first : first + count]
        piece = replace(together, chunks=chunks, queries_HTD=queries)
        assert torch.equal(attended(registers, PLAIN, piece, window), whole[first : first + count])


ALIKE = [(400, 16), (384, 32), (330, 7), (520, 3), (384, 20), (322, 90), (500, 1), (321, 8)]
"""Behind 320 tokens that all have in common."""


@pytest.mark.parametrize(
    ("changes", "window", "chunk"),
    [
        pytest.param({}, 0, 0, id="as most models"),
        pytest.param({"query_heads": 9, "kv_heads": 3, "key_dim": 64, "value_dim": 64}, 0, 0, id="three"),
        pytest.param({"softcap": 3.0, "scaling": 1.0, "has_sinks": True}, 0, 0, id="capped, with sinks"),
        pytest.param({}, 40, 0, id="a window"),
        pytest.param({}, 0, 100, id="chunks"),
    ],
)
def test_chunks_that_begin_alike_share_units_and_nothing_else(
    registers: MakeRegisters, changes: dict[str, Any], window: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = replace(PLAIN, **changes)
    monkeypatch.setattr(prefill_attention, "UNITS_OF_THREAD", 0)
    together = made(shape, ALIKE, common=320)
    assert (together.chunks.units_U4[:, 1] > 1).any()
    ours, expected = attended(registers, shape, together, window, chunk), obvious(shape, together, window, chunk)
    errors = (ours.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert errors.max() < 0.02
    monkeypatch.setattr(prefill_attention, "UNITS_OF_THREAD", 10**6)
    alone = made(shape, ALIKE, common=320)
    assert (alone.chunks.units_U4[:, 1] == 1).all()
    assert torch.equal(attended(registers, shape, alone, window, chunk), ours)


@given(
    st.lists(
        st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(1, 300), st.integers(0, 15)),
        min_size=1,
        max_size=12,
    ),
    st.sampled_from([1, 2, 3, 4, 12, 40]),
)
def test_a_plan_has_every_query_once_and_shares_what_is_common(
    rows: list[tuple[int, int, int, int]], group: int
) -> None:
    """Each row: blocks of the beginning of all, blocks of its own, tokens of the chunk, tokens before it in a block."""
    tables, counts, contexts = [], [], []
    fresh = iter(range(1000, 10**6))
    for common, own, count, rest in rows:
        contexts.append((common + own) * 16 + rest + count)
        table = [*range(1, common + 1), *(next(fresh) for _ in range(-(-contexts[-1] // 16) - common))]
        tables.append(table)
        counts.append(count)
    chunks = prefill_attention.plan_chunks(tables, counts, contexts, 16, group, kv_heads=10**6)
    pieces = chunks.pieces_P5.tolist()
    most = group * prefill_attention.parts_of_unit(group)
    tokens: list[tuple[int, int]] = []
    used = []
    for first, number, members, shared in chunks.units_U4.tolist():
        mine = pieces[first : first + number]
        used += mine
        edges = [member for *_, member in mine] + [members]
        assert edges[0] == 0 and members <= most
        for (row, token, count, position, member), following in zip(mine, edges[1:], strict=True):
            assert following - member == prefill_attention.num_members(count, group)
            tokens += [(token + offset, position + offset) for offset in range(count)]
            assert shared % SEGMENT == 0 and shared <= position
            assert tables[row][: shared // 16] == tables[mine[0][0]][: shared // 16]
        assert (shared > 0) == (number > 1)
    assert sorted(used) == sorted(pieces)
    expected: list[tuple[int, int]] = []
    for count, context in zip(counts, contexts, strict=True):
        expected += [(len(expected) + offset, context - count + offset) for offset in range(count)]
    assert sorted(tokens) == expected


@pytest.mark.parametrize(("new", "token"), [(40, 20), (8, 3)], ids=["many queries", "few"])
def test_not_a_number_stays_with_its_query(registers: MakeRegisters, new: int, token: int) -> None:
    case = made(PLAIN, [(0, new)])
    clean = attended(registers, PLAIN, case)
    queries = case.queries_HTD.clone()
    queries[1, token, 3] = math.nan
    broken = attended(registers, PLAIN, replace(case, queries_HTD=queries))
    assert broken[token, 1].isnan().all()
    broken[token, 1] = clean[token, 1]
    assert torch.equal(broken, clean)


def test_not_a_number_among_the_keys_reaches_all_who_see_it(registers: MakeRegisters) -> None:
    case = made(PLAIN, [(0, 40)])
    clean = attended(registers, PLAIN, case)
    case.keys_KSD[0, case.slots[0][30]] = math.nan
    broken = attended(registers, PLAIN, case)
    assert broken[30:, :2].isnan().all()
    assert torch.equal(broken[:30], clean[:30])
    assert torch.equal(broken[:, 2:], clean[:, 2:])


@pytest.mark.parametrize(
    ("group", "key_dim", "value_dim", "block_size", "dtype", "is_known"),
    [
        pytest.param(4, 64, 48, 32, torch.bfloat16, True, id="whole tiles"),
        pytest.param(4, 48, 48, 32, torch.bfloat16, False, id="half a tile of keys"),
        pytest.param(4, 64, 40, 32, torch.bfloat16, False, id="half a tile of values"),
        pytest.param(4, 64, 16, 32, torch.bfloat16, False, id="one tile of values"),
        pytest.param(4, 64, 64, 8, torch.bfloat16, False, id="blocks of half a tile"),
        pytest.param(4, 64, 64, 16, torch.float32, False, id="float32"),
        pytest.param(48, 128, 128, 16, torch.bfloat16, True, id="many heads of one"),
        pytest.param(128, 576, 512, 16, torch.bfloat16, False, id="more than a stack holds"),
    ],
)
def test_what_is_known(
    group: int, key_dim: int, value_dim: int, block_size: int, dtype: torch.dtype, is_known: bool
) -> None:
    assert prefill_attention.supports(group, key_dim, value_dim, block_size, dtype) == is_known
