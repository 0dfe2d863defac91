"""Attention of prompt chunks in bfloat16 with AMX, straight from the paged cache.

A unit of work is 16 queries of a chunk and one key/value head with its query group. Keys come in segments: scores of
all of a segment's keys first, lanes being queries, then their weights, then the weighted sum of values; sums of
segments before are scaled when a larger score turns up.

Shape legend: H query heads, K key/value heads, G query heads per K, D key width, E value width, S cache slots, T tokens
of the step, U units by K.
Source: FlashAttention, Dao et al. 2022, with longer blocks of keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from text_generation_server.cpu_kernels import paging, tiles
from text_generation_server.cpu_kernels.compiler import Kernel, new_code
from text_generation_server.cpu_kernels.decode_attention import Shape
from text_generation_server.cpu_kernels.language import LANES, Code, Pointer, Value
from text_generation_server.cpu_kernels.tiles import NUMBERS, STEP, Tiles

SEGMENT = 64
"""Keys whose scores, weights and values are held at once: all of it in the nearest cache. Values are put in order once
for the whole group. Measured for 480 queries behind 2,064 keys, one layer: 2.7 ms; with 256 keys 3.3, with 32 2.9."""
STACK_BYTES = 2**20
"""For queries, values and sums of a unit, at most: a thread has 8 MB, unless it was told otherwise."""
RESULTS = 4
"""Tiles for results."""
LOG2_E = math.log2(math.e)
_HIDDEN = -(2.0**100)

PART_FIELDS = 5
"""Of 16 queries: the chunk, their first token in the step, their number, the first one's position, and the first
position it sees."""
NUM_ARGUMENTS = 13


def supports(group: int, key_dim: int, value_dim: int, block_size: int, dtype: torch.dtype) -> bool:
    fits = key_dim % STEP == 0 and value_dim % LANES == 0 and block_size % LANES == 0
    fits &= group * LANES * (2 * key_dim + 4 * value_dim) + SEGMENT * 2 * value_dim <= STACK_BYTES
    return fits and dtype == torch.bfloat16 and tiles.are_available()


@dataclass(slots=True)
class Chunks:
    """What the layers of one window read for the prompt chunks of a step."""

    parts_U5: Tensor
    """int64, see ``PART_FIELDS``."""
    tables_RB: Tensor
    """See ``paging.padded_tables``."""


def plan_chunks(
    block_tables: Sequence[list[int]],
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    first_seen: Sequence[Sequence[int]],
    block_size: int,
) -> Chunks:
    """Cut chunks, whose queries are the last of their contexts, into parts. ``first_seen`` is, for each chunk, the
    first position that the first query of each of its parts sees."""
    parts: list[tuple[int, ...]] = []
    token = 0
    for row, (count, context) in enumerate(zip(query_lens, context_lens, strict=True)):
        for part, first in enumerate(range(0, count, LANES)):
            position = context - count + first
            parts.append((row, token + first, min(LANES, count - first), position, first_seen[row][part]))
        token += count
    parts.sort(key=lambda part: part[4] - part[3])  # the longest first: what is left at the end is short
    return Chunks(torch.tensor(parts), paging.padded_tables(block_tables, max(context_lens), block_size))


class PrefillAttention:
    """The kernel of one shape and one window."""

    def __init__(self, shape: Shape, *, window: int, chunk: int) -> None:
        """``window`` and ``chunk`` as in ``attention/interface.py: LayerSpec``."""
        self.shape = shape
        self._kernel = _compiled(shape, window, chunk)

    def __call__(
        self,
        chunks: Chunks,
        query_HTD: Tensor,
        keys_KSD: Tensor,
        values_KSE: Tensor,
        out_THE: Tensor,
        sinks_H: Tensor | None,
    ) -> None:
        """Attend to keys and values that are in the cache already, the chunks' own among them; fills ``out_THE``, which
        is contiguous. The last dimension of queries is contiguous, ``sinks_H`` is float32."""
        num_parts = chunks.parts_U5.shape[0]
        self._kernel(
            num_parts,
            chunks.parts_U5.data_ptr(),
            chunks.tables_RB.data_ptr(),
            chunks.tables_RB.shape[1],
            query_HTD.data_ptr(),
            query_HTD.stride(0),
            query_HTD.stride(1),
            keys_KSD.data_ptr(),
            values_KSE.data_ptr(),
            keys_KSD.shape[1],
            out_THE.data_ptr(),
            0 if sinks_H is None else sinks_H.data_ptr(),
            tiles.shapes(2 * LANES).data_ptr(),
            units=num_parts * self.shape.kv_heads,
        )


def _compiled(shape: Shape, window: int, chunk: int) -> Kernel:
    code = new_code("prefill_attention")
    parts, tables = code.tensor(2, torch.int64), code.tensor(3, torch.int64)
    shapes_of_others = Tiles.save(code)
    registers = Tiles(code)
    registers.shape(code.arguments[13])
    with code.units(code.arguments[1] * shape.kv_heads) as unit:
        part = parts + (unit // shape.kv_heads) * PART_FIELDS
        row, token, count, position, first = (part[field] for field in range(PART_FIELDS))
        table = tables + row * code.arguments[4]
        _Part(code, registers, shape, unit % shape.kv_heads, table, token, count, position, first).attend(window, chunk)
    Tiles.restore(code, shapes_of_others)
    return Kernel(code, num_arguments=NUM_ARGUMENTS)


class _Part:
    """The code of one unit. Vectors have a lane for each query, unless it is said otherwise."""

    def __init__(
        self,
        code: Code,
        registers: Tiles,
        shape: Shape,
        head: Value,
        table: Pointer,
        token: Value,
        count: Value,
        position: Value,
        first: Value,
    ) -> None:
        self.code, self.registers, self.shape = code, registers, shape
        self.head, self.table, self.token, self.count = head, table, token, count
        self.position, self.first, self.stop = position, first, position + count
        num_slots = code.arguments[10]
        self.keys = code.tensor(8, shape.dtype) + head * num_slots * shape.key_dim
        self.values = code.tensor(9, shape.dtype) + head * num_slots * shape.value_dim
        self.value_tiles, self.key_steps = shape.value_dim // LANES, shape.key_dim // STEP
        self.query_pairs = code.scratch(shape.group * self.key_steps * NUMBERS // 2).of(shape.dtype)
        self.value_pairs = code.scratch(SEGMENT // STEP * self.value_tiles * NUMBERS // 2).of(shape.dtype)
        self.scores = code.scratch(2 * SEGMENT * LANES)
        """Of one query head, and of the next one."""
        self.weights = code.scratch(SEGMENT // STEP * NUMBERS // 2).of(shape.dtype)
        self.largest = code.scratch(shape.group * LANES)
        self.totals = code.scratch(shape.group * LANES)
        self.sums = code.scratch(shape.group * LANES * shape.value_dim)
        """Of each query head, query by query."""
        self.fresh = code.scratch(LANES * RESULTS * LANES)
        self.factors = code.scratch(LANES)

    def attend(self, window: int, chunk: int) -> None:
        code, shape = self.code, self.shape
        lanes = code.spread(code.to_float(self.position)) + code.lane_numbers()
        seen: Value | None = None
        if window:
            seen = lanes - float(window - 1)
        elif chunk:
            seen = code.floor(lanes / float(chunk)) * float(chunk)
        with code.loop(shape.group) as each:
            self._load_query(each)
            self.largest.put(each * LANES, code.vector(_HIDDEN))
            self.totals.put(each * LANES, code.vector(0))
            with code.loop(LANES * shape.value_dim, step=LANES) as place:
                self.sums.put(each * (LANES * shape.value_dim) + place, code.vector(0))
        with code.loop(self.stop, self.first // LANES * LANES, step=SEGMENT) as begin:
            steps = (code.smaller(self.stop - begin, code.integer(SEGMENT)) + (STEP - 1)) // STEP
            with code.loop(steps) as step:
                self._load_values(begin, step)
                self._ask_for((begin + SEGMENT) // LANES + step * 2)
            with code.loop(steps) as step:
                self._score(code.integer(0), begin, step)
            with code.loop(shape.group) as each:
                self._soften(each, begin, steps, seen, lanes)
                for tile in range(0, self.value_tiles, RESULTS):
                    self._add_values(each, steps, range(tile, min(tile + RESULTS, self.value_tiles)))
        with code.loop(shape.group) as each:
            self._finish(each)

    def _load_query(self, each: Value) -> None:
        """One query head's 16 queries, put upright: rows of pairs of the numbers that are summed over."""
        code, shape = self.code, self.shape
        source = code.tensor(5, shape.dtype) + (self.head * shape.group + each) * code.arguments[6]
        for step in range(self.key_steps):
            rows = []
            for query in range(LANES):
                # Behind the last there may be no memory: it stands in for those that are missing.
                token = self.token + code.smaller(code.integer(query), self.count - 1)
                rows.append((source + token * code.arguments[7]).bits(step * STEP))
            for pair, upright in enumerate(code.transpose(rows)):
                self.query_pairs.put_bits((each * self.key_steps + step) * NUMBERS + pair * STEP, upright)

    def _slot(self, tile: Value) -> Value:
        """Of the last tile if there is no such."""
        existing = self.code.smaller(tile, (self.stop - 1) // LANES)
        return paging.first_slot(self.table, existing, self.shape.block_size)

    def _load_values(self, begin: Value, step: Value) -> None:
        """32 tokens' values as tiles of pairs of tokens. Those that are not seen are 0: they may be not-a-number."""
        code, width = self.code, self.shape.value_dim
        position = begin + step * STEP
        for half in range(2):
            values = self.values + self._slot(position // LANES + half) * width
            for pair in range(LANES // 2):
                kept = []
                for token in (2 * pair, 2 * pair + 1):
                    place = position + (half * LANES + token)
                    kept.append((place >= self.first).both(place < self.stop))
                for tile in range(self.value_tiles):
                    low, high = (
                        code.choose(keep, values.halves(token * width + tile * LANES), code.no_halves())
                        for keep, token in zip(kept, (2 * pair, 2 * pair + 1), strict=True)
                    )
                    target = (step * self.value_tiles + tile) * NUMBERS + (half * LANES // 2 + pair) * STEP
                    self.value_pairs.put_bits(target, code.paired(low, high))

    def _ask_for(self, tile: Value) -> None:
        """Have the keys and values of the next segment brought nearer."""
        for half in range(2):
            slot = self._slot(tile + half)
            for memory, width in ((self.keys, self.shape.key_dim), (self.values, self.shape.value_dim)):
                tile_memory = memory + slot * width
                for place in range(0, LANES * width, STEP):  # a line of the cache is 32 numbers
                    tile_memory.prefetch(place)

    def _score(self, each: Value, begin: Value, step: Value) -> None:
        """32 keys with the 16 queries of one head: rows are keys."""
        registers, width = self.registers, self.shape.key_dim
        scores = self._scores_of(each)
        for half in range(2):
            registers.zero(half)
        keys = [self.keys + self._slot(begin // LANES + step * 2 + half) * width for half in range(2)]
        for part in range(self.key_steps):
            registers.load(6, self.query_pairs + (each * self.key_steps + part) * NUMBERS, 2 * STEP)
            for half in range(2):
                registers.load(4 + half, keys[half] + part * STEP, 2 * width)
                registers.multiply(half, 4 + half, 6)
        for half in range(2):
            registers.store(half, scores + (step * 2 + half) * (LANES * LANES), 4 * LANES)

    def _scores_of(self, each: Value) -> Pointer:
        return self.scores + each % 2 * (SEGMENT * LANES)

    def _soften(self, each: Value, begin: Value, steps: Value, seen: Value | None, lanes: Value) -> None:
        """Scores -> weights of a segment, as rows of queries; what was summed up before it is scaled.

        The next head's scores are computed meanwhile: by a part of the core that vectors do not use.
        """
        code, own = self.code, self._scores_of(each)
        before = self.largest.vector(each * LANES)
        highest = code.variable(before)
        # Keys up to the first query are seen by all, if there is no window.
        unmasked = code.integer(0)
        if seen is None:
            common = code.choose(begin > self.position, unmasked, self.position + 1 - begin)
            unmasked = code.smaller(common // STEP, steps)
        for first, stop, is_masked in ((code.integer(0), unmasked, False), (unmasked, steps, True)):
            with code.loop(stop * STEP, first * STEP) as key:
                scores = self._scaled(own.vector(key * LANES))
                if is_masked:
                    position = code.spread(code.to_float(begin + key))
                    visible = position <= lanes
                    visible = visible if seen is None else visible.both(position >= seen)
                    scores = code.choose(visible, scores, code.vector(_HIDDEN))
                own.put(key * LANES, scores)
                highest.set(code.choose(scores > highest.get(), scores, highest.get()))
        largest = highest.get()
        factor = code.power_of_two(before - largest)
        total = code.variable(self.totals.vector(each * LANES) * factor)
        with code.loop(steps) as step:
            with code.when(each < self.shape.group - 1):
                self._score(each + 1, begin, step)
            pairs = []
            for pair in range(LANES):
                halves = []
                for place in (2 * pair, 2 * pair + 1):
                    scores = own.vector((step * STEP + place) * LANES)
                    weights = code.power_of_two(scores - largest)
                    if seen is not None:  # a query that has seen nothing yet has nothing to compare with
                        weights = code.choose(scores.equals(_HIDDEN), code.vector(0), weights)
                    total.set(total.get() + weights)
                    halves.append(code.rounded_halves(weights))
                pairs.append(code.paired(*halves))
            for query, row in enumerate(code.transpose(pairs)):
                self.weights.put_bits(step * NUMBERS + query * STEP, row)
        self.largest.put(each * LANES, largest)
        self.totals.put(each * LANES, total.get())
        self.factors.put(0, factor)

    def _scaled(self, products: Value) -> Value:
        """Products of queries and keys as scores to the base of 2."""
        code, shape = self.code, self.shape
        if not shape.softcap:
            return products * (shape.scaling * LOG2_E)
        # tanh(x) is 1 - 2 / (exp(2 x) + 1)
        capped = 1 - 2 / (code.exp(products * (2 * shape.scaling / shape.softcap)) + 1)
        return capped * (shape.softcap * LOG2_E)

    def _add_values(self, each: Value, steps: Value, value_tiles: range) -> None:
        code, registers, width = self.code, self.registers, self.shape.value_dim
        for place in range(len(value_tiles)):
            registers.zero(place)
        with code.loop(steps) as step:
            registers.load(4, self.weights + step * NUMBERS, 2 * STEP)
            for place, tile in enumerate(value_tiles):
                registers.load(6 + place % 2, self.value_pairs + (step * self.value_tiles + tile) * NUMBERS, 2 * STEP)
                registers.multiply(place, 4, 6 + place % 2)
        for place in range(len(value_tiles)):
            registers.store(place, self.fresh + place * LANES, 4 * RESULTS * LANES)
        with code.loop(LANES) as query:
            factor = code.spread(self.factors[query])
            for place, tile in enumerate(value_tiles):
                target = (each * LANES + query) * width + tile * LANES
                fresh = self.fresh.vector(query * (RESULTS * LANES) + place * LANES)
                self.sums.put(target, code.multiply_add(self.sums.vector(target), factor, fresh))

    def _finish(self, each: Value) -> None:
        """Divide by the sum of the weights, which a sink adds to, and store."""
        code, shape = self.code, self.shape
        number = self.head * shape.group + each
        largest, total = self.largest.vector(each * LANES), self.totals.vector(each * LANES)
        scale = code.vector(1)
        if shape.has_sinks:
            sink = code.spread(code.tensor(12, torch.float32)[number] * LOG2_E)
            top = code.maximum(largest, sink)
            scale = code.power_of_two(largest - top)
            total = total * scale + code.power_of_two(sink - top)
        self.factors.put(0, scale / total)
        with code.loop(self.count) as query:
            factor = code.spread(self.factors[query])
            out = code.tensor(11, shape.dtype)
            out += ((self.token + query) * shape.query_heads + number) * shape.value_dim
            for place in range(0, shape.value_dim, LANES):
                out.put(place, self.sums.vector((each * LANES + query) * shape.value_dim + place) * factor)
