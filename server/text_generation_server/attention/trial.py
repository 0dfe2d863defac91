"""One small step of a back end against the reference, on the device where it is to serve.

A back end from outside declares less than it does: which strides, block sizes and widths its kernels take shows when
they are called; and ours have to be compiled, for which Triton needs a C compiler on the machine.

Shape legend: T tokens, H heads, D width, S cache slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from text_generation_server.attention.interface import AttentionBackend, LayerCache, LayerSpec, Unsupported
from text_generation_server.attention.torch_paged import TorchPaged
from text_generation_server.engine.inputs import ForwardInputs

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}
"""Of results, relative to their norm."""


def attempt(
    backend: AttentionBackend,
    layers: list[LayerSpec],
    *,
    block_size: int,
    dtype: torch.dtype,
    kv_dtype: torch.dtype | None,
    device: torch.device,
) -> None:
    """Two decode rows, a fresh prompt and a continued one in layers of every kind. Raises: Unsupported."""
    reference = TorchPaged(layers=layers, block_size=block_size, dtype=dtype, device=device, kv_dtype=kv_dtype)
    for layer in dict.fromkeys(layers):
        try:
            ours, expected = (
                _step(each, layer, block_size, dtype, kv_dtype or dtype, device) for each in (backend, reference)
            )
        except Exception as error:  # whatever a compiler or a kernel may raise
            text = next(iter(str(error).strip().splitlines()), "")
            raise Unsupported(f"a trial step fails ({type(error).__name__}: {text})") from error
        error_norm = (ours - expected).norm() / expected.norm()
        if not error_norm <= TOLERANCE[dtype]:
            raise Unsupported(f"a trial step gives other results than the reference (relative error {error_norm:.2g})")


def _step(
    backend: AttentionBackend,
    layer: LayerSpec,
    block_size: int,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    query_lens, context_lens = [1, 1, 20, 7], [300, 5, 20, 70]
    random = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(device, dtype)

    tables: list[list[int]] = []
    num_blocks = 0
    for context in context_lens:
        count = -(-context // block_size)
        # Backwards, so that no two blocks lie in order.
        tables.append(list(range(num_blocks + count, num_blocks, -1)))
        num_blocks += count
    positions = [range(context - count, context) for count, context in zip(query_lens, context_lens, strict=True)]
    slots = [
        table[position // block_size] * block_size + position % block_size
        for table, own in zip(tables, positions, strict=True)
        for position in own
    ]
    num_slots = (num_blocks + 1) * block_size
    cache = LayerCache(
        keys_KSD=numbers(layer.kv_heads, num_slots, layer.key_dim).to(kv_dtype),
        values_KSE=numbers(layer.kv_heads, num_slots, layer.value_dim).to(kv_dtype),
    )
    inputs = ForwardInputs(
        input_ids_T=torch.zeros(len(slots), dtype=torch.int64, device=device),
        position_ids_T=torch.tensor([position for own in positions for position in own], device=device),
        slots_T=torch.tensor(slots, device=device),
        num_decode_rows=2,
        query_lens=query_lens,
        context_lens=context_lens,
        block_tables=tables,
        logits_indices_L=torch.zeros(0, dtype=torch.int64, device=device),
    )
    out = backend.attend(
        backend.prepare(inputs),
        layer,
        cache,
        numbers(layer.query_heads, len(slots), layer.key_dim),
        numbers(layer.kv_heads, len(slots), layer.key_dim),
        numbers(layer.kv_heads, len(slots), layer.value_dim),
        scaling=layer.key_dim**-0.5,
        softcap=layer.softcap,
        sinks_H=numbers(layer.query_heads) if layer.has_sinks else None,
    )
    return out.float()
