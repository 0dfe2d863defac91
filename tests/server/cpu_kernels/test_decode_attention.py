"""The kernel of decode rows against attention written out in float64, one row and one head after the other."""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from collections.abc import Iterable

import pytest
import torch
from text_generation_server.cpu_kernels import compiler, decode_attention
from text_generation_server.cpu_kernels.decode_attention import SEGMENT, DecodeAttention, Shape, plan_rows, supports
from text_generation_server.cpu_kernels.language import DTYPES
from torch import Tensor

pytestmark = pytest.mark.skipif(
    compiler.reason_unavailable() is not None, reason=f"no kernels here: {compiler.reason_unavailable()}"
)

PLAIN = Shape(
    query_heads=6,
    kv_heads=2,
    key_dim=32,
    value_dim=32,
    block_size=16,
    dtype=torch.float32,
    scaling=0.2,
    softcap=0.0,
    has_sinks=False,
)
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}

SHORT = [1, 2, 15, 16, 17, 33]
MIXED = [3, 700, 16, 1, 160]
LONG = [SEGMENT - 1, SEGMENT, SEGMENT + 1, 2 * SEGMENT, 2 * SEGMENT + 1, 1700, 5]
"""Keys of each row, its own among them."""


@functools.cache
def kernel(shape: Shape) -> DecodeAttention:
    return DecodeAttention(shape)


