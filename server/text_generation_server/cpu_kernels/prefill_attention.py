"""Attention of prompt chunks in bfloat16, straight from the paged cache: with AMX or, without it, vectors.

A unit of work is some parts of a chunk, of 16 queries each, and one key/value head with its query group. Part and query
head make a member. Keys come in segments: values are put upright once for all members, and keys made what products are
computed from; then, of each member, scores of all of a segment's keys, lanes being queries, their weights, and the
weighted sum of values. Sums of segments before are scaled when a much larger score turns up.

Short chunks of sequences that begin alike, behind one long prompt of the system say, are pieces of one unit: what they
share is looked at by all of their members, the rest of each by its own.

What a query gets depends on nothing but itself and what it sees: not on the queries that share its unit, nor on where
its chunk begins.

Shape legend: H query heads, K key/value heads, G query heads per K, D key width, E value width, S cache slots, T tokens
of the step, U units by K, P pieces.
Source: FlashAttention, Dao et al. 2022, with longer blocks of keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from text_generation_server.cpu_kernels import paging, tiles, vector_tiles
from text_generation_server.cpu_kernels.compiler import Kernel, new_code, processor_has
from text_generation_server.cpu_kernels.decode_attention import Shape
from text_generation_server.cpu_kernels.language import LANES, Code, Pointer, Value, Variable
from text_generation_server.cpu_kernels.tiles import NUMBERS, STEP, Tiles
from text_generation_server.cpu_kernels.vector_tiles import VectorTiles

Registers = Tiles | VectorTiles
"""What products are computed in."""

SEGMENT = 64
"""Keys whose scores, weights and values are held at once: nearly all of it in the nearest cache. Measured with AMX for
480 queries behind 2,064 keys, nine query heads of 64 and three of keys: 1.9 ms; with 32 keys 2.1, with 128 2.2."""
SEGMENT_OF_VECTORS = 32
"""Without AMX: float32 takes twice the room, and products that nobody needs, of queries with keys behind them in the
segment, more time. Measured with AVX2 on one core for 128 tokens, heads as above: 0.36 ms, with 64 keys 0.42; for 480
behind 2,064: 33.5 ms and 34.5."""
STACK_BYTES = 2**20
"""For queries, values and sums of a unit, at most: a thread has 8 MB, unless it was told otherwise."""
RESULTS = 4
"""That are summed up at once: as many as AMX has tiles for."""
CHAINS = 4
"""Scores that are compared at once."""
LOG2_E = math.log2(math.e)
_HIDDEN = -(2.0**100)

MOST_MEMBERS = 12
"""Of a unit, unless the query group alone is larger. Measured for a chunk of 512 tokens of 2,048, 32 query heads of 128
and eight of keys: 12 ms; with 6 members 16."""
MUCH_LARGER = 8.0
"""A score that is larger than all before by no more than this, to the base of 2, has a weight above 1, and nothing is
scaled. Source: FlashAttention-4."""

LEAST_SHARED = 256
"""Tokens that pieces of one unit have in common, at least."""
UNITS_OF_THREAD = 4
"""At least, where pieces share units: with fewer, one thread would wait for another."""

UNIT_FIELDS = 4
"""The first piece, the number of pieces, their members together, and the tokens that they have in common."""
PIECE_FIELDS = 5
"""The chunk, the first token in the step, the number of tokens, the first one's position, and the first member."""
NUM_ARGUMENTS = 14


def supports(group: int, key_dim: int, value_dim: int, block_size: int, dtype: torch.dtype) -> bool:
    """With AMX or without: what is bfloat16, comes in whole tiles and fits the stack."""
    fits = key_dim % STEP == 0 and value_dim % LANES == 0 and value_dim >= STEP and block_size % LANES == 0
    members = group * parts_of_unit(group)
    if tiles.are_available():
        fits &= members * LANES * (2 * key_dim + 4 * value_dim) + SEGMENT * 2 * value_dim <= STACK_BYTES
    else:
        size = vector_tiles.best_dtype(has_bfloat16=processor_has("avx512bf16")).itemsize
        queries_and_sums = members * LANES * (size * key_dim + 4 * value_dim)
        fits &= queries_and_sums + SEGMENT_OF_VECTORS * size * (key_dim + value_dim) <= STACK_BYTES
    return fits and dtype == torch.bfloat16


