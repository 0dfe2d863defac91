"""Attention of decode rows, straight from the paged cache: no page is copied, no row is padded.

A unit of work is the part of a row's keys that lies between two multiples of ``SEGMENT``, for one key/value head and
its query group. Where the parts begin depends on positions alone, and whoever finishes the last part of a row puts the
parts together in their order: so a row's result does not depend on its batch mates or on the number of threads.

Shape legend: R decode rows, H query heads, K key/value heads, G query heads per K, D key width, E value width, S cache
slots, U parts of all rows.
Source of the split and its merge: Flash-Decoding, Dao et al. 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from text_generation_server.cpu_kernels import paging
from text_generation_server.cpu_kernels.compiler import Kernel, new_code, processor_has
from text_generation_server.cpu_kernels.language import DTYPES, LANES, Code, Pointer, Value

SEGMENT = 512
"""Keys of a unit at most: their scores and what they read stay in the nearest caches."""
AHEAD = 2
"""Tiles of keys that are asked for before they are needed. Measured for 32 rows of 160 tokens, 30 layers, in memory
that is in no cache: 10.2 ms with 1, 8.6 with 2, 9.2 with 4; 8.3 when the values are asked for as well."""
MAX_TOGETHER = 4
"""Queries that a key is read for at once. Measured with AVX2, one core, 64 numbers a key: 7 queries take 38 ns a key as
4 and 3, 55 one by one or all at once."""

TABLE_TOKENS = 512
"""Tables are made for a multiple of so many: then their width seldom changes from one step to the next."""
PART_FIELDS = 5
"""Of a part: row, first key, key behind the last, its index in the row, parts of the row."""
_HIDDEN = -1e30


@dataclass(frozen=True, slots=True)
class Shape:
    """What a kernel is compiled for."""

    query_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    block_size: int
    dtype: torch.dtype
    scaling: float
    softcap: float
    has_sinks: bool

    @property
    def group(self) -> int:
        return self.query_heads // self.kv_heads


def supports(key_dim: int, value_dim: int, block_size: int, dtype: torch.dtype) -> bool:
    return key_dim % LANES == 0 and value_dim % LANES == 0 and block_size % LANES == 0 and dtype in DTYPES


@dataclass(slots=True)
class Rows:
    """What the layers of one window read for the decode rows of a step."""

    parts_U5: Tensor
    """int64, see ``PART_FIELDS``."""
    tables_RB: Tensor
    """See ``paging.padded_tables``."""


def sums_at_once() -> int:
    """Vectors of results that stay in registers: half of them, as inputs need some and a vector may be several."""
    return 16 if processor_has("avx512f") else 4


def plan_rows(block_tables: Sequence[list[int]], firsts: Sequence[int], stops: Sequence[int], block_size: int) -> Rows:
    """Cut the keys ``first .. stop`` of each row into parts."""
    parts: list[tuple[int, ...]] = []
    for row, (first, stop) in enumerate(zip(firsts, stops, strict=True)):
        edges = [first, *range((first // SEGMENT + 1) * SEGMENT, stop, SEGMENT), stop]
        count = len(edges) - 1
        parts += [(row, edges[index], edges[index + 1], index, count) for index in range(count)]
    longest = -(-max(stops) // TABLE_TOKENS) * TABLE_TOKENS
    return Rows(torch.tensor(parts), paging.padded_tables(block_tables, longest, block_size))


class DecodeAttention:
    """The kernel of one shape, and the memory it needs besides its inputs."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.kernel = _compiled(shape)
        self._partial = torch.empty(0)
        self._done = torch.zeros(0, dtype=torch.int64)

    def __call__(
        self,
        rows: Rows,
        slots_R: Tensor,
        query_HRD: Tensor,
        key_KRD: Tensor,
        value_KRE: Tensor,
        keys_KSD: Tensor,
        values_KSE: Tensor,
        out_RHE: Tensor,
        sinks_H: Tensor | None,
    ) -> None:
        """Write the rows' own keys and values to their slots, then attend; fills ``out_RHE``, which is contiguous.

        The last dimension of the others is contiguous; ``sinks_H`` is float32.
        """
        arguments = self.arguments(rows, slots_R, query_HRD, key_KRD, value_KRE, keys_KSD, values_KSE, out_RHE, sinks_H)
        self.kernel(*arguments, units=len(rows.parts_U5) * self.shape.kv_heads)

    def arguments(
        self,
        rows: Rows,
        slots_R: Tensor,
        query_HRD: Tensor,
        key_KRD: Tensor,
        value_KRE: Tensor,
        keys_KSD: Tensor,
        values_KSE: Tensor,
        out_RHE: Tensor,
        sinks_H: Tensor | None,
    ) -> tuple[int, ...]:
        """The kernel's, for the next run of it."""
        num_parts, num_rows = len(rows.parts_U5), len(rows.tables_RB)
        if num_parts > num_rows:
            self._reserve(num_parts, num_rows)
        return (
            num_parts,
            rows.parts_U5.data_ptr(),
            rows.tables_RB.data_ptr(),
            rows.tables_RB.shape[1],
            slots_R.data_ptr(),
            query_HRD.data_ptr(),
            query_HRD.stride(0),
            query_HRD.stride(1),
            key_KRD.data_ptr(),
            key_KRD.stride(0),
            key_KRD.stride(1),
            value_KRE.data_ptr(),
            value_KRE.stride(0),
            value_KRE.stride(1),
            keys_KSD.data_ptr(),
            values_KSE.data_ptr(),
            keys_KSD.shape[1],
            out_RHE.data_ptr(),
            0 if sinks_H is None else sinks_H.data_ptr(),
            *self.memory,
        )

    @property
    def memory(self) -> tuple[int, int]:
        """Addresses of what it has reserved: among the arguments, and not for ever."""
        return self._partial.data_ptr(), self._done.data_ptr()

    def _reserve(self, num_parts: int, num_rows: int) -> None:
        partial = num_parts * self.shape.query_heads * (self.shape.value_dim + 2)
        if self._partial.numel() < partial:
            self._partial = torch.empty(partial)
        if self._done.numel() < num_rows * self.shape.kv_heads:
            self._done = torch.zeros(num_rows * self.shape.kv_heads, dtype=torch.int64)


