"""Paged attention on a processor by kernels that read the cache in place. Prompt chunks are torch's where the dtype is
another than bfloat16, or heads are not what the kernel for chunks knows.

Shape legend: T tokens of the step, R decode rows, H query heads, K key/value heads, D key width, E value width, S cache
slots.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from text_generation_server.attention.interface import LayerCache, LayerSpec, Unsupported
from text_generation_server.attention.torch_paged import Plan as TorchPlan
from text_generation_server.attention.torch_paged import TorchPaged, first_seen
from text_generation_server.cpu_kernels import cache_write, compiler, decode_attention, prefill_attention
from text_generation_server.cpu_kernels.compiler import Launch
from text_generation_server.cpu_kernels.decode_attention import DecodeAttention, Rows, Shape
from text_generation_server.cpu_kernels.prefill_attention import Chunks, PrefillAttention
from text_generation_server.engine.inputs import ForwardInputs


@dataclass(slots=True)
class Plan:
    num_rows: int
    """Decode rows: the first tokens of the step."""
    num_tokens: int
    """Of all rows; the step may have padding behind them."""
    slots_T: Tensor
    rows: dict[tuple[int, int], Rows]
    """By window and chunk."""
    chunks: dict[int, Chunks]
    """Prompt chunks, by the number of query heads that share a key/value head."""
    torch_plan: TorchPlan | None
    """Of prompt chunks where there is no kernel for them."""


@dataclass(frozen=True, slots=True)
class _Kernels:
    """Of layers of one kind."""

    decode: DecodeAttention
    prefill: PrefillAttention | None
    """None: prompt chunks are torch's."""


