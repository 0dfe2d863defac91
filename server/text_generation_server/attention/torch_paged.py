"""Paged attention in plain torch, for any device: the reference that every other back end is tested against.

Decode rows copy whole pages to one place and attend to them there: each key/value head of a row is one small attention
problem whose queries are its query group. Prompt chunks go through ``scaled_dot_product_attention`` one sequence at a
time: none is padded to the length of another.

Shape legend: T tokens of the step, R decode rows, H query heads, K key/value heads, G query heads per K, P pairs of a
row and a key/value head, D key width, E value width, L keys read, N queries of one prompt chunk, B blocks.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from text_generation_server.attention.interface import LayerCache, LayerSpec
from text_generation_server.engine.inputs import ForwardInputs

QUERY_BLOCK = 512
"""Queries of a chunk that are scored at once where a mask is needed, at most."""
SCORE_BYTES = 64 * 2**20
"""The scores of these queries, or their mask where scores are never written out, unless a single query has more."""
EXPLICIT_BYTES = 12
"""Of one score where all are written out: the product, in float32, as a weight, and that in the model's own dtype."""
MASK_BYTES = 64 * 2**20
"""Masks of a step's chunks that its layers share, at most; others are made again in every layer."""
CHUNK_TILE = 64
"""To a multiple of this, queries and keys of a chunk are filled up where torch's attention keeps a compiled kernel for
each pair of lengths: on a CPU in bfloat16. Measured: 190 KB for each pair, for good."""
EVEN_ENOUGH = 4096
"""Padded keys a decode group may always hold; beyond it, rows of unlike length are grouped apart."""
GATHERED_BYTES = 64 * 2**20
"""Keys and values of one layer copied for a decode group, and its scores, at most, unless a single row has more."""
SCRATCH_BYTES = SCORE_BYTES + MASK_BYTES + GATHERED_BYTES
"""What attention holds beside its result, without what a single row has more: copies of its keys and values are as
large as what the cache holds of it in one layer."""


@dataclass(slots=True)
class Span:
    """The keys a row reads: positions ``start .. stop``, which begin ``offset`` into its first block."""

    start: int
    stop: int
    offset: int
    blocks: list[int]
    first_slot: int | None
    """Where the keys start in the cache if the blocks lie one after another: then they are a view, not a copy."""
    block_ids_B: Tensor | None = None


