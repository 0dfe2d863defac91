"""Back ends of kernels that are not ours. They need a GPU; here a stand-in does what their documentation says."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import paged_attention
import pytest
import torch
from text_generation_server.attention.flash_attn_paged import FlashAttnPaged
from text_generation_server.attention.interface import LayerSpec, Unsupported
from text_generation_server.attention.varlen_paged import VarlenPaged
from torch import Tensor
from torch.nn.attention import varlen

PLAIN = LayerSpec(query_heads=4, kv_heads=2, key_dim=16, value_dim=16)
OPTIONS: dict[str, Any] = {"block_size": 16, "dtype": torch.bfloat16, "device": torch.device("cuda")}
ROWS = [(7, 1), (40, 1), (0, 25), (13, 8)]


def attended(
    query_THD: Tensor,
    keys_PLKD: Tensor,
    values_PLKD: Tensor,
    ends_q: Tensor,
    lengths: Tensor,
    tables: Tensor,
    scale: float,
    window: tuple[int, int],
    softcap: float = 0.0,
) -> Tensor:
    """Causal attention of each sequence over its pages, its queries being its last tokens."""
    assert ends_q.dtype == lengths.dtype == tables.dtype == torch.int32
    assert query_THD.stride(2) == keys_PLKD.stride(3) == values_PLKD.stride(3) == 1
    heads, kv_heads, width = query_THD.shape[1], keys_PLKD.shape[2], query_THD.shape[2]
    layer = LayerSpec(
        query_heads=heads, kv_heads=kv_heads, key_dim=width, value_dim=width, window=max(0, window[0] + 1)
    )
    out = []
    for index, length in enumerate(lengths.tolist()):
        query = query_THD[int(ends_q[index]) : int(ends_q[index + 1])].float().transpose(0, 1)
        keys, values = (
            pages[tables[index].long()].flatten(0, 1)[:length].float().transpose(0, 1)
            for pages in (keys_PLKD, values_PLKD)
        )
        out.append(paged_attention.obvious(query, keys, values, layer, scale, softcap, None))
    return torch.cat(out).to(query_THD.dtype)


@functools.wraps(varlen.varlen_attn)
def varlen_attn(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: None, max_q: int, max_k: int, **options: Any
) -> Tensor:
    assert cu_seq_k is None and options["num_splits"] == 1
    assert options["enable_gqa"] == (query.shape[1] != key.shape[2])
    assert max_k == int(options["seqused_k"].max()) and max_q == int(cu_seq_q.diff().max())
    assert options["window_size"][1] == 0
    return attended(
        query, key, value, cu_seq_q, options["seqused_k"], options["block_table"], options["scale"],
        options["window_size"],
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    *, softmax_scale: float, causal: bool, window_size: tuple[int, int], softcap: float, block_table: Tensor,
) -> Tensor:  # fmt: skip
    assert causal and window_size[1] == (0 if window_size[0] >= 0 else -1)
    assert max_seqlen_q == int(cu_seqlens_q.diff().max())
    assert max_seqlen_k == int(cu_seqlens_k.diff().max())
    return attended(
        q, k, v, cu_seqlens_q, cu_seqlens_k.diff(), block_table, softmax_scale, window_size, softcap
    )  # fmt: skip


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("flash_attn")
    package.__dict__["flash_attn_varlen_func"] = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)


def on_a_cpu(backend: type[VarlenPaged]) -> type[VarlenPaged]:
    """The same, told that it is on a GPU."""

    class OnCpu(backend):  # type: ignore[misc, valid-type]
        def __init__(self, **options: Any) -> None:
            super().__init__(**options | {"device": torch.device("cuda")})
            self.device = torch.device("cpu")

    return OnCpu


LAYERS = [
    pytest.param(PLAIN, id="grouped heads"),
    pytest.param(dataclasses.replace(PLAIN, kv_heads=4), id="one kv head per query head"),
    pytest.param(dataclasses.replace(PLAIN, window=21), id="sliding window"),
    pytest.param(dataclasses.replace(PLAIN, window=1), id="window of itself"),
]
CHECKS = [
    pytest.param(functools.partial(paged_attention.check, on_a_cpu(VarlenPaged), block_size=16), id="varlen"),
    pytest.param(functools.partial(paged_attention.check, on_a_cpu(FlashAttnPaged), block_size=256), id="flash-attn"),
]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("layer", LAYERS)
def test_it_equals_attention_written_out(layer: LayerSpec, check: Callable[..., None]) -> None:
    check(layer, ROWS, dtype=torch.bfloat16)
    check(layer, ROWS, dtype=torch.float16, padding=3, query_dtype=torch.float32)


def test_flash_attn_has_soft_caps() -> None:
    layer = dataclasses.replace(PLAIN, softcap=1.5)
    paged_attention.check(on_a_cpu(FlashAttnPaged), layer, ROWS, block_size=256, dtype=torch.bfloat16, softcap=1.5)


@pytest.mark.parametrize(
    ("layer", "options", "reason"),
    [
        pytest.param(PLAIN, {"device": torch.device("cpu")}, "it is for GPUs, not for cpu", id="a processor"),
        pytest.param(
            PLAIN,
            {"dtype": torch.float32},
            r"it does not compute in torch\.float32 from a cache in torch\.float32",
            id="float32",
        ),
        pytest.param(
            PLAIN,
            {"kv_dtype": torch.float8_e5m2},
            r"it does not compute in torch\.bfloat16 from a cache in torch\.float8_e5m2",
            id="a cache in another format",
        ),
        pytest.param(
            dataclasses.replace(PLAIN, value_dim=8),
            {},
            "heads 16 and 8 wide are not of one width, a multiple of 8 up to 256",
            id="two widths",
        ),
        pytest.param(
            dataclasses.replace(PLAIN, key_dim=12, value_dim=12),
            {},
            "heads 12 and 12 wide are not of one width, a multiple of 8 up to 256",
            id="an odd width",
        ),
        pytest.param(dataclasses.replace(PLAIN, chunk=8), {}, "it has no chunked attention", id="chunks"),
        pytest.param(dataclasses.replace(PLAIN, has_sinks=True), {}, "it has no sinks", id="sinks"),
        pytest.param(dataclasses.replace(PLAIN, softcap=30.0), {}, "it has no soft cap", id="a soft cap"),
    ],
)
def test_what_torch_s_kernels_do_not_know_is_refused(layer: LayerSpec, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unsupported, match=f"^{reason}$"):
        VarlenPaged(layers=[PLAIN, layer], **OPTIONS | options)


def test_a_torch_without_block_tables_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, key, value: query)
    with pytest.raises(Unsupported, match=r"^torch .* has it without `seqused_k`; 2\.12 or newer is needed$"):
        VarlenPaged(layers=[PLAIN], **OPTIONS)


def test_small_blocks_are_refused_by_flash_attn() -> None:
    with pytest.raises(Unsupported, match=r"^its blocks hold multiples of 256 tokens, here they hold 16$"):
        FlashAttnPaged(layers=[PLAIN], **OPTIONS)


def test_flash_attn_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(Unsupported, match=r"^flash-attn cannot be imported .* the extra `flash-attn` of this package"):
        FlashAttnPaged(layers=[PLAIN], **OPTIONS)
