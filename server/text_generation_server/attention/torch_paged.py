"""Paged attention in plain torch, for any device: the reference that every other back end is tested against.

Decode rows read whole pages and score them with two matrix products on the query group, which on a CPU is an order
of magnitude faster than a masked ``scaled_dot_product_attention`` with a query length of one. Prompt chunks go through
``scaled_dot_product_attention`` one sequence at a time, so nothing is padded.

Shape legend: T tokens of the step, R decode rows, H query heads, K key/value heads, G query heads per K, D key width,
E value width, L keys read, N queries of one prompt chunk, B blocks.
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
"""Queries of a chunk that are scored at once where a mask is needed: bounds the memory of mask and scores."""
LONE_ROWS = 2
"""Up to so many decode rows, one fused call per row beats the padded batch (23 us against 42 us for one row)."""
EVEN_ENOUGH = 4096
"""Padded keys a decode group may always hold; beyond it, rows of unlike length are grouped apart."""


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
    """int64, flat [R * B]; block 0 fills up."""
    mask_RL: Tensor
    """Added to the scores: 0 or -inf."""
    masks_by_heads: dict[int, Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class Chunk:
    """A prompt chunk: its queries are tokens ``query_start .. query_stop`` of the step, the last ones of its span."""

    query_start: int
    query_stop: int
    span: Span
    masks: dict[int, Tensor | None] = field(default_factory=dict)


@dataclass(slots=True)
class View:
    """What layers of one window read in this step."""

    lone_rows: list[tuple[int, Span]]
    decode_groups: list[DecodeGroup]
    chunks: list[Chunk]


@dataclass(slots=True)
class Plan:
    slots_T: Tensor
    num_decode_rows: int
    num_tokens: int
    views: dict[tuple[int, int], View]


class TorchPaged:
    def __init__(self, *, layers: list[LayerSpec], block_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.block_size = block_size
        self.dtype = dtype
        self.device = device
        self.sights = sorted({(layer.window, layer.chunk) for layer in layers})

    # -- once a step ---------------------------------------------------------------------------------------------

    def prepare(self, inputs: ForwardInputs) -> Plan:
        return Plan(
            slots_T=inputs.slots_T,
            num_decode_rows=inputs.num_decode_rows,
            num_tokens=inputs.num_tokens,
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
        if num_decode <= LONE_ROWS:
            return View(list(enumerate(spans[:num_decode])), [], chunks)
        return View([], self._decode_groups(spans[:num_decode]), chunks)

    def _span(self, table: list[int], stop: int, start: int) -> Span:
        first, last = start // self.block_size, -(-stop // self.block_size)
        blocks = table[first:last]
        offset = start - first * self.block_size
        consecutive = all(right - left == 1 for left, right in itertools.pairwise(blocks))
        return Span(start, stop, offset, blocks, blocks[0] * self.block_size + offset if consecutive else None)

    def _decode_groups(self, spans: list[Span]) -> list[DecodeGroup]:
        rows = list(range(len(spans)))
        longest = max(len(span.blocks) for span in spans)
        if len(spans) * longest * self.block_size <= EVEN_ENOUGH:
            return [self._decode_group(None, spans)]
        by_size: dict[int, list[int]] = {}
        for row in rows:  # groups whose longest is at most twice the shortest: half of what is read is real
            by_size.setdefault(len(spans[row].blocks).bit_length(), []).append(row)
        if len(by_size) == 1:
            return [self._decode_group(None, spans)]
        return [self._decode_group(group, [spans[row] for row in group]) for group in by_size.values()]

    def _decode_group(self, rows: list[int] | None, spans: list[Span]) -> DecodeGroup:
        width = max(len(span.blocks) for span in spans)
        block_ids = [block for span in spans for block in (*span.blocks, *[0] * (width - len(span.blocks)))]
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
        cache.keys_KSD.index_copy_(1, plan.slots_T, key_KTD)
        cache.values_KSE.index_copy_(1, plan.slots_T, value_KTE)
        view = plan.views[layer.window, layer.chunk]
        scores = Scores(scaling, softcap, sinks_H)
        if not view.chunks and len(view.decode_groups) == 1:
            return self._decode(view.decode_groups[0], cache, query_HTD, scores)
        if not view.chunks and plan.num_tokens == 1:
            keys, values = self._read(cache, view.lone_rows[0][1])
            return scores.lone(query_HTD, keys, values)
        out_THE = query_HTD.new_empty((plan.num_tokens, query_HTD.shape[0], value_KTE.shape[2]))
        for row, span in view.lone_rows:
            keys, values = self._read(cache, span)
            out_THE[row : row + 1] = scores.lone(query_HTD[:, row : row + 1], keys, values)
        for group in view.decode_groups:
            rows = slice(0, group.num_rows) if group.rows is None else group.rows
            out_THE[rows] = self._decode(group, cache, query_HTD[:, rows], scores)
        for chunk in view.chunks:
            tokens = slice(chunk.query_start, chunk.query_stop)
            fresh = chunk.span.stop - chunk.span.start == chunk.query_stop - chunk.query_start
            if fresh:  # nothing before the chunk is seen: its keys need not be read back
                keys, values = key_KTD[:, tokens], value_KTE[:, tokens]
            else:
                keys, values = self._read(cache, chunk.span)
            self._prefill(layer, chunk, query_HTD[:, tokens], keys, values, scores, out_THE[tokens])
        return out_THE

    def _read(self, cache: LayerCache, span: Span) -> tuple[Tensor, Tensor]:
        """The span's keys and values, [K, L, D] and [K, L, E]."""
        length = span.stop - span.start
        if span.first_slot is not None:
            slots = slice(span.first_slot, span.first_slot + length)
            return cache.keys_KSD[:, slots], cache.values_KSE[:, slots]
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
        pages = cache_KSD.view(num_heads, num_slots // self.block_size, self.block_size * width)
        return pages.index_select(1, block_ids_B).view(num_heads, -1, width)

    def _decode(self, group: DecodeGroup, cache: LayerCache, query_HRD: Tensor, scores: Scores) -> Tensor:
        num_heads, num_rows, width = query_HRD.shape
        kv_heads = cache.keys_KSD.shape[0]
        pairs, heads_each = kv_heads * num_rows, num_heads // kv_heads
        # Every (kv head, row) pair is one small matrix product over the row's keys: [G, D] x [D, L].
        query = query_HRD.view(kv_heads, heads_each, num_rows, width).transpose(1, 2).reshape(pairs, heads_each, width)
        keys = self._pages(cache.keys_KSD, group.block_ids_RB).view(pairs, -1, width)
        values = self._pages(cache.values_KSE, group.block_ids_RB).view(pairs, -1, cache.values_KSE.shape[2])
        mask = group.masks_by_heads.get(kv_heads)
        if mask is None:
            mask = group.mask_RL.expand(kv_heads, -1, -1).reshape(pairs, 1, -1)
            group.masks_by_heads[kv_heads] = mask
        if scores.plain:
            weights = torch.baddbmm(mask, query, keys.transpose(1, 2), alpha=scores.scaling)
            weights = torch.softmax(weights, -1, dtype=torch.float32).to(query.dtype)
        else:
            sinks = None
            if scores.sinks_H is not None:
                sinks = scores.sinks_H.view(kv_heads, 1, heads_each, 1).expand(-1, num_rows, -1, -1)
                sinks = sinks.reshape(pairs, heads_each, 1)
            weights = scores.weights(torch.bmm(query, keys.transpose(1, 2)), mask, sinks)
        out = torch.bmm(weights, values).view(kv_heads, num_rows, heads_each, -1)
        return out.transpose(0, 1).reshape(num_rows, num_heads, -1).contiguous()  # some models take a view of it

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
        """Attend causally from the chunk's queries, which are the last N of the L keys; fills ``out_NHE``."""
        num_queries, num_keys = query_HND.shape[1], keys_KLD.shape[1]
        limited = 0 < layer.window < num_keys or layer.chunk > 0
        if scores.plain and num_queries == num_keys and not limited and keys_KLD.shape[2] == values_KLE.shape[2]:
            out_NHE.copy_(scores.fused(query_HND, keys_KLD, values_KLE, mask=None, is_causal=True).transpose(0, 1))
            return
        for first in range(0, num_queries, QUERY_BLOCK):
            last = min(first + QUERY_BLOCK, num_queries)
            stop = num_keys - num_queries + last  # keys after the block's last query are hidden from all of it
            mask_NL = self._mask(layer, chunk, first, last, stop)
            queries, keys, values = query_HND[:, first:last], keys_KLD[:, :stop], values_KLE[:, :stop]
            attended = (scores.fused if scores.plain else scores.explicit)(queries, keys, values, mask_NL)
            out_NHE[first:last] = attended.transpose(0, 1)

    def _mask(self, layer: LayerSpec, chunk: Chunk, first: int, last: int, stop: int) -> Tensor:
        """Additive mask of queries ``first .. last`` of a chunk over the first ``stop`` keys of its span; [N, L]."""
        cached = chunk.masks.get(first)
        if cached is not None:
            return cached
        span = chunk.span
        position_of_first = span.stop - (chunk.query_stop - chunk.query_start)
        query_N1 = torch.arange(position_of_first + first, position_of_first + last, device=self.device)[:, None]
        key_L = torch.arange(span.start, span.start + stop, device=self.device)
        hidden = key_L > query_N1
        if layer.window:
            hidden |= key_L <= query_N1 - layer.window
        if layer.chunk:
            hidden |= key_L // layer.chunk != query_N1 // layer.chunk
        mask = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device).masked_fill_(hidden, -math.inf)
        if chunk.query_stop - chunk.query_start <= QUERY_BLOCK:  # shared by the layers; of long chunks it is too much
            chunk.masks[first] = mask
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
        if self.plain:
            query_KGD = query_H1D.reshape(kv_heads, -1, width)
            out = F.scaled_dot_product_attention(query_KGD[None], keys_KLD[None], values_KLE[None], scale=self.scaling)
        else:
            out = self.explicit(query_H1D, keys_KLD, values_KLE, None)
        return out.reshape(1, query_H1D.shape[0], -1).contiguous()

    def explicit(self, query_HND: Tensor, keys_KLD: Tensor, values_KLE: Tensor, mask: Tensor | None) -> Tensor:
        """Attention with the scores in the open, for what the fused kernel cannot do; [H, N, E]."""
        kv_heads, num_heads = keys_KLD.shape[0], query_HND.shape[0]
        query = query_HND.reshape(kv_heads, num_heads // kv_heads, -1, query_HND.shape[2])
        sinks = None if self.sinks_H is None else self.sinks_H.view(kv_heads, -1, 1, 1)
        weights = self.weights(query @ keys_KLD[:, None].transpose(2, 3), mask, sinks)
        return (weights @ values_KLE[:, None]).view(num_heads, -1, values_KLE.shape[2])

    def weights(self, products: Tensor, mask: Tensor | None, sinks: Tensor | None) -> Tensor:
        """Products of queries and keys [..., L] -> attention weights in their dtype. ``sinks`` has 1 in place of L."""
        scores = products.float() * self.scaling
        if self.softcap:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if mask is not None:
            scores = scores + mask
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
