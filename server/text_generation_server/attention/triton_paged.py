"""Paged attention on a GPU by Triton kernels of ours that read the cache in place, for every kind of layer.

Decode rows and prompt chunks of a step are one launch each. What launches for decode rows depend on, besides what is in
tensors, is the number of rows alone: `static_plan` makes one for CUDA graphs.

Shape legend: T tokens of the step, R decode rows, C prompt chunks, H query heads, K key/value heads, D key width, E
value width, S cache slots, U parts of all decode rows, B columns of block tables, N units of prompt chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from text_generation_server.attention.interface import LayerCache, LayerSpec, Rotation, Unsupported
from text_generation_server.attention.torch_paged import first_seen
from text_generation_server.engine.inputs import ForwardInputs
from text_generation_server.gpu_kernels import arithmetic, cache_write, paged_decode, paged_prefill, rotary
from text_generation_server.transfer import put, to_device

PROGRAMS_PER_PROCESSOR = 4
"""Programs that share the parts of decode rows, where there are parts for so many."""
STATIC_PARTS = 4096
"""Of all rows of a static plan, at most: 64 MiB for 32 heads 128 wide. A million tokens of context, and steps with more
run without a graph."""
WIDEST_HEAD = 256
"""Wider ones leave no room for a second tile of keys."""

Int32s = np.ndarray[tuple[int, ...], np.dtype[np.int32]]


@dataclass(slots=True)
class Rows:
    """What the layers of one window read for decode rows."""

    index: int
    """In X of the plan: where each row's parts begin among those of all rows."""
    num_parts: int
    """Of all rows, or room for as many."""
    most_parts: int
    """Of one row."""


@dataclass(slots=True)
class Chunks:
    """What all layers read for prompt chunks."""

    chunks_C3: Tensor
    """int32: first token among those of the chunks, length, and length of the sequence with it."""
    tables_CB: Tensor
    """int32."""
    units_N2: dict[int, Tensor]
    """By the size of query groups; int32."""


@dataclass(slots=True)
class Plan:
    num_rows: int
    """Decode rows: the first tokens of the step."""
    num_tokens: int
    """Of all rows; the step may have padding behind them."""
    slots_T: Tensor
    numbers_XR: Tensor
    """int32: the rows' contexts, then where each row's parts begin, for layers of each window."""
    tables_RB: Tensor
    """int32; unused columns are 0."""
    rows: dict[tuple[int, int], Rows]
    """By window and chunk."""
    chunks: Chunks | None
    scratch: Tensor
    """float32; what decode leaves between its two kernels, the same memory for all layers."""