@dataclass(slots=True)
class DecodeGroup:
    """Decode rows of like length, padded to the longest."""

    rows: Tensor | None
    """int64 indices into the step's rows; None when they are the first ``num_rows``, in order."""
    num_rows: int
    block_ids_RB: Tensor
    """int64; block 0 fills up."""
    mask_RL: Tensor
    """Added to the scores: 0 or -inf."""
    pages_by_heads: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Number of key/value heads -> what `pages` made for it: layers of one model seldom differ."""

    def pages(self, kv_heads: int, num_blocks: int) -> tuple[Tensor, Tensor]:
        """Of a cache seen as [K * blocks, block]: the blocks of all pairs, flat [P * B], and the mask, [P, 1, L]."""
        made = self.pages_by_heads.get(kv_heads)
        if made is None:
            first_K1 = torch.arange(kv_heads, device=self.block_ids_RB.device)[:, None] * num_blocks
            block_ids = (self.block_ids_RB[:, None] + first_K1).flatten()
            made = block_ids, self.mask_RL.repeat_interleave(kv_heads, 0)[:, None]
            self.pages_by_heads[kv_heads] = made
        return made


@dataclass(slots=True)
class Chunk:
    """A prompt chunk: its queries are tokens ``query_start .. query_stop`` of the step, the last ones of its span."""

    query_start: int
    query_stop: int
    span: Span
    masks: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """By the first of the queries and their number."""


@dataclass(slots=True)
class View:
    """What layers of one window read in this step."""

    lone_row: Span | None
    """The only decode row, if there is one: its keys are read where they are if they lie together."""
    decode_groups: list[DecodeGroup]
    chunks: list[Chunk]


@dataclass(slots=True)
class Plan:
    slots_T: Tensor
    num_tokens: int
    """Of the rows; the step may have padding behind them."""
    views: dict[tuple[int, int], View]


class TorchPaged:
    def __init__(
        self,
        *,
        layers: list[LayerSpec],
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        self.block_size = block_size
        self.dtype = dtype
        self.device = device
        self.sights = sorted({(layer.window, layer.chunk) for layer in layers})
        token_bytes = max(
            layer.kv_heads * (layer.key_dim + layer.value_dim) * dtype.itemsize + layer.query_heads * EXPLICIT_BYTES
            for layer in layers
        )
        self.gathered_blocks = max(1, GATHERED_BYTES // (token_bytes * block_size))
        self.tile = CHUNK_TILE if device.type == "cpu" and dtype != torch.float32 else 1
        self._kv_dtype = kv_dtype or dtype
        self._gathered = [as_bytes(torch.empty(0, dtype=self._kv_dtype, device=device)) for _ in range(2)]
        self._mask_bytes = 0  # that chunks of the running step hold

    # -- once a step ---------------------------------------------------------------------------------------------

    def prepare(self, inputs: ForwardInputs) -> Plan:
        self._mask_bytes = 0
        return Plan(
            slots_T=inputs.slots_T,
            num_tokens=inputs.slots_T.shape[0],
            views={(window, chunk): self._view(inputs, window, chunk) for window, chunk in self.sights},
        )

    def _view(self, inputs: ForwardInputs, window: int, chunk: int) -> View:
        num_decode = inputs.num_decode_rows
        spans = [
            self._span(table, context, first_seen(context - query, window, chunk))
            for table, context, query in zip(inputs.block_tables, inputs.context_lens, inputs.query_lens, strict=True)
        ]
        chunks = []
        start = num_decode
        for span, query_len in zip(spans[num_decode:], inputs.query_lens[num_decode:], strict=True):
            chunks.append(Chunk(query_start=start, query_stop=start + query_len, span=span))
            start += query_len
        if num_decode == 1:
            return View(spans[0], [], chunks)
        return View(None, self._decode_groups(spans[:num_decode]), chunks)

    def _span(self, table: list[int], stop: int, start: int) -> Span:
        first, last = start // self.block_size, -(-stop // self.block_size)
        blocks = table[first:last]
        offset = start - first * self.block_size
        consecutive = all(right - left == 1 for left, right in itertools.pairwise(blocks))
        return Span(start, stop, offset, blocks, blocks[0] * self.block_size + offset if consecutive else None)

    def _decode_groups(self, spans: list[Span]) -> list[DecodeGroup]:
        by_size: dict[int, list[int]] = {}
        longest = max((len(span.blocks) for span in spans), default=0)
        even = len(spans) * longest * self.block_size <= EVEN_ENOUGH
        for row, span in enumerate(spans):
            # The longest of a group is at most twice the shortest: half of what is read is real.
            by_size.setdefault(0 if even else len(span.blocks).bit_length(), []).append(row)
        parts: list[list[int]] = []
        for rows in by_size.values():
            size = max(1, self.gathered_blocks // max(len(spans[row].blocks) for row in rows))
            parts += [rows[first : first + size] for first in range(0, len(rows), size)]
        if len(parts) == 1:
            return [self._decode_group(None, spans)]
        return [self._decode_group(rows, [spans[row] for row in rows]) for rows in parts]

    def _decode_group(self, rows: list[int] | None, spans: list[Span]) -> DecodeGroup:
        width = max(len(span.blocks) for span in spans)
        block_ids = [[*span.blocks, *[0] * (width - len(span.blocks))] for span in spans]
        key_L = torch.arange(width * self.block_size)
        first_R1 = torch.tensor([[span.offset] for span in spans])
        stop_R1 = torch.tensor([[span.offset + span.stop - span.start] for span in spans])
        hidden_RL = (key_L < first_R1) | (key_L >= stop_R1)
        mask_RL = torch.zeros(hidden_RL.shape, dtype=self.dtype).masked_fill_(hidden_RL, -math.inf)
        return DecodeGroup(
            rows=None if rows is None else torch.tensor(rows, device=self.device),
            num_rows=len(spans),
            block_ids_RB=torch.tensor(block_ids, device=self.device),
            mask_RL=mask_RL.to(self.device),
        )

    # -- once a layer --------------------------------------------------------------------------------------------

    def attend(
        self,
        plan: Plan,
        layer: LayerSpec,
        cache: LayerCache,
        query_HTD: Tensor,
        key_KTD: Tensor,
        value_KTE: Tensor,
        *,
        scaling: float,
        softcap: float = 0.0,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        num_heads, num_tokens, _ = query_HTD.shape
        is_padded = num_tokens > plan.num_tokens
        if is_padded:
            key_KTD, value_KTE = key_KTD[:, : plan.num_tokens], value_KTE[:, : plan.num_tokens]
        if self._kv_dtype != self.dtype:
            key_KTD, value_KTE = (converted(each, self._kv_dtype) for each in (key_KTD, value_KTE))
        as_bytes(cache.keys_KSD).index_copy_(1, plan.slots_T, as_bytes(key_KTD))
        as_bytes(cache.values_KSE).index_copy_(1, plan.slots_T, as_bytes(value_KTE))
        view = plan.views[layer.window, layer.chunk]
        scores = Scores(scaling, softcap, sinks_H)
        if not view.chunks and not is_padded:
            if view.lone_row is not None:
                return scores.lone(query_HTD, *self._read(cache, view.lone_row))
            if len(view.decode_groups) == 1:
                return self._decode(view.decode_groups[0], cache, query_HTD, scores)
        out_THE = query_HTD.new_empty((num_tokens, num_heads, value_KTE.shape[2]))
        out_THE[plan.num_tokens :] = 0  # not what lay there: it may be not-a-number
        if view.lone_row is not None:
            out_THE[:1] = scores.lone(query_HTD[:, :1], *self._read(cache, view.lone_row))
        for group in view.decode_groups:
            rows = slice(0, group.num_rows) if group.rows is None else group.rows
            out_THE[rows] = self._decode(group, cache, query_HTD[:, rows], scores)
        for chunk in view.chunks:
            tokens = slice(chunk.query_start, chunk.query_stop)
            fresh = chunk.span.stop - chunk.span.start == chunk.query_stop - chunk.query_start
            if fresh:  # nothing before the chunk is seen: its keys need not be read back
                keys, values = key_KTD[:, tokens].to(self.dtype), value_KTE[:, tokens].to(self.dtype)
            else:
                keys, values = self._read(cache, chunk.span)
            self._prefill(layer, chunk, query_HTD[:, tokens], keys, values, scores, out_THE[tokens])
        return out_THE

    def _read(self, cache: LayerCache, span: Span) -> tuple[Tensor, Tensor]:
        """The span's keys and values, [K, L, D] and [K, L, E]."""
        length = span.stop - span.start
        if span.first_slot is not None:
            slots = slice(span.first_slot, span.first_slot + length)
            return cache.keys_KSD[:, slots].to(self.dtype), cache.values_KSE[:, slots].to(self.dtype)
        if span.block_ids_B is None:
            span.block_ids_B = torch.tensor(span.blocks, device=self.device)
        slots = slice(span.offset, span.offset + length)
        return (
            self._pages(cache.keys_KSD, span.block_ids_B)[:, slots],
            self._pages(cache.values_KSE, span.block_ids_B)[:, slots],
        )

    def _pages(self, cache_KSD: Tensor, block_ids_B: Tensor) -> Tensor:
        """Whole blocks, copied one after another: [K, B * block_size, D]."""
        num_heads, num_slots, width = cache_KSD.shape
        pages = as_bytes(cache_KSD).view(num_heads, num_slots // self.block_size, self.block_size * width)
        copied = pages.index_select(1, block_ids_B).view(cache_KSD.dtype)
        return copied.view(num_heads, -1, width).to(self.dtype)

    def _gather(self, place: int, cache_KSD: Tensor, block_ids_PB: Tensor) -> Tensor:
        """Copy the blocks of all pairs one after another, into memory that is used again: [P * L, D].

        The first dimension is the one along which torch copies in parallel.
        """
        pages = as_bytes(cache_KSD).view(-1, self.block_size * cache_KSD.shape[2])
        size = block_ids_PB.shape[0] * pages.shape[1]
        if self._gathered[place].shape[0] < size:
            self._gathered[place] = pages.new_empty(size)
        out = self._gathered[place][:size].view(-1, pages.shape[1])
        copied = torch.index_select(pages, 0, block_ids_PB, out=out).view(cache_KSD.dtype)
        return copied.view(-1, cache_KSD.shape[2]).to(self.dtype)

    def _decode(self, group: DecodeGroup, cache: LayerCache, query_HRD: Tensor, scores: Scores) -> Tensor:
        num_heads, num_rows, width = query_HRD.shape
        kv_heads, num_slots, _ = cache.keys_KSD.shape
        pairs = num_rows * kv_heads
        block_ids_PB, mask_P1L = group.pages(kv_heads, num_slots // self.block_size)
        query_PGD = query_HRD.transpose(0, 1).reshape(pairs, -1, width)
        keys_PLD = self._gather(0, cache.keys_KSD, block_ids_PB).view(pairs, -1, width)
        values_PLE = self._gather(1, cache.values_KSE, block_ids_PB).view(pairs, keys_PLD.shape[1], -1)
        out_PGE = scores.decode(query_PGD, keys_PLD, values_PLE, mask_P1L)
        return out_PGE.reshape(num_rows, num_heads, -1)

    def _prefill(
        self,
        layer: LayerSpec,
        chunk: Chunk,
        query_HND: Tensor,
        keys_KLD: Tensor,
        values_KLE: Tensor,
        scores: Scores,
        out_NHE: Tensor,
    ) -> None:
        """Attend causally from the chunk's queries, which are the last N of the L keys; fills ``out_NHE``.

        Keys are filled up at the end, where causality hides them; queries too, and those results are dropped. So is
        what keys or values are narrower: torch's attention holds no scores only where both have one width.
        """
        num_queries, num_keys, num_values = query_HND.shape[1], keys_KLD.shape[1], values_KLE.shape[2]
        limited = 0 < layer.window < num_keys or layer.chunk > 0
        width = max(keys_KLD.shape[2], num_values)
        query_HND = self._filled(query_HND, width)
        keys_KLD, values_KLE = self._filled(keys_KLD, width), self._filled(values_KLE, width)
        if scores.plain and num_queries == num_keys and not limited:
            attended = scores.fused(query_HND, keys_KLD, values_KLE, mask=None, is_causal=True)
            out_NHE.copy_(attended[:, :num_queries, :num_values].transpose(0, 1))
            return
        block = self._query_block(layer, scores, num_keys)
        for first in range(0, num_queries, block):
            last = min(first + block, num_queries)
            queries = query_HND[:, first : first + block]
            stop = self._full(num_keys - num_queries + last)  # later keys are hidden from all of the block
            keys, values = keys_KLD[:, :stop], values_KLE[:, :stop]
            mask_NL = self._mask(layer, chunk, first, queries.shape[1], stop)
            attended = (scores.fused if scores.plain else scores.explicit)(queries, keys, values, mask_NL)
            out_NHE[first:last] = attended[:, : last - first, :num_values].transpose(0, 1)

    def _query_block(self, layer: LayerSpec, scores: Scores, num_keys: int) -> int:
        """How many queries of a chunk are scored at once: whole tiles, if as many fit."""
        bytes_per_pair = layer.query_heads * EXPLICIT_BYTES
        if scores.plain:
            bytes_per_pair = self.dtype.itemsize + 2  # the mask, and what it is made of
        fitting = max(1, SCORE_BYTES // (bytes_per_pair * num_keys))
        return min(QUERY_BLOCK, fitting // self.tile * self.tile or fitting)

    def _full(self, length: int) -> int:
        return -(-length // self.tile) * self.tile

    def _filled(self, tensor_KLD: Tensor, width: int) -> Tensor:
        """With zeros behind, to whole tiles and to ``width``."""
        missing = (width - tensor_KLD.shape[2], -tensor_KLD.shape[1] % self.tile)
        return F.pad(tensor_KLD, (0, missing[0], 0, missing[1])) if any(missing) else tensor_KLD

    def _mask(self, layer: LayerSpec, chunk: Chunk, first: int, count: int, stop: int) -> Tensor:
        """Additive mask of ``count`` queries of a chunk from ``first`` on, over the first ``stop`` keys; [N, L]."""
        cached = chunk.masks.get((first, count))
        if cached is not None:
            return cached
        span = chunk.span
        position_of_first = span.stop - (chunk.query_stop - chunk.query_start)
        query_N1 = position_of_first + first + torch.arange(count, device=self.device)[:, None]
        key_L = torch.arange(span.start, span.start + stop, device=self.device)
        hidden = key_L > query_N1
        if layer.window:
            hidden |= key_L <= query_N1 - layer.window
        if layer.chunk:
            hidden |= key_L // layer.chunk != query_N1 // layer.chunk
        mask = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device).masked_fill_(hidden, -math.inf)
        if self._mask_bytes + mask.nbytes <= MASK_BYTES:
            self._mask_bytes += mask.nbytes
            chunk.masks[first, count] = mask
        return mask


@dataclass(slots=True)
class Scores:
    """How scores become weights in one layer."""

    scaling: float
    softcap: float
    sinks_H: Tensor | None

    @property
    def plain(self) -> bool:
        return self.softcap == 0 and self.sinks_H is None

    def fused(
        self, query_HND: Tensor, keys_KLD: Tensor, values_KLE: Tensor, mask: Tensor | None, *, is_causal: bool = False
    ) -> Tensor:
        """Torch's own attention; [H, N, E]."""
        return F.scaled_dot_product_attention(
            query_HND[None],
            keys_KLD[None],
            values_KLE[None],
            attn_mask=mask,
            is_causal=is_causal,
            scale=self.scaling,
            enable_gqa=query_HND.shape[0] != keys_KLD.shape[0],
        )[0]

    def lone(self, query_H1D: Tensor, keys_KLD: Tensor, values_KLE: Tensor) -> Tensor:
        """One query that sees all its keys; [1, H, E]. The group goes into the length dimension: no key is repeated."""
        kv_heads, _, width = keys_KLD.shape
        if self.plain and keys_KLD.shape[2] == values_KLE.shape[2]:
            query_KGD = query_H1D.reshape(kv_heads, -1, width)
            out = F.scaled_dot_product_attention(query_KGD[None], keys_KLD[None], values_KLE[None], scale=self.scaling)
        else:
            out = self.explicit(query_H1D, keys_KLD, values_KLE, None)
        return out.reshape(1, query_H1D.shape[0], -1).contiguous()

    def decode(self, query_PGD: Tensor, keys_PLD: Tensor, values_PLE: Tensor, mask_P1L: Tensor) -> Tensor:
        """One query group per pair; [P, G, E]."""
        if self.plain and keys_PLD.shape[2] == values_PLE.shape[2]:
            return F.scaled_dot_product_attention(
                query_PGD[:, None], keys_PLD[:, None], values_PLE[:, None], mask_P1L[:, None], scale=self.scaling
            )[:, 0]
        sinks = None
        if self.sinks_H is not None:
            sinks = self.sinks_H.view(-1, query_PGD.shape[1], 1)
            sinks = sinks.repeat(query_PGD.shape[0] // sinks.shape[0], 1, 1)
        return torch.bmm(self.weights(torch.bmm(query_PGD, keys_PLD.transpose(1, 2)), mask_P1L, sinks), values_PLE)

    def explicit(self, query_HND: Tensor, keys_KLD: Tensor, values_KLE: Tensor, mask: Tensor | None) -> Tensor:
        """Attention with the scores in the open, for what the fused kernel cannot do; [H, N, E].

        The query group goes into the length dimension here too: no key is repeated.
        """
        num_heads, num_queries, width = query_HND.shape
        kv_heads, num_keys, _ = keys_KLD.shape
        products = torch.bmm(query_HND.reshape(kv_heads, -1, width), keys_KLD.transpose(1, 2))
        sinks = None if self.sinks_H is None else self.sinks_H.view(kv_heads, -1, 1, 1)
        weights = self.weights(products.view(kv_heads, -1, num_queries, num_keys), mask, sinks)
        return torch.bmm(weights.view(kv_heads, -1, num_keys), values_KLE).view(num_heads, num_queries, -1)

    def weights(self, products: Tensor, mask: Tensor | None, sinks: Tensor | None) -> Tensor:
        """Products of queries and keys [..., L] -> attention weights in their dtype. ``sinks`` has 1 in place of L."""
        scores = products.float().mul_(self.scaling)  # in place, here and below: there are many of them
        if self.softcap:
            scores.div_(self.softcap).tanh_().mul_(self.softcap)
        if mask is not None:
            scores.add_(mask)
        if sinks is not None:
            scores = torch.cat((scores, sinks.float().expand(*scores.shape[:-1], 1)), -1)
        weights = torch.softmax(scores, -1).to(products.dtype)
        return weights if sinks is None else weights[..., :-1]


def first_seen(position: int, window: int, chunk: int) -> int:
    """The first position that a query at ``position`` sees."""
    if window:
        return max(0, position - window + 1)
    if chunk:
        return position // chunk * chunk
    return 0


def converted(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """In a narrower number format; beyond its largest number is its largest number, and not-a-number stays."""
    largest = torch.finfo(dtype).max
    return numbers.clamp(-largest, largest).to(dtype)


def as_bytes(numbers: Tensor) -> Tensor:
    """A view that torch can copy by index: of numbers of 8 bits it cannot."""
    return numbers.view(torch.uint8) if numbers.dtype.itemsize == 1 else numbers