class LlvmPaged:
    """Raises: Unsupported where the kernel cannot be compiled, or does not know what the layers want."""

    def __init__(
        self,
        *,
        layers: list[LayerSpec],
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        if device.type != "cpu":
            raise Unsupported(f"it is for processors, not for {device.type}")
        if kv_dtype not in (None, dtype):
            raise Unsupported(f"it does not compute in {dtype} from a cache in {kv_dtype}")
        reason = compiler.reason_unavailable()
        if reason is not None:
            raise Unsupported(reason)
        for layer in layers:
            if not decode_attention.supports(layer.key_dim, layer.value_dim, block_size, dtype):
                raise Unsupported(
                    f"heads {layer.key_dim} and {layer.value_dim} wide in blocks of {block_size} tokens are not "
                    "multiples of 16"
                )
        self.block_size = block_size
        self.dtype = dtype
        self._sights = sorted({(layer.window, layer.chunk) for layer in layers})
        self._groups: dict[int, int] = {}
        """Query heads that share a key/value head -> the fewest of these in a layer."""
        for layer in layers:
            group = layer.query_heads // layer.kv_heads
            self._groups[group] = min(layer.kv_heads, self._groups.get(group, layer.kv_heads))
        has_kernel = all(
            prefill_attention.supports(
                layer.query_heads // layer.kv_heads, layer.key_dim, layer.value_dim, block_size, dtype
            )
            for layer in layers
        )
        self._torch = (
            None if has_kernel else TorchPaged(layers=layers, block_size=block_size, dtype=dtype, device=device)
        )
        self._kernels: dict[tuple[LayerSpec, float, float, bool], _Kernels] = {}
        self._kept: dict[Hashable, Tensor] = {}
        """Memory of plans, by its use."""

    def prepare(self, inputs: ForwardInputs) -> Plan:
        num_rows = inputs.num_decode_rows
        plan = Plan(
            num_rows=num_rows,
            num_tokens=inputs.slots_T.shape[0],
            slots_T=self._keep("slots", inputs.slots_T),
            rows={sight: self._rows(inputs, *sight) for sight in self._sights if num_rows},
            chunks={},
            torch_plan=None,
        )
        if len(inputs.query_lens) > num_rows:
            chunks = inputs.without_decode_rows()
            if self._torch is not None:
                plan.torch_plan = self._torch.prepare(chunks)
            else:
                plan.chunks = {
                    group: prefill_attention.plan_chunks(
                        chunks.block_tables, chunks.query_lens, chunks.context_lens, self.block_size, group, kv_heads
                    )
                    for group, kv_heads in self._groups.items()
                }
        return plan

    def _rows(self, inputs: ForwardInputs, window: int, chunk: int) -> Rows:
        stops = inputs.context_lens[: inputs.num_decode_rows]
        firsts = [first_seen(stop - 1, window, chunk) for stop in stops]
        rows = decode_attention.plan_rows(inputs.block_tables[: len(stops)], firsts, stops, self.block_size)
        parts_U5 = self._keep(("parts", window, chunk), rows.parts_U5)
        return Rows(parts_U5, self._keep(("tables", window, chunk), rows.tables_RB))

    def _keep(self, use: Hashable, numbers: Tensor) -> Tensor:
        """The same numbers, where those of the step before lie if there is room: who knows the place knows them."""
        memory = self._kept.get(use)
        if memory is None or memory.numel() < numbers.numel():
            memory = self._kept[use] = numbers.new_empty(2 * numbers.numel())
        return memory[: numbers.numel()].view(numbers.shape).copy_(numbers)

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
        rows, dtype = plan.num_rows, query_HTD.dtype
        query_HTD, key_KTD, value_KTE = (self._readable(each) for each in (query_HTD, key_KTD, value_KTE))
        # Kernels read memory as they were told the shapes are.
        assert query_HTD.shape[::2] == (layer.query_heads, layer.key_dim)
        assert key_KTD.shape[::2] == (layer.kv_heads, layer.key_dim)
        assert value_KTE.shape[::2] == (layer.kv_heads, layer.value_dim)
        out_THE = query_HTD.new_empty((query_HTD.shape[1], layer.query_heads, layer.value_dim))
        if query_HTD.shape[1] > plan.num_tokens:
            out_THE[plan.num_tokens :] = 0  # not what lay there: it may be not-a-number
        sight = layer.window, layer.chunk
        kernels = self._kernels_of(layer, scaling, softcap, has_sinks=sinks_H is not None)
        sinks_H = None if sinks_H is None else sinks_H.float().contiguous()
        if rows:
            kernels.decode(
                plan.rows[sight], plan.slots_T, query_HTD, key_KTD, value_KTE, cache.keys_KSD, cache.values_KSE,
                out_THE, sinks_H,
            )  # fmt: skip
        if plan.torch_plan is not None:
            assert self._torch is not None
            out_THE[rows:] = self._torch.attend(
                plan.torch_plan, layer, cache, query_HTD[:, rows:], key_KTD[:, rows:], value_KTE[:, rows:],
                scaling=scaling, softcap=softcap, sinks_H=sinks_H,
            )  # fmt: skip
        elif plan.chunks:
            cache_write.write(key_KTD[:, rows:], cache.keys_KSD, plan.slots_T[rows:])
            cache_write.write(value_KTE[:, rows:], cache.values_KSE, plan.slots_T[rows:])
            assert kernels.prefill is not None
            kernels.prefill(
                plan.chunks[layer.query_heads // layer.kv_heads],
                query_HTD[:, rows:],
                cache.keys_KSD,
                cache.values_KSE,
                out_THE[rows:],
                sinks_H,
            )
        return out_THE.to(dtype)

    def launches(
        self,
        plan: Plan,
        layer: LayerSpec,
        cache: LayerCache,
        query_HTD: Tensor,
        key_KTD: Tensor,
        value_KTE: Tensor,
        out_THE: Tensor,
        *,
        scaling: float,
        softcap: float = 0.0,
        sinks_H: Tensor | None = None,
    ) -> tuple[Launch, ...] | None:
        if plan.torch_plan is not None or sinks_H is not None or query_HTD.dtype != self.dtype:
            return None
        kernels = self._kernels_of(layer, scaling, softcap, has_sinks=False)
        rows, keys_KSD, values_KSE = plan.num_rows, cache.keys_KSD, cache.values_KSE
        launches: list[Launch] = []
        if plan.chunks:
            launches.append(cache_write.launch(key_KTD[:, rows:], keys_KSD, plan.slots_T[rows:]))
            launches.append(cache_write.launch(value_KTE[:, rows:], values_KSE, plan.slots_T[rows:]))
            assert kernels.prefill is not None
            chunks = plan.chunks[layer.query_heads // layer.kv_heads]
            arguments = kernels.prefill.arguments(
                chunks, query_HTD[:, rows:], keys_KSD, values_KSE, out_THE[rows:], None
            )
            launches.append((kernels.prefill.kernel, arguments))
        if rows:
            sight = plan.rows[layer.window, layer.chunk]
            arguments = kernels.decode.arguments(
                sight, plan.slots_T, query_HTD, key_KTD, value_KTE, keys_KSD, values_KSE, out_THE, None
            )
            launches.append((kernels.decode.kernel, arguments))
        return tuple(launches)

    def launch_key(self, plan: Plan) -> Hashable | None:
        if plan.chunks or plan.torch_plan is not None:
            return None
        key: list[Hashable] = [plan.num_rows, plan.slots_T.data_ptr()]
        for rows in plan.rows.values():
            key += [rows.parts_U5.data_ptr(), len(rows.parts_U5), rows.tables_RB.data_ptr(), rows.tables_RB.shape[1]]
        key += [kernels.decode.memory for kernels in self._kernels.values()]
        return tuple(key)

    def _kernels_of(self, layer: LayerSpec, scaling: float, softcap: float, *, has_sinks: bool) -> _Kernels:
        key = layer, scaling, softcap, has_sinks
        kernels = self._kernels.get(key)
        if kernels is None:
            shape = Shape(
                layer.query_heads, layer.kv_heads, layer.key_dim, layer.value_dim, self.block_size, self.dtype,
                scaling, softcap, has_sinks,
            )  # fmt: skip
            has_prefill = self._torch is None
            kernels = self._kernels[key] = _Kernels(
                DecodeAttention(shape),
                PrefillAttention(shape, window=layer.window, chunk=layer.chunk) if has_prefill else None,
            )
        return kernels

    def _readable(self, heads: Tensor) -> Tensor:
        """Of the cache's dtype, and each token's numbers in one place."""
        heads = heads.to(self.dtype)
        return heads if heads.stride(2) == 1 else heads.contiguous()