class TritonPaged:
    """Raises: Unsupported where there is no GPU, or one for which the kernels cannot be compiled."""

    def __init__(
        self,
        *,
        layers: list[LayerSpec],
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        reason = arithmetic.reason_unavailable(device)
        if reason is not None:
            raise Unsupported(reason)
        if kv_dtype == torch.float8_e4m3fn and device.type == "cuda" and _capability(device) < (8, 9):
            raise Unsupported(f"{kv_dtype} needs a GPU of compute capability 8.9 or more; float8_e5m2 does not")
        if dtype not in arithmetic.FLOATS:
            raise Unsupported(f"it does not compute in {dtype}")
        widest = max(max(layer.key_dim, layer.value_dim) for layer in layers)
        if widest > WIDEST_HEAD:
            raise Unsupported(f"its heads are {widest} wide, more than {WIDEST_HEAD}")
        self.block_size = block_size
        self.dtype = dtype
        self.device = device
        self._sights = sorted({(layer.window, layer.chunk) for layer in layers})
        self._groups = sorted({layer.query_heads // layer.kv_heads for layer in layers})
        self._part_numbers = max(layer.query_heads * (layer.value_dim + 2) for layer in layers)
        """float32 numbers that one part leaves."""
        self._static_scratch = self._scratch(0)
        self._programs = PROGRAMS_PER_PROCESSOR * _processors(device)

    # -- once a step ---------------------------------------------------------------------------------------------

    def prepare(self, inputs: ForwardInputs) -> Plan:
        num_rows, num_chunks = inputs.num_decode_rows, len(inputs.query_lens) - inputs.num_decode_rows
        contexts = inputs.context_lens[:num_rows]
        rows = {sight: Rows(1 + index, *self._count(contexts, *sight)) for index, sight in enumerate(self._sights)}
        return Plan(
            num_rows=num_rows,
            num_tokens=inputs.slots_T.shape[0],
            slots_T=inputs.slots_T,
            numbers_XR=to_device(self._numbers(contexts), torch.int32, self.device),
            tables_RB=to_device(self._tables(inputs.block_tables[:num_rows], contexts), torch.int32, self.device),
            rows=rows,
            chunks=self._chunks(inputs.without_decode_rows()) if num_chunks else None,
            scratch=self._scratch(max(each.num_parts for each in rows.values())),
        )

    def static_plan(self, num_rows: int, *, max_tokens: int) -> Plan:
        rows = {}
        for index, (window, chunk) in enumerate(self._sights):
            span = min(window or chunk or max_tokens, max_tokens)
            most = min(paged_decode.num_parts(0, max_tokens), paged_decode.num_parts(0, span) + 1)
            rows[window, chunk] = Rows(1 + index, min(num_rows * most, STATIC_PARTS), most)
        num_parts = max(each.num_parts for each in rows.values())
        if self._static_scratch.shape[0] < num_parts * self._part_numbers:
            self._static_scratch = self._scratch(num_parts)
        return Plan(
            num_rows=num_rows,
            num_tokens=num_rows,
            slots_T=torch.zeros(num_rows, dtype=torch.int64, device=self.device),
            numbers_XR=torch.zeros((1 + len(rows), num_rows), dtype=torch.int32, device=self.device),
            tables_RB=torch.zeros((num_rows, -(-max_tokens // self.block_size)), dtype=torch.int32, device=self.device),
            rows=rows,
            chunks=None,
            scratch=self._static_scratch,
        )

    def update(self, plan: Plan, inputs: ForwardInputs) -> bool:
        num_rows, contexts = inputs.num_decode_rows, inputs.context_lens
        assert num_rows == len(contexts) <= plan.num_rows, "decode rows alone"
        for sight, rows in plan.rows.items():
            num_parts, most_parts = self._count(contexts, *sight)
            if num_parts > rows.num_parts or most_parts > rows.most_parts:
                return False
        tables = self._tables(inputs.block_tables, contexts)
        if tables.shape[1] > plan.tables_RB.shape[1]:
            return False
        put(self._numbers([*contexts, *[0] * (plan.num_rows - num_rows)]), plan.numbers_XR)
        put(tables, plan.tables_RB[:num_rows, : tables.shape[1]])
        plan.slots_T[:num_rows].copy_(inputs.slots_T)
        plan.slots_T[num_rows:].zero_()
        return True

    def _numbers(self, contexts: Sequence[int]) -> Int32s:
        numbers = [contexts, *(self._offsets(contexts, *sight) for sight in self._sights)]
        return np.array(numbers, dtype=np.int32)

    def _offsets(self, contexts: Sequence[int], window: int, chunk: int) -> list[int]:
        offsets, end = [], 0
        for context in contexts:
            offsets.append(end)
            end += _parts(context, window, chunk)
        return offsets

    def _count(self, contexts: Sequence[int], window: int, chunk: int) -> tuple[int, int]:
        """Parts of all rows, and of the one that has most."""
        counts = [_parts(context, window, chunk) for context in contexts]
        return sum(counts), max(counts, default=0)

    def _tables(self, block_tables: Sequence[list[int]], contexts: Sequence[int]) -> Int32s:
        widths = [-(-context // self.block_size) for context in contexts]
        tables = np.zeros((len(block_tables), max(widths, default=0)), dtype=np.int32)
        for row, (table, width) in enumerate(zip(block_tables, widths, strict=True)):
            tables[row, :width] = table[:width]
        return tables

    def _chunks(self, inputs: ForwardInputs) -> Chunks:
        starts = np.cumsum([0, *inputs.query_lens[:-1]])
        chunks = np.stack([starts, inputs.query_lens, inputs.context_lens], axis=1)
        return Chunks(
            chunks_C3=to_device(chunks, torch.int32, self.device),
            tables_CB=to_device(self._tables(inputs.block_tables, inputs.context_lens), torch.int32, self.device),
            units_N2={
                group: to_device(paged_prefill.units(inputs.query_lens, group, self.dtype), torch.int32, self.device)
                for group in self._groups
            },
        )

    def _scratch(self, num_parts: int) -> Tensor:
        return torch.empty(num_parts * self._part_numbers, dtype=torch.float32, device=self.device)

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
        rotation: Rotation | None = None,
    ) -> Tensor:
        """As `AttentionBackend.attend`; with a ``rotation``, queries and keys come as they are before it."""
        dtype, rows = query_HTD.dtype, plan.num_rows
        query_HTD, key_KTD, value_KTE = (self._readable(each) for each in (query_HTD, key_KTD, value_KTE))
        # Kernels read memory as they were told the shapes are.
        assert query_HTD.shape[::2] == (layer.query_heads, layer.key_dim)
        assert key_KTD.shape[::2] == (layer.kv_heads, layer.key_dim)
        assert value_KTE.shape[::2] == (layer.kv_heads, layer.value_dim)
        if rotation is None:
            cache_write.write(key_KTD, value_KTE, cache.keys_KSD, cache.values_KSE, plan.slots_T)
        else:
            query_HTD = rotary.rotate_and_write(
                query_HTD, key_KTD, value_KTE, rotation, cache.keys_KSD, cache.values_KSE, plan.slots_T
            )
        out_THE = query_HTD.new_empty((query_HTD.shape[1], layer.query_heads, layer.value_dim))
        if query_HTD.shape[1] > plan.num_tokens:
            out_THE[plan.num_tokens :] = 0  # not what lay there: it may be not-a-number
        if rows:
            self._decode(plan, layer, cache, query_HTD[:, :rows], out_THE, scaling, softcap, sinks_H)
        if plan.chunks is not None:
            paged_prefill.prefill(
                layer, query_HTD[:, rows:], cache.keys_KSD, cache.values_KSE, out_THE[rows:],
                units_N2=plan.chunks.units_N2[layer.query_heads // layer.kv_heads],
                chunks_C3=plan.chunks.chunks_C3,
                tables_CB=plan.chunks.tables_CB,
                block_size=self.block_size,
                scaling=scaling,
                softcap=softcap,
                sinks_H=sinks_H,
            )  # fmt: skip
        return out_THE.to(dtype)

    def _decode(
        self,
        plan: Plan,
        layer: LayerSpec,
        cache: LayerCache,
        query_HRD: Tensor,
        out_RHE: Tensor,
        scaling: float,
        softcap: float,
        sinks_H: Tensor | None,
    ) -> None:
        rows = plan.rows[layer.window, layer.chunk]
        # Parts first: whole rows of them keep the sums aligned, and kernels are compiled for what is aligned.
        parts = rows.num_parts * layer.query_heads * layer.value_dim
        sums = rows.num_parts * layer.query_heads * 2
        paged_decode.decode(
            layer, query_HRD, cache.keys_KSD, cache.values_KSE, out_RHE,
            tables_RB=plan.tables_RB,
            contexts_R=plan.numbers_XR[0],
            offsets_R=plan.numbers_XR[rows.index],
            parts_UHE=plan.scratch[:parts],
            sums_UH2=plan.scratch[parts : parts + sums],
            block_size=self.block_size,
            programs=max(1, min(rows.most_parts, -(-self._programs // (plan.num_rows * layer.kv_heads)))),
            scaling=scaling,
            softcap=softcap,
            sinks_H=sinks_H,
        )  # fmt: skip

    def _readable(self, heads: Tensor) -> Tensor:
        """Of the dtype that is computed in, and each token's numbers in one place."""
        heads = heads.to(self.dtype)
        return heads if heads.stride(2) == 1 else heads.contiguous()


def _parts(context: int, window: int, chunk: int) -> int:
    return paged_decode.num_parts(first_seen(context - 1, window, chunk), context) if context else 0


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