class Step:
    """Rows in blocks that lie anywhere in the cache. Slots that no row sees are not-a-number, as are those that the
    rows' own keys and values will be written to."""

    def __init__(self, shape: Shape, stops: list[int], firsts: list[int] | None = None) -> None:
        """Row i sees the keys ``firsts[i] .. stops[i]``, by default all; the last one is its own."""
        self.shape, self.stops = shape, stops
        self.firsts = [0] * len(stops) if firsts is None else firsts
        torch.manual_seed(0)
        size, dtype = shape.block_size, shape.dtype
        counts = [-(-stop // size) for stop in stops]
        free = list(range(1, sum(counts) + 1))
        random.Random(0).shuffle(free)
        self.tables = [[free.pop() for _ in range(count)] for count in counts]
        num_slots = (sum(counts) + 1) * size
        self.keys_KSD = torch.full((shape.kv_heads, num_slots, shape.key_dim), math.nan, dtype=dtype)
        self.values_KSE = torch.full((shape.kv_heads, num_slots, shape.value_dim), math.nan, dtype=dtype)
        for row in range(len(stops)):
            seen = self.places(row)[:-1]
            self.keys_KSD[:, seen] = torch.randn(shape.kv_heads, len(seen), shape.key_dim).to(dtype)
            self.values_KSE[:, seen] = torch.randn(shape.kv_heads, len(seen), shape.value_dim).to(dtype)
        self.slots_R = torch.tensor([self.places(row)[-1] for row in range(len(stops))])
        # As they come from one product: side by side for each row.
        heads = torch.randn(len(stops), shape.query_heads + shape.kv_heads, shape.key_dim).to(dtype).transpose(0, 1)
        self.query_HRD, self.key_KRD = heads[: shape.query_heads], heads[shape.query_heads :]
        self.value_KRE = torch.randn(len(stops), shape.kv_heads, shape.value_dim).to(dtype).transpose(0, 1)
        self.sinks_H = torch.randn(shape.query_heads) if shape.has_sinks else None

    def places(self, row: int) -> list[int]:
        """Slots of the keys that the row sees."""
        size, table = self.shape.block_size, self.tables[row]
        return [table[key // size] * size + key % size for key in range(self.firsts[row], self.stops[row])]

    def attend(self, rows: list[int] | None = None) -> Tensor:
        """Of these rows, by default of all: [R, H, E]."""
        rows = list(range(len(self.stops))) if rows is None else rows
        out_RHE = torch.full((len(rows), self.shape.query_heads, self.shape.value_dim), 7.0, dtype=self.shape.dtype)
        kernel(self.shape)(
            plan_rows(
                [self.tables[row] for row in rows],
                [self.firsts[row] for row in rows],
                [self.stops[row] for row in rows],
                self.shape.block_size,
            ),
            self.slots_R[rows],
            self.query_HRD[:, rows],
            self.key_KRD[:, rows],
            self.value_KRE[:, rows],
            self.keys_KSD,
            self.values_KSE,
            out_RHE,
            self.sinks_H,
        )
        return out_RHE

    def obvious(self) -> Tensor:
        """What `attend` is to give, in float64; the rows' own keys are in the cache by then."""
        shape = self.shape
        out_RHE = torch.zeros(len(self.stops), shape.query_heads, shape.value_dim, dtype=torch.float64)
        for row in range(len(self.stops)):
            places = self.places(row)
            for head in range(shape.query_heads):
                own = head // shape.group
                scores = self.keys_KSD[own, places].double() @ self.query_HRD[head, row].double() * shape.scaling
                if shape.softcap:
                    scores = shape.softcap * torch.tanh(scores / shape.softcap)
                if self.sinks_H is not None:
                    scores = torch.cat((scores, self.sinks_H[head, None].double()))
                out_RHE[row, head] = scores.softmax(0)[: len(places)] @ self.values_KSE[own, places].double()
        return out_RHE

    def check(self, tolerance: float | None = None) -> None:
        out_RHE = self.attend()
        tolerance = tolerance or TOLERANCES[self.shape.dtype]
        torch.testing.assert_close(out_RHE.double(), self.obvious(), rtol=tolerance, atol=tolerance / 4)


def changed(**changes: object) -> Shape:
    return dataclasses.replace(PLAIN, **changes)  # type: ignore[arg-type]


SHAPES = [
    pytest.param(PLAIN, id="plain"),
    *(pytest.param(changed(query_heads=2 * group), id=f"groups of {group}") for group in (1, 4, 8, 14)),
    pytest.param(changed(query_heads=14, key_dim=128, value_dim=128), id="a wide group in parts"),
    pytest.param(changed(query_heads=5, kv_heads=1), id="one head of keys"),
    pytest.param(changed(key_dim=16, value_dim=48), id="values wider than keys"),
    pytest.param(changed(key_dim=192, value_dim=128), id="values narrower than keys"),
    pytest.param(changed(block_size=32), id="blocks of 32"),
    pytest.param(changed(softcap=2.0), id="soft caps"),
    pytest.param(changed(has_sinks=True), id="sinks"),
    pytest.param(changed(softcap=2.0, has_sinks=True, block_size=32, query_heads=8, value_dim=64), id="all at once"),
]
LENGTHS = [pytest.param(SHORT, id="short"), pytest.param(MIXED, id="mixed"), pytest.param(LONG, id="long")]
WINDOWS = [
    pytest.param([600, 7, 17, 31], [700, 18, 18, 32], id="in the middle of a tile"),
    pytest.param([512, 16, 528], [700, 40, 545], id="where a tile begins"),
    pytest.param([699, 15, 16], [700, 16, 17], id="at the row itself"),
    pytest.param([500, 511, 40, 1000], [520, 514, 513, 2000], id="before the end of a segment"),
]


# -- against attention written out -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stops", LENGTHS)
def test_it_equals_attention_written_out(stops: list[int], shape: Shape) -> None:
    Step(shape, stops).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stops", LENGTHS)
def test_each_dtype(stops: list[int], dtype: torch.dtype) -> None:
    Step(changed(dtype=dtype), stops).check()
    Step(changed(dtype=dtype, softcap=2.0, has_sinks=True), stops).check()


@pytest.mark.parametrize(("firsts", "stops"), WINDOWS)
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("has_sinks", [False, True], ids=["no sinks", "sinks"])
def test_a_window_begins_anywhere(firsts: list[int], stops: list[int], block_size: int, has_sinks: bool) -> None:
    Step(changed(block_size=block_size, has_sinks=has_sinks), stops, firsts).check()


@pytest.mark.parametrize("scaling", [3.0, 30.0, -30.0])
def test_scores_may_be_far_apart(scaling: float) -> None:
    tolerance = 1e-3  # what rounding does to scores of hundreds is seen in their exponentials
    Step(changed(scaling=scaling), MIXED).check(tolerance)
    Step(changed(scaling=scaling, softcap=30.0), MIXED).check(tolerance)


@pytest.mark.parametrize("sink", [-math.inf, -1000.0, 1000.0])
@pytest.mark.parametrize("stops", LENGTHS)
def test_a_sink_may_be_far_from_all_scores(stops: list[int], sink: float) -> None:
    step = Step(changed(has_sinks=True), stops)
    assert step.sinks_H is not None
    step.sinks_H[::2] = sink
    step.check()


@pytest.mark.parametrize("stops", LENGTHS)
def test_steps_follow_one_another_in_the_same_memory(stops: list[int]) -> None:
    """What is kept between calls is ready for the next one."""
    step = Step(PLAIN, stops)
    first = step.attend()
    Step(PLAIN, [1500, 1500]).check()
    assert torch.equal(step.attend(), first)


# -- the cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stops", LENGTHS)
def test_the_rows_own_keys_and_values_are_written_and_nothing_else(stops: list[int], dtype: torch.dtype) -> None:
    step = Step(changed(dtype=dtype, key_dim=48), stops)
    expected = [cached.clone() for cached in (step.keys_KSD, step.values_KSE)]
    expected[0][:, step.slots_R] = step.key_KRD
    expected[1][:, step.slots_R] = step.value_KRE
    step.attend()
    for cached, wanted in zip((step.keys_KSD, step.values_KSE), expected, strict=True):
        torch.testing.assert_close(cached, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("firsts", "stops"), [*WINDOWS, pytest.param([0] * len(MIXED), MIXED, id="no window")])
def test_what_a_row_does_not_see_does_not_matter(
    firsts: list[int], stops: list[int], poison: float, shape: Shape
) -> None:
    step = Step(shape, stops, firsts)
    unseen = torch.ones(step.keys_KSD.shape[1], dtype=torch.bool)
    unseen[[place for row in range(len(stops)) for place in step.places(row)]] = False
    results = []
    for filling in (0.0, poison):
        step.keys_KSD[:, unseen] = step.values_KSE[:, unseen] = filling
        results.append(step.attend())
    assert results[0].isfinite().all()
    assert torch.equal(*results)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_number_of_registers_changes_no_result(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for count in (1, 4, 16):
        monkeypatch.setattr(decode_attention, "sums_at_once", lambda count=count: count)
        kernel.cache_clear()
        results.append(Step(shape, MIXED).attend())
    kernel.cache_clear()
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# -- rows are independent --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stops", LENGTHS)
def test_a_row_has_the_same_result_alone_and_among_others(stops: list[int], dtype: torch.dtype) -> None:
    step = Step(changed(dtype=dtype, has_sinks=True), stops)
    together = step.attend()
    for row in range(len(stops)):
        assert torch.equal(step.attend([row])[0], together[row])
    backwards = list(range(len(stops)))[::-1]
    assert torch.equal(step.attend(backwards), together[backwards])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stops", LENGTHS)
def test_results_do_not_depend_on_the_number_of_threads(stops: list[int], dtype: torch.dtype, num_threads: int) -> None:
    step = Step(changed(dtype=dtype), stops)
    torch.set_num_threads(1)
    expected = step.attend()
    torch.set_num_threads(num_threads)
    for _ in range(5):
        assert torch.equal(step.attend(), expected)


@pytest.mark.parametrize(
    "shape", [PLAIN, changed(softcap=2.0), changed(has_sinks=True)], ids=["plain", "caps", "sinks"]
)
@pytest.mark.parametrize(
    ("poisoned", "rows"),
    [
        *((own, range(len(MIXED))) for own in ("query_HRD", "key_KRD", "value_KRE")),
        *((cached, [row for row, stop in enumerate(MIXED) if stop > 1]) for cached in ("keys_KSD", "values_KSE")),
    ],
)
def test_not_a_number_stays_in_its_row(poisoned: str, rows: Iterable[int], shape: Shape) -> None:
    for row in rows:
        check_poisoned(Step(shape, MIXED), row, poisoned)


def check_poisoned(step: Step, row: int, poisoned: str) -> None:
    """``poisoned`` names what holds it, at the row itself or at the first key that it has in the cache."""
    expected = step.attend()
    is_cached = poisoned in ("keys_KSD", "values_KSE")
    getattr(step, poisoned)[:, step.places(row)[0] if is_cached else row] = math.nan
    out_RHE = step.attend()
    assert out_RHE[row].isnan().all()
    others = [other for other in range(len(MIXED)) if other != row]
    assert torch.equal(out_RHE[others], expected[others])


# -- the plan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "stop", "parts"),
    [
        pytest.param(0, 1, [(0, 1)], id="one key"),
        pytest.param(0, 512, [(0, 512)], id="a whole segment"),
        pytest.param(0, 513, [(0, 512), (512, 513)], id="one key more"),
        pytest.param(500, 1100, [(500, 512), (512, 1024), (1024, 1100)], id="from within a segment"),
        pytest.param(512, 1024, [(512, 1024)], id="the second segment"),
        pytest.param(511, 512, [(511, 512)], id="the last key of a segment"),
    ],
)
def test_rows_are_cut_at_multiples_of_the_segment(
    first: int, stop: int, parts: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_attention, "SEGMENT", 512)
    rows = plan_rows([[1] * 100] * 2, [0, first], [1, stop], 16)
    expected = [[1, *part, index, len(parts)] for index, part in enumerate(parts)]
    assert rows.parts_U5.tolist() == [[0, 0, 1, 0, 1], *expected]


@pytest.mark.parametrize(("longest", "width"), [(33, 32), (512, 32), (513, 64)])
def test_tables_keep_their_width_while_rows_grow(longest: int, width: int) -> None:
    tables = [[5, 6, 7, 8], [9], [2, 3, 0]]
    rows = plan_rows(tables, [0, 0, 0], [17, 16, longest], 16)
    assert rows.tables_RB.tolist() == [table + [0] * (width - len(table)) for table in tables]


@pytest.mark.parametrize(
    ("key_dim", "value_dim", "block_size", "dtype", "supported"),
    [
        (64, 64, 16, torch.bfloat16, True),
        (192, 128, 32, torch.float32, True),
        (16, 16, 48, torch.float16, True),
        (8, 16, 16, torch.float32, False),
        (16, 8, 16, torch.float32, False),
        (16, 16, 4, torch.float32, False),
        (16, 16, 16, torch.float64, False),
    ],
)
def test_widths_and_blocks_are_multiples_of_16(
    key_dim: int, value_dim: int, block_size: int, dtype: torch.dtype, supported: bool
) -> None:
    assert supports(key_dim, value_dim, block_size, dtype) is supported