def parts_of_unit(group: int) -> int:
    """Of 16 queries, for ``group`` query heads each."""
    return max(1, MOST_MEMBERS // group)


@dataclass(slots=True)
class Chunks:
    """What the layers of one query group read for the prompt chunks of a step."""

    units_U4: Tensor
    """int64, see ``UNIT_FIELDS``."""
    pieces_P5: Tensor
    """int64, see ``PIECE_FIELDS``."""
    tables_RB: Tensor
    """See ``paging.padded_tables``."""


@dataclass(slots=True)
class _Queries:
    row: int
    token: int
    count: int
    position: int
    members: int


@dataclass(slots=True)
class _Shared:
    """Pieces that are to be one unit."""

    pieces: list[_Queries]
    members: int
    shared: int = 0


def plan_chunks(
    block_tables: Sequence[list[int]],
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    block_size: int,
    group: int,
    kv_heads: int = 1,
) -> Chunks:
    """Cut chunks, whose queries are the last of their contexts, into units. ``kv_heads``: to share the units out."""
    most = LANES * parts_of_unit(group)
    pieces: list[_Queries] = []
    token = 0
    for row, (count, context) in enumerate(zip(query_lens, context_lens, strict=True)):
        for first in range(0, count, most):
            size = min(most, count - first)
            pieces.append(_Queries(row, token + first, size, context - count + first, num_members(size, group)))
        token += count
    alone = [_Shared([piece], piece.members) for piece in pieces]
    units = _joined(alone, block_tables, block_size, group * parts_of_unit(group)) if len(query_lens) > 1 else alone
    if len(units) * kv_heads < UNITS_OF_THREAD * torch.get_num_threads():
        units = alone
    units.sort(key=lambda unit: -unit.pieces[0].position)  # the longest first: what is left at the end is short
    unit_rows: list[tuple[int, ...]] = []
    piece_rows: list[tuple[int, ...]] = []
    for unit in units:
        unit_rows.append((len(piece_rows), len(unit.pieces), unit.members, unit.shared))
        member = 0
        for piece in unit.pieces:
            piece_rows.append((piece.row, piece.token, piece.count, piece.position, member))
            member += piece.members
    tables_RB = paging.padded_tables(block_tables, max(context_lens), block_size)
    return Chunks(torch.tensor(unit_rows), torch.tensor(piece_rows), tables_RB)


def num_members(count: int, group: int) -> int:
    """Of a piece of so many tokens. Few queries share vectors with those of other heads: see `_Unit`."""
    heads_at_once = 1 if count > LANES // 2 else 2 if count > LANES // 4 else 4
    return -(-count // LANES) * -(-group // heads_at_once)


def _joined(units: list[_Shared], block_tables: Sequence[list[int]], block_size: int, most: int) -> list[_Shared]:
    """Those of sequences that begin alike together, of ``most`` members at most."""
    joined: list[_Shared] = []
    for unit in sorted(units, key=lambda unit: block_tables[unit.pieces[0].row]):
        (piece,) = unit.pieces
        last = joined[-1] if joined else None
        if last is not None and last.members + piece.members <= most and last.pieces[0].row != piece.row:
            common = _common(block_tables[last.pieces[0].row], block_tables[piece.row]) * block_size
            shared = min(common, piece.position, last.shared or last.pieces[0].position) // SEGMENT * SEGMENT
            if shared >= LEAST_SHARED:
                last.pieces.append(piece)
                last.members += piece.members
                last.shared = shared
                continue
        joined.append(_Shared([piece], piece.members))
    return joined


def _common(one: list[int], other: list[int]) -> int:
    """Blocks that both begin with."""
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))


class PrefillAttention:
    """The kernel of one shape and one window."""

    def __init__(
        self, shape: Shape, *, window: int, chunk: int, registers: Callable[[Code], Registers] | None = None
    ) -> None:
        """``window`` and ``chunk`` as in ``attention/interface.py: LayerSpec``; ``registers``: if not the best there
        are."""
        self.shape = shape
        self.kernel = _compiled(shape, window, chunk, registers or best_registers())

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
        arguments = self.arguments(chunks, query_HTD, keys_KSD, values_KSE, out_THE, sinks_H)
        self.kernel(*arguments, units=chunks.units_U4.shape[0] * self.shape.kv_heads)

    def arguments(
        self,
        chunks: Chunks,
        query_HTD: Tensor,
        keys_KSD: Tensor,
        values_KSE: Tensor,
        out_THE: Tensor,
        sinks_H: Tensor | None,
    ) -> tuple[int, ...]:
        """The kernel's."""
        return (
            chunks.units_U4.shape[0],
            chunks.units_U4.data_ptr(),
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
            chunks.pieces_P5.data_ptr(),
        )