NUM_ARGUMENTS = 21


def _compiled(shape: Shape) -> Kernel:
    code = new_code("decode_attention")
    num_parts, width = code.arguments[1], code.arguments[4]
    parts, tables, slots = (code.tensor(argument, torch.int64) for argument in (2, 3, 5))
    with code.units(num_parts * shape.kv_heads) as unit:
        head = unit % shape.kv_heads
        part = parts + (unit // shape.kv_heads) * PART_FIELDS
        row, first, stop, index, count = (part[field] for field in range(5))
        table = tables + row * width
        with code.when((index + 1).equals(count)):  # the row's own key is the last of its last part
            _write(code, shape, head, row, slots[row])
        _Part(code, shape, head, row, table, first, stop).attend(unit, index, count)
    return Kernel(code, num_arguments=NUM_ARGUMENTS)


def _write(code: Code, shape: Shape, head: Value, row: Value, slot: Value) -> None:
    num_slots = code.arguments[17]
    for argument, cache, width in ((9, 15, shape.key_dim), (12, 16, shape.value_dim)):
        source = code.tensor(argument, shape.dtype)
        source += head * code.arguments[argument + 1] + row * code.arguments[argument + 2]
        paging.copy(source, code.tensor(cache, shape.dtype) + (head * num_slots + slot) * width, width)


class _Part:
    """The code of one unit."""

    def __init__(
        self, code: Code, shape: Shape, head: Value, row: Value, table: Pointer, first: Value, stop: Value
    ) -> None:
        self.code, self.shape, self.head, self.row, self.table = code, shape, head, row, table
        self.first, self.stop = first, stop
        num_slots = code.arguments[17]
        self.keys = code.tensor(15, shape.dtype) + head * num_slots * shape.key_dim
        self.values = code.tensor(16, shape.dtype) + head * num_slots * shape.value_dim
        self.first_tile, self.stop_tile = first // LANES, (stop + (LANES - 1)) // LANES
        self.scores = code.scratch(MAX_TOGETHER * (SEGMENT + LANES))
        self.sums = code.scratch(MAX_TOGETHER * shape.value_dim)

    def attend(self, unit: Value, index: Value, count: Value) -> None:
        code, shape = self.code, self.shape
        size, larger = divmod(shape.group, -(-shape.group // MAX_TOGETHER))
        bound = larger * (size + 1)
        for first, stop, together in ((0, bound, size + 1), (bound, shape.group, size)):
            if first < stop:
                with code.loop(stop, first, step=together) as offset:
                    self._attend_together(offset, together, unit, count)
        with code.when(count > 1):
            done = code.tensor(21, torch.int64) + (self.row * shape.kv_heads + self.head)
            with code.when((done.add_to(0, 1) + 1).equals(count)):
                done[0] = 0
                self._merge(unit - index * shape.kv_heads, count)

    def _attend_together(self, offset: Value, together: int, unit: Value, count: Value) -> None:
        """Some queries of the group, from the one at ``offset``."""
        code, shape = self.code, self.shape
        query = code.tensor(6, shape.dtype) + self.row * code.arguments[8]
        rows = [query + (self.head * shape.group + offset + each) * code.arguments[7] for each in range(together)]
        queries = [[row.vector(place) * shape.scaling for place in range(0, shape.key_dim, LANES)] for row in rows]
        with code.loop(self.stop_tile, self.first_tile) as tile:
            self._score(queries, tile)
        self._hide(together)
        weights = [self._soften(each) for each in range(together)]
        for place in range(0, together * shape.value_dim, LANES):
            self.sums.put(place, code.vector(0))
        with code.loop(self.stop_tile, self.first_tile) as tile:
            self._add_values(together, tile)
        with code.when(count.equals(1)):
            for each, (largest, total) in enumerate(weights):
                number = self.head * shape.group + offset + each
                self._finish(number, largest, total, self.sums + each * shape.value_dim)
        with code.when(count > 1):
            partial = self._partial(unit) + offset * (shape.value_dim + 2)
            for each, (largest, total) in enumerate(weights):
                target = partial + each * (shape.value_dim + 2)
                target[0], target[1] = largest, total
                for place in range(0, shape.value_dim, LANES):
                    target.put(place + 2, self.sums.vector(each * shape.value_dim + place))

    def _slot(self, tile: Value) -> Value:
        return paging.first_slot(self.table, tile, self.shape.block_size)

    def _place(self, tile: Value) -> Value:
        """Where its scores are."""
        return (tile - self.first_tile) * LANES

    def _score(self, queries: list[list[Value]], tile: Value) -> None:
        """16 keys with each query."""
        code, shape = self.code, self.shape
        slot, later = self._slot(tile), self._slot(code.smaller(tile + AHEAD, self.stop_tile - 1))
        keys = self.keys + slot * shape.key_dim

        def products(key: int) -> list[Value]:
            # A few lines with each key: all at once would stop the computing until most of them have come. Measured
            # with AVX2: 8 rows of 4,096 tokens are read at 14 GB/s, not 8.
            _prefetch(self.keys, (later + key) * shape.key_dim, shape.key_dim)
            _prefetch(self.values, (slot + key) * shape.value_dim, shape.value_dim)
            code.compiler_barrier()
            pieces = [keys.vector(key * shape.key_dim + place) for place in range(0, shape.key_dim, LANES)]
            found = []
            for query in queries:
                product = query[0] * pieces[0]
                for part, piece in zip(query[1:], pieces[1:], strict=True):
                    product = code.multiply_add(part, piece, product)
                found.append(product)
            return found

        rows = zip(*(products(key) for key in range(LANES)), strict=True)
        for each, scores in enumerate(code.sums(list(row)) for row in rows):
            if shape.softcap:  # tanh(x) is 1 - 2 / (exp(2 x) + 1)
                limited = 1 - 2 / (code.exp(scores * (2 / shape.softcap)) + 1)
                scores = limited * shape.softcap
            self._scores_of(each).put(self._place(tile), scores)

    def _scores_of(self, each: int) -> Pointer:
        return self.scores + each * (SEGMENT + LANES)

    def _hide(self, together: int) -> None:
        """Keys of the first and last tile that the row does not see."""
        code = self.code
        for each in range(together):
            scores = self._scores_of(each)
            with code.loop(self.first, self.first_tile * LANES) as position:
                scores[position - self.first_tile * LANES] = _HIDDEN
            with code.loop(self.stop_tile * LANES, self.stop) as position:
                scores[position - self.first_tile * LANES] = _HIDDEN

    def _soften(self, each: int) -> tuple[Value, Value]:
        """Scores -> weights that are 1 at the largest, in place; returns the largest score and the weights' sum."""
        code, scores = self.code, self._scores_of(each)
        size = (self.stop_tile - self.first_tile) * LANES
        highest = code.variable(code.vector(_HIDDEN))
        with code.loop(size, step=LANES) as place:
            highest.set(code.maximum(highest.get(), scores.vector(place)))
        largest = code.largest(highest.get())
        sums = code.variable(code.vector(0))
        with code.loop(size, step=LANES) as place:
            weights = code.exp(scores.vector(place) - largest)
            scores.put(place, weights)
            sums.set(sums.get() + weights)
        return largest, code.sum(sums.get())

    def _add_values(self, together: int, tile: Value) -> None:
        """What lies in slots that the row does not see is not read: it may be not-a-number."""
        code, shape = self.code, self.shape
        values = self.values + self._slot(tile) * shape.value_dim
        begin = tile * LANES
        last = code.smaller(self.stop - begin, code.integer(LANES))
        before = self.first - begin
        start = code.choose(before < 0, code.integer(0), before)
        wide = max(1, sums_at_once() // together) * LANES
        for left in range(0, shape.value_dim, wide):
            places = range(left, min(left + wide, shape.value_dim), LANES)
            sums = [
                [code.variable(self.sums.vector(each * shape.value_dim + place)) for place in places]
                for each in range(together)
            ]
            with code.loop(last, start) as key:
                pieces = [values.vector(key * shape.value_dim + place) for place in places]
                for each in range(together):
                    weight = code.spread(self._scores_of(each)[self._place(tile) + key])
                    for piece, total in zip(pieces, sums[each], strict=True):
                        total.set(code.multiply_add(weight, piece, total.get()))
            for each in range(together):
                for place, total in zip(places, sums[each], strict=True):
                    self.sums.put(each * shape.value_dim + place, total.get())

    def _partial(self, unit: Value) -> Pointer:
        """Of each query of the group: largest score, sum of weights, weighted sum of values."""
        size = self.shape.group * (self.shape.value_dim + 2)
        return self.code.tensor(20, torch.float32) + unit * size

    def _merge(self, first_unit: Value, count: Value) -> None:
        """Put the parts of a row together, each scaled from its own largest score to the largest of all."""
        code, shape = self.code, self.shape
        size = shape.value_dim + 2
        with code.loop(shape.group) as each:
            largest = code.variable(code.number(_HIDDEN))
            total = code.variable(code.number(0))
            with code.loop(count) as index:
                part = self._partial(first_unit + index * shape.kv_heads) + each * size
                largest.set(code.maximum(largest.get(), part[0]))
            for place in range(0, shape.value_dim, LANES):
                self.sums.put(place, code.vector(0))
            with code.loop(count) as index:
                part = self._partial(first_unit + index * shape.kv_heads) + each * size
                factor = code.exp(code.spread(part[0] - largest.get()))
                total.set(total.get() + code.first(factor) * part[1])
                for place in range(0, shape.value_dim, LANES):
                    self.sums.put(place, code.multiply_add(factor, part.vector(place + 2), self.sums.vector(place)))
            self._finish(self.head * shape.group + each, largest.get(), total.get(), self.sums)

    def _finish(self, number: Value, largest: Value, total: Value, sums: Pointer) -> None:
        """Divide by the sum of the weights, which a sink adds to, and store a query's result."""
        code, shape = self.code, self.shape
        scale = code.number(1)
        if shape.has_sinks:
            sink = code.tensor(19, torch.float32)[number]
            top = code.maximum(largest, sink)
            scale = code.first(code.exp(code.spread(largest - top)))
            total = total * scale + code.first(code.exp(code.spread(sink - top)))
        factor = code.spread(scale / total)
        out = code.tensor(18, shape.dtype) + (self.row * shape.query_heads + number) * shape.value_dim
        for place in range(0, shape.value_dim, LANES):
            out.put(place, sums.vector(place) * factor)


def _prefetch(memory: Pointer, first: Value, count: int) -> None:
    """Ask for what will be read next; 64 bytes are what a processor fetches."""
    step = 64 // memory.dtype.itemsize
    for place in range(0, count, step):
        memory.prefetch(first + place)