def best_registers() -> Callable[[Code], Registers]:
    return Tiles if tiles.are_available() else VectorTiles


def _compiled(shape: Shape, window: int, chunk: int, new_registers: Callable[[Code], Registers]) -> Kernel:
    code = new_code("prefill_attention")
    registers = new_registers(code)
    with registers.shaped(code.arguments[13]), code.units(code.arguments[1] * shape.kv_heads) as number:
        unit = code.tensor(2, torch.int64) + (number // shape.kv_heads) * UNIT_FIELDS
        first_piece, num_pieces, members, shared = (unit[field] for field in range(UNIT_FIELDS))
        pieces = code.tensor(14, torch.int64) + first_piece * PIECE_FIELDS
        _Unit(code, registers, shape, number % shape.kv_heads).attend(
            pieces, num_pieces, members, shared, window, chunk
        )
    return Kernel(code, num_arguments=NUM_ARGUMENTS)


class _Piece:
    """The code of what is known of one.

    Of up to 8 queries, those of two heads share a vector, of up to 4 those of four: a step that others wait for takes
    in few tokens of a prompt.
    """

    def __init__(self, code: Code, shape: Shape, fields: Pointer) -> None:
        self.code = code
        row, self.token, self.count, self.position, self.first_member = (fields[field] for field in range(PIECE_FIELDS))
        self.table = code.tensor(3, torch.int64) + row * code.arguments[4]
        self.stop = self.position + self.count
        self.heads_at_once = self._by_count(1, 2, 4)
        self.lanes_of_head = self._by_count(LANES, LANES // 2, LANES // 4)
        self.rows_of_heads = self._by_count(*(-(-shape.group // heads) for heads in (1, 2, 4)))
        """Members of each part."""
        members = (self.count + (LANES - 1)) // LANES * self.rows_of_heads
        self.stop_member = self.first_member + members

    def _by_count(self, many: int, few: int, fewer: int) -> Value:
        """One of three, as there are more than 8 queries, more than 4, or less."""
        code = self.code
        at_most = code.choose(self.count > LANES // 4, code.integer(few), code.integer(fewer))
        return code.choose(self.count > LANES // 2, code.integer(many), at_most)

    def part_of(self, member: Value) -> Value:
        """Where a member's part begins among the piece's tokens."""
        return (member - self.first_member) // self.rows_of_heads * LANES

    def token_of(self, lane: int) -> Value:
        """Which of the part's tokens a lane has."""
        return lane - self._turn_of(lane) * self.lanes_of_head

    def tokens_of_lanes(self) -> Value:
        """The same of all lanes."""
        code = self.code
        width = code.spread(code.to_float(self.lanes_of_head))
        return code.lane_numbers() - code.floor(code.lane_numbers() / width) * width

    def query_head(self, member: Value, lane: int) -> Value:
        """Within the group; not below the group's size where there is none."""
        row = (member - self.first_member) % self.rows_of_heads
        return row * self.heads_at_once + self._turn_of(lane)

    def _turn_of(self, lane: int) -> Value:
        """Which of the heads that share a vector."""
        return self.heads_at_once * lane // LANES


class _Sight:
    """The code of what some members look at: positions ``first`` to ``stop``, by the table of a piece.

    Of a piece these are its own, and each query sees up to its own position; of what several pieces share they see all.
    """

    def __init__(self, code: Code, piece: _Piece, first: Value, stop: Value, members: tuple[Value, Value]) -> None:
        self.code, self.piece, self.first, self.stop = code, piece, first, stop
        self.first_member, self.stop_member = members

    def start_member(self, begin: Value) -> Value:
        """Parts that end before a segment see nothing of it."""
        code, piece = self.code, self.piece
        passed = code.choose(begin > piece.position, (begin - piece.position) // LANES, code.integer(0))
        return self.first_member + passed * piece.rows_of_heads

    def slot(self, tile: Value, block_size: int) -> Value:
        """Of the last tile if there is no such."""
        existing = self.code.smaller(tile, (self.stop - 1) // LANES)
        return paging.first_slot(self.piece.table, existing, block_size)


class _Unit:
    """The code of one unit. Vectors have a lane for each query of a part, unless it is said otherwise."""

    def __init__(self, code: Code, registers: Registers, shape: Shape, head: Value) -> None:
        self.code, self.registers, self.shape = code, registers, shape
        self.head = head
        self.segment = SEGMENT if isinstance(registers, Tiles) else SEGMENT_OF_VECTORS
        num_slots = code.arguments[10]
        self.keys = code.tensor(8, shape.dtype) + head * num_slots * shape.key_dim
        self.values = code.tensor(9, shape.dtype) + head * num_slots * shape.value_dim
        self.value_tiles, self.key_steps = shape.value_dim // LANES, shape.key_dim // STEP
        self.tile_groups = [
            range(first, min(first + RESULTS, self.value_tiles)) for first in range(0, self.value_tiles, RESULTS)
        ]
        """Of values: as many as there are tiles for their sums."""
        most = shape.group * parts_of_unit(shape.group)
        self.query_pairs = self._tiles(most * self.key_steps)
        self.upright = self._tiles(self.segment // STEP * self.value_tiles)
        """Values: a row is 32 tokens' numbers of one place in them, or places lie side by side."""
        self.ready_keys = None if registers.reads_in_place else self._tiles(self.segment // LANES * self.key_steps)
        """Keys, if products are not computed from the cache's."""
        self.scores = code.scratch(2 * self.segment * LANES)
        """Of one member, and of the next one."""
        self.weights = self._tiles(2 * self.segment // STEP)
        """Of one member, and of the one before."""
        self.largest = code.scratch(most * LANES)
        """Score that weights are relative to."""
        self.totals = code.scratch(most * LANES)
        self.sums = code.scratch(most * LANES * shape.value_dim)
        """Of each member, place by place."""
        self.sinks = code.scratch(LANES)
        self.has_late_scale = not shape.softcap and shape.scaling > 0
        """Scores are compared as they are, and scaled where their weights are computed."""

    def _tiles(self, count: int) -> Pointer:
        """Room for rows or pairs."""
        dtype = self.registers.dtype
        return self.code.scratch(count * NUMBERS * dtype.itemsize // 4).of(dtype)

    def attend(
        self, pieces: Pointer, num_pieces: Value, members: Value, shared: Value, window: int, chunk: int
    ) -> None:
        code, shape = self.code, self.shape
        nothing = code.integer(0)
        with code.loop(num_pieces) as number:
            piece = _Piece(code, shape, pieces + number * PIECE_FIELDS)
            with code.loop(piece.stop_member, piece.first_member) as member:
                self._load_query(piece, member)
                self.largest.put(member * LANES, code.vector(_HIDDEN))
                self.totals.put(member * LANES, code.vector(0))
                with code.loop(LANES * shape.value_dim, step=LANES) as place:
                    self.sums.put(member * (LANES * shape.value_dim) + place, code.vector(0))
        # First what all have in common, by the table of any; nothing where queries see no more than their window.
        with code.loop(num_pieces + 1) as turn:
            is_common = turn.equals(0)
            piece = _Piece(code, shape, pieces + code.choose(is_common, nothing, turn - 1) * PIECE_FIELDS)
            first = shared
            if window:
                outside = piece.position + 1 - window
                first = code.choose(outside > 0, outside, nothing)
            elif chunk:
                first = piece.position // chunk * chunk
            sight = _Sight(
                code,
                piece,
                code.choose(is_common, nothing, first),
                code.choose(is_common, nothing if window or chunk else shared, piece.stop),
                (
                    code.choose(is_common, nothing, piece.first_member),
                    code.choose(is_common, members, piece.stop_member),
                ),
            )
            with code.loop(sight.stop, sight.first // self.segment * self.segment, step=self.segment) as begin:
                self._look_at(sight, begin, window, chunk)
        with code.loop(num_pieces) as number:
            piece = _Piece(code, shape, pieces + number * PIECE_FIELDS)
            with code.loop(piece.stop_member, piece.first_member) as member:
                self._finish(piece, member)

    def _look_at(self, sight: _Sight, begin: Value, window: int, chunk: int) -> None:
        """One segment of keys and values, with all members that see something of it."""
        code = self.code
        steps = (code.smaller(sight.stop - begin, code.integer(self.segment)) + (STEP - 1)) // STEP
        with code.loop(steps) as step:
            self._load_values(sight, begin, step)
            if self.ready_keys is not None:
                self._load_keys(sight, self.ready_keys, begin, step)
            self._ask_for(sight, (begin + self.segment) // LANES + step * 2)
        start = sight.start_member(begin)
        with code.loop(steps) as step:
            self._score(sight, start, begin, step)
        with code.loop(sight.stop_member, start) as member:
            lanes = code.spread(code.to_float(self._position_of(sight, member))) + sight.piece.tokens_of_lanes()
            seen: Value | None = None
            if window:
                seen = lanes - float(window - 1)
            elif chunk:
                seen = code.floor(lanes / float(chunk)) * float(chunk)
            self._soften(sight, start, member, begin, steps, seen, lanes)
        for value_tiles in self.tile_groups:
            self._add_values(sight.stop_member - 1, steps, value_tiles)

    def _position_of(self, sight: _Sight, member: Value) -> Value:
        """Of the member's first query. Of what pieces share it stands for all: they lie behind all of it."""
        return sight.piece.position + sight.piece.part_of(member)

    def _load_query(self, piece: _Piece, member: Value) -> None:
        """A member's 16 queries, put upright: rows of pairs of the numbers that are summed over."""
        code, shape = self.code, self.shape
        queries = code.tensor(5, shape.dtype) + self.head * shape.group * code.arguments[6]
        part = piece.part_of(member)
        with code.loop(self.key_steps) as step:
            rows = []
            for query in range(LANES):
                # Behind the last there may be no memory: it stands in for those that are missing.
                token = piece.token + code.smaller(part + piece.token_of(query), piece.count - 1)
                head = code.smaller(piece.query_head(member, query), code.integer(shape.group - 1))
                source = queries + (head * code.arguments[6] + token * code.arguments[7])
                rows.append(source.bits(step * STEP))
            for pair, upright in enumerate(code.transpose(rows)):
                target = self.query_pairs + ((member * self.key_steps + step) * NUMBERS + pair * STEP)
                self.registers.put_pairs(target, upright)

    def _load_values(self, sight: _Sight, begin: Value, step: Value) -> None:
        """32 tokens' values, upright. Those that no query sees are 0: they may be not-a-number."""
        code = self.code
        position = begin + step * STEP
        slots = [sight.slot(position // LANES + half, self.shape.block_size) for half in range(2)]
        all_seen = (position >= sight.first).both(position + STEP <= sight.stop)
        put = self._put_upright if self.registers.reads_in_place else self._put_side_by_side
        with code.when(all_seen):
            put(step, slots, None)
        with code.when(code.opposite(all_seen)):
            tokens = [position + token for token in range(STEP)]
            put(step, slots, [(token >= sight.first).both(token < sight.stop) for token in tokens])

    def _put_upright(self, step: Value, slots: list[Value], seen: list[Value] | None) -> None:
        """Neighbours in a row are a token and the one 16 behind it, as of the weights."""
        code, width = self.code, self.shape.value_dim
        sources = [self.values + slot * width for slot in slots]
        with code.loop(width, step=STEP) as block:
            # The last block overlaps the one before if the width is no multiple of its own.
            first = code.smaller(block, code.integer(width - STEP))
            halves = []
            for half, source in enumerate(sources):
                rows = [source.bits(first + token * width) for token in range(LANES)]
                if seen is not None:
                    kept = seen[half * LANES : (half + 1) * LANES]
                    rows = [code.choose(keep, row, code.vector(0)) for keep, row in zip(kept, rows, strict=True)]
                halves.append(code.transpose(rows))
            target = self.upright + (step * width + first) * STEP
            for pair, (upper, lower) in enumerate(zip(*halves, strict=True)):
                self.registers.put_pairs(target + 2 * pair * STEP, code.lower_halves(upper, lower))
                self.registers.put_pairs(target + (2 * pair + 1) * STEP, code.upper_halves(upper, lower))

    def _put_side_by_side(self, step: Value, slots: list[Value], seen: list[Value] | None) -> None:
        """A token's numbers of 16 places, and then those of the one 16 behind it."""
        code, width = self.code, self.shape.value_dim
        sources = [self.values + slot * width for slot in slots]
        with code.loop(self.value_tiles) as tile:
            target = self.upright + (step * self.value_tiles + tile) * NUMBERS
            for token in range(LANES):
                pair = [source.vector(tile * LANES + token * width) for source in sources]
                if seen is not None:
                    kept = seen[token::LANES]
                    pair = [code.choose(keep, each, code.vector(0)) for keep, each in zip(kept, pair, strict=True)]
                self.registers.put_numbers(target + token * STEP, *pair)

    def _load_keys(self, sight: _Sight, ready_keys: Pointer, begin: Value, step: Value) -> None:
        """32 keys as tiles of rows."""
        code = self.code
        with code.loop(2) as half, code.loop(LANES) as row:
            key = self._keys_at(sight, begin, step, half) + row * self.shape.key_dim
            for part in range(self.key_steps):
                target = ready_keys + ((step * 2 + half) * self.key_steps + part) * NUMBERS
                self.registers.put_pairs(target + row * STEP, key.bits(part * STEP))

    def _keys_at(self, sight: _Sight, begin: Value, step: Value, half: Value | int) -> Pointer:
        slot = sight.slot(begin // LANES + step * 2 + half, self.shape.block_size)
        return self.keys + slot * self.shape.key_dim

    def _ask_for(self, sight: _Sight, tile: Value) -> None:
        """Have the keys and values of the next segment brought nearer."""
        for half in range(2):
            slot = sight.slot(tile + half, self.shape.block_size)
            for memory, width in ((self.keys, self.shape.key_dim), (self.values, self.shape.value_dim)):
                tile_memory = memory + slot * width
                for place in range(0, LANES * width, STEP):  # a line of the cache is 32 numbers
                    tile_memory.prefetch(place)

    def _score(self, sight: _Sight, member: Value, begin: Value, step: Value) -> None:
        """32 keys with a member's queries: rows are keys."""
        scores = self._scores_of(member)
        if self.ready_keys is None:
            keys = [self._keys_at(sight, begin, step, half) for half in range(2)]
        else:
            keys = [self.ready_keys + (step * 2 + half) * (self.key_steps * NUMBERS) for half in range(2)]
        self.registers.add_products(
            [scores + (step * 2 + half) * (LANES * LANES) for half in range(2)],
            keys,
            self.query_pairs + member * (self.key_steps * NUMBERS),
            steps=self.key_steps,
            row_numbers=self.shape.key_dim if self.ready_keys is None else STEP,
            step_numbers=STEP if self.ready_keys is None else NUMBERS,
            is_new=True,
        )

    def _weights_of(self, member: Value) -> Pointer:
        return self.weights + member % 2 * (self.segment // STEP * NUMBERS)

    def _scores_of(self, member: Value) -> Pointer:
        return self.scores + member % 2 * (self.segment * LANES)

    def _soften(
        self,
        sight: _Sight,
        start: Value,
        member: Value,
        begin: Value,
        steps: Value,
        seen: Value | None,
        lanes: Value,
    ) -> None:
        """Scores -> weights of a segment, as pairs of keys; what was summed up before it is scaled if need be.

        The next member's scores and the sums of the one before are computed meanwhile: by a part of the core that
        vectors do not use.
        """
        code, own = self.code, self._scores_of(member)
        scale = self.shape.scaling * LOG2_E if self.has_late_scale else 1.0
        # Several at once: each waits for the one before.
        highest = [code.variable(code.vector(_HIDDEN)) for _ in range(CHAINS)]
        # Keys up to the first query are seen by all, if there is no window.
        unmasked = code.integer(0)
        if seen is None:
            position = self._position_of(sight, member)
            common = code.choose(begin > position, unmasked, position + 1 - begin)
            unmasked = code.smaller(common // STEP, steps)
        for first, stop, is_masked in ((code.integer(0), unmasked, False), (unmasked, steps, True)):
            with code.loop(stop, first) as step:
                for place in range(STEP):
                    key = step * STEP + place
                    scores = own.vector(key * LANES)
                    if not self.has_late_scale:
                        scores = self._scaled(scores)
                    if is_masked:
                        position_of_key = code.spread(code.to_float(begin + key))
                        visible = position_of_key <= lanes
                        visible = visible if seen is None else visible.both(position_of_key >= seen)
                        scores = code.choose(visible, scores, code.vector(_HIDDEN))
                    if is_masked or not self.has_late_scale:
                        own.put(key * LANES, scores)
                    self._keep_higher(highest[place % CHAINS], scores)
        for other in highest[1:]:
            self._keep_higher(highest[0], other.get())
        before, top = self.largest.vector(member * LANES), highest[0].get() * scale
        is_much_larger = top > before + MUCH_LARGER
        with code.when(code.in_any_lane(is_much_larger)):
            # What other queries meet changes nothing for one.
            factor = code.choose(is_much_larger, code.power_of_two(before - top), code.vector(1))
            self._raise(member, code.choose(is_much_larger, top, before), factor)
        lowered = code.vector(0) - self.largest.vector(member * LANES)
        totals = [code.variable(self.totals.vector(member * LANES)), code.variable(code.vector(0))]
        with code.loop(steps) as step:
            with code.when(member < sight.stop_member - 1):
                self._score(sight, member + 1, begin, step)
            for number, value_tiles in enumerate(self.tile_groups):
                turn = code.smaller(code.integer(number), steps - 1)
                with code.when((member > start).both(step.equals(turn))):
                    self._add_values(member - 1, steps, value_tiles)
            for place in range(LANES):
                pair = []
                for half in range(2):
                    scores = own.vector((step * STEP + half * LANES + place) * LANES)
                    weights = code.power_of_two(code.multiply_add(scores, code.vector(scale), lowered))
                    if seen is not None:  # a query that has seen nothing yet has nothing to compare with
                        weights = code.choose(scores.equals(_HIDDEN), code.vector(0), weights)
                    totals[half].set(totals[half].get() + weights)
                    pair.append(weights)
                self.registers.put_numbers(self._weights_of(member) + (step * NUMBERS + place * STEP), *pair)
        self.totals.put(member * LANES, totals[0].get() + totals[1].get())

    def _keep_higher(self, highest: Variable, scores: Value) -> None:
        highest.set(self.code.choose(scores > highest.get(), scores, highest.get()))

    def _raise(self, member: Value, largest: Value, factor: Value) -> None:
        """Make what a member has summed up relative to another score."""
        code, width = self.code, self.shape.value_dim
        self.largest.put(member * LANES, largest)
        self.totals.put(member * LANES, self.totals.vector(member * LANES) * factor)
        with code.loop(width) as place:
            target = (member * width + place) * LANES
            self.sums.put(target, self.sums.vector(target) * factor)

    def _scaled(self, products: Value) -> Value:
        """Products of queries and keys as scores to the base of 2."""
        code, shape = self.code, self.shape
        if not shape.softcap:
            return products * (shape.scaling * LOG2_E)
        # tanh(x) is 1 - 2 / (exp(2 x) + 1)
        capped = 1 - 2 / (code.exp(products * (2 * shape.scaling / shape.softcap)) + 1)
        return capped * (shape.softcap * LOG2_E)

    def _add_values(self, member: Value, steps: Value, value_tiles: range) -> None:
        self.registers.add_products(
            [self.sums + (member * self.value_tiles + tile) * (LANES * LANES) for tile in value_tiles],
            [self.upright + tile * NUMBERS for tile in value_tiles],
            self._weights_of(member),
            steps=steps,
            row_numbers=STEP if self.registers.reads_in_place else 1,
            step_numbers=self.value_tiles * NUMBERS,
            is_new=False,
        )

    def _finish(self, piece: _Piece, member: Value) -> None:
        """Divide by the sum of the weights, which a sink adds to, and store."""
        code, shape = self.code, self.shape
        largest, total = self.largest.vector(member * LANES), self.totals.vector(member * LANES)
        scale = code.vector(1)
        if shape.has_sinks:
            sinks = code.tensor(12, torch.float32) + self.head * shape.group
            for lane in range(LANES):
                head = code.smaller(piece.query_head(member, lane), code.integer(shape.group - 1))
                self.sinks[lane] = sinks[head] * LOG2_E
            sink = self.sinks.vector(0)
            top = code.maximum(largest, sink)
            scale = code.power_of_two(largest - top)
            total = total * scale + code.power_of_two(sink - top)
        factor = scale / total
        part = piece.part_of(member)
        heads_before = (piece.token + part) * shape.query_heads + self.head * shape.group
        out = code.tensor(11, shape.dtype) + heads_before * shape.value_dim
        with code.loop(self.value_tiles) as tile:
            sums = self.sums + (member * self.value_tiles + tile) * (LANES * LANES)
            rows = code.transpose([sums.vector(place * LANES) * factor for place in range(LANES)])
            for query, row in enumerate(rows):
                token, head = piece.token_of(query), piece.query_head(member, query)
                with code.when((part + token < piece.count).both(head < shape.group)):
                    out.put((token * shape.query_heads + head) * shape.value_dim + tile * LANES, row)
