"""Each swap equals the module it replaces, and leaves alone what it does not understand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from text_generation_server.config import Dtype, ShardConfig
from text_generation_server.model.bridge import Unservable
from text_generation_server.model.loader import load_model
from text_generation_server.model.swaps import attention, linears, mlp, norms, projections, table
from text_generation_server.model.transformers_runner import TransformersRunner
from torch import Tensor, nn

MakeModel = Callable[..., Path]


class RMSNorm(nn.Module):
    """As Llama writes it, or with Gemma's ``1 + weight``."""

    def __init__(self, width: int, *, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))
        self.variance_epsilon = 1e-5
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (wide * (self.weight.float() + self.offset)).to(x.dtype)


class ClampedRMSNorm(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-0.1, 0.1)


class MLP(nn.Module):
    def __init__(self, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(16, 24, bias=bias)
        self.up_proj = nn.Linear(16, 24, bias=bias)
        self.down_proj = nn.Linear(24, 16, bias=bias)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return out


class LimitedMLP(MLP):
    """Clamps, but nothing that ordinary values would show."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x).clamp(-self.limit, self.limit)
        out: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * up)
        return out


class ScaledMLP(MLP):
    """By a number that is a weight."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([scale]))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


@pytest.mark.parametrize("rows", [1, 5, norms.FEW_ROWS])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms(rows: int, offset: float, dtype: torch.dtype) -> None:
    own = RMSNorm(24, offset=offset).to(dtype)
    fast = norms.replace(own)
    assert isinstance(fast, norms.FastRMSNorm)
    x = torch.randn(3, rows, 24, dtype=dtype) * 3
    tolerance = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]  # of the last digit, at most
    torch.testing.assert_close(fast(x), own(x), rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("rows", [1, norms.FEW_ROWS + 1])
def test_one_plus_a_small_weight_keeps_its_digits(rows: int) -> None:
    own = RMSNorm(24, offset=1.0)
    nn.init.constant_(own.weight, 2**-8)  # bfloat16 has it, but not the sum
    own = own.to(torch.bfloat16)
    fast = norms.replace(own)
    assert fast is not None
    x = torch.randn(rows, 24, dtype=torch.bfloat16)
    exact = own.float()(x.float())
    torch.testing.assert_close(fast(x).float(), exact, rtol=2**-8, atol=0)  # one rounding


def test_a_norm_that_does_something_else_stays() -> None:
    assert norms.replace(ClampedRMSNorm(24)) is None
    assert norms.replace(nn.LayerNorm(24)) is None


PACKED_DTYPES = [
    torch.float32,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(
            not linears.can_pack(torch.empty(32, 32, dtype=torch.bfloat16)),
            reason="oneDNN does not multiply bfloat16 numbers on this processor",
        ),
    ),
]


@pytest.mark.parametrize("dtype", PACKED_DTYPES)
@pytest.mark.parametrize(("rows", "inner", "outer"), [(1, 16, 24), (7, 33, 17), (64, 576, 960)])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_linears(rows: int, inner: int, outer: int, bias: bool, dtype: torch.dtype) -> None:
    own = nn.Linear(inner, outer, bias=bias, dtype=dtype)
    packed = linears.pack(own, with_kernels=False)
    assert isinstance(packed, linears.PackedLinear)
    assert (packed.weight.shape, packed.weight.dtype) == (own.weight.shape, own.weight.dtype)
    assert packed.weight.isnan().all(), "a model that computes with it must not go unnoticed"
    x = torch.randn(rows, inner, dtype=dtype)
    with torch.inference_mode():
        torch.testing.assert_close(packed(x), F.linear(x, own.weight, own.bias), rtol=2e-2, atol=2e-2 if bias else 1e-2)
        torch.testing.assert_close(packed(x[None]), packed(x)[None])


@pytest.mark.parametrize("dtype", PACKED_DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_what_follows_a_packed_product(bias: bool, dtype: torch.dtype) -> None:
    own = nn.Linear(16, 24, bias=bias, dtype=dtype)
    packed = linears.pack(own, with_kernels=False)
    assert isinstance(packed, linears.PackedLinear)
    x, other = torch.randn(1, 9, 16, dtype=dtype), torch.randn(1, 9, 24, dtype=dtype)
    with torch.inference_mode():
        product = F.linear(x, own.weight, own.bias).float()
        cases = [
            (packed.silu(x), F.silu(product)),
            (packed.times(x, other), product * other.float()),
            (packed.plus(x, other), product + other.float()),
            (linears.linear_plus(packed, x, other), product + other.float()),
            (linears.linear_plus(own, x, other), product + other.float()),
        ]
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for ours, expected in cases:
        torch.testing.assert_close(ours, expected.to(dtype), rtol=tolerance, atol=tolerance)


def test_float16_linears_stay() -> None:
    assert linears.pack(nn.Linear(32, 32, dtype=torch.float16), with_kernels=True) is None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gated_mlp(bias: bool, packs: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if not packs:
        monkeypatch.setattr(mlp, "can_pack", lambda weight: False)
    own = MLP(bias=bias).to(dtype)
    is_packed = packs and linears.can_pack(own.gate_proj.weight)
    swapped = mlp.replace(own)
    assert isinstance(swapped, mlp.PackedMLP if is_packed else mlp.FusedMLP)
    x, residual = torch.randn(2, 3, 16, dtype=dtype), torch.randn(2, 3, 16, dtype=dtype)
    tolerance = None if dtype == torch.float32 else 3e-2  # None is torch's own
    with torch.inference_mode():
        expected = own(x)
        for _ in range(2):  # before its linear layers are packed, and after
            torch.testing.assert_close(swapped(x), expected, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(swapped.plus(x, residual), expected + residual, rtol=tolerance, atol=tolerance)
            for name, child in swapped.named_children():
                setattr(swapped, name, linears.pack(child, with_kernels=False) or child)


def swapped(*modules: nn.Module, dtype: torch.dtype = torch.float32) -> list[bool]:
    """Which of some MLPs, beside one another, are replaced."""
    torch.manual_seed(0)
    model = nn.Sequential(*modules).to(dtype)
    x = torch.randn(8, 16, dtype=dtype)

    def run() -> object:
        return [module(x) for module in model]

    table.apply(model, dtype=dtype, run=run, without=["projections"])
    return [isinstance(module, mlp.GatedMLP) for module in model]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_mlp_that_clamps_far_out_of_range_stays(dtype: torch.dtype) -> None:
    assert swapped(MLP(), dtype=dtype) == [True]
    assert swapped(LimitedMLP(20), dtype=dtype) == [False]


def test_modules_of_one_class_that_differ_in_a_field_are_compared_each() -> None:
    assert swapped(LimitedMLP(1e9), LimitedMLP(20), MLP(), LimitedMLP(20)) == [True, False, True, False]
    scaled = [ScaledMLP(scale) for scale in (1.0, 0.98)]
    assert swapped(*scaled, dtype=torch.bfloat16) == [True, False]


@pytest.mark.parametrize("error", [AttributeError, KeyError, ValueError, RuntimeError])
def test_a_module_that_fails_in_the_comparison_stays(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(module: nn.Module) -> None:
        raise error("not made for this")

    monkeypatch.setitem(table.REPLACEMENTS, "mlp", replace)
    assert swapped(MLP()) == [False]


def test_a_model_that_does_not_run_far_out_is_reported() -> None:
    def run() -> None:
        raise KeyError("no such position")

    with pytest.raises(Unservable, match=r"it does not run with positions spread far \(KeyError: 'no such position'\)"):
        table.apply(nn.Sequential(MLP()), dtype=torch.float32, run=run)


def test_projections_of_one_input_share_a_product() -> None:
    module = nn.ModuleDict({name: nn.Linear(8, width) for name, width in (("q_proj", 8), ("k_proj", 4), ("v_proj", 6))})
    x, y = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    expected = {(name, case): layer(value) for name, layer in module.items() for case, value in (("x", x), ("y", y))}
    assert projections.replace_children(module) == 1
    weight = module["q_proj"].weight
    assert isinstance(weight, Tensor)
    assert weight.shape == (8, 8)
    assert weight.isnan().all()
    for name in ("v_proj", "q_proj", "k_proj", "k_proj"):  # in any order, and again
        torch.testing.assert_close(module[name](x), expected[name, "x"])
    torch.testing.assert_close(module["q_proj"](x), expected["q_proj", "x"])
    torch.testing.assert_close(module["k_proj"](y), expected["k_proj", "y"])


def test_projections_that_do_not_fit_stay() -> None:
    module = nn.ModuleDict({"gate_proj": nn.Linear(8, 4, bias=True), "up_proj": nn.Linear(8, 4, bias=False)})
    assert projections.replace_children(module) == 0


@pytest.mark.parametrize("heads", [1, 5])
def test_rotation(heads: int) -> None:
    x = torch.randn(7, heads, 8)
    angles = torch.randn(7, 4).repeat(1, 2)[None]
    left, right = x.chunk(2, -1)
    own = x * angles.cos()[0, :, None] + torch.cat((-right, left), -1) * angles.sin()[0, :, None]
    torch.testing.assert_close(attention.rotate(x, angles.cos(), angles.sin()), own)


@pytest.mark.parametrize(
    ("model_type", "changes", "expected"),
    [
        pytest.param("llama", {}, {"norms": 5, "attention": 2, "mlp": 2, "layers": 2, "linears": 11}, id="everything"),
        pytest.param("qwen3", {}, {"norms": 9, "attention": 2, "mlp": 2, "layers": 2}, id="norms of heads"),
        pytest.param("granite", {"residual_multiplier": 0.5}, {"attention": 2, "layers": 0}, id="scaled residuals"),
        pytest.param("stablelm", {}, {"attention": 0, "projections": 2}, id="part of a head rotates"),
        pytest.param("olmo", {"clip_qkv": 4.0}, {"attention": 0, "projections": 2}, id="clipped projections"),
        pytest.param("ministral3", {}, {"mlp": 2}, id="queries scaled by position"),
        pytest.param("gpt2", {}, {"linears": 9}, id="Conv1D"),
    ],
)
def test_what_is_swapped(
    model_type: str, changes: dict[str, Any], expected: dict[str, int], tiny_model: MakeModel, monkeypatch: Any
) -> None:
    counted = counts(tiny_model(model_type, **changes), Dtype.FLOAT32, monkeypatch)
    assert {name: counted[name] for name in expected} == expected


def counts(folder: Path, dtype: Dtype, monkeypatch: Any) -> dict[str, int]:
    """How many modules each swap replaces in a model."""
    counted: dict[str, int] = {}
    own = table.apply
    monkeypatch.setattr(table, "apply", lambda *args, **kwargs: counted.update(own(*args, **kwargs)))
    runner = load_model(ShardConfig(model_id="tiny", uds_path=Path("unused"), dtype=dtype), folder)
    assert any(isinstance(module, linears.FusingLinear) for module in runner.model.modules()), "the swaps were undone"
    return counted


@pytest.mark.parametrize(
    ("model_type", "changes", "expected"),
    [
        pytest.param("llama", {}, {"norms": 5, "attention": 2, "mlp": 2, "layers": 2}, id="everything"),
        pytest.param("smollm3", {}, {"attention": 1, "layers": 1}, id="a layer that does not rotate"),
        pytest.param("granite", {"residual_multiplier": 0.97}, {"attention": 2, "layers": 0}, id="scaled residuals"),
        pytest.param(
            "granite",
            {"residual_multiplier": 0.22, "embedding_multiplier": 12.0, "num_hidden_layers": 12},
            {"attention": 12, "layers": 0},
            id="residuals that are scaled much",
        ),
        pytest.param("gemma3_text", {}, {"norms": 19, "attention": 3, "mlp": 3}, id="norms of one plus weight"),
    ],
)
def test_what_is_swapped_in_bfloat16(
    model_type: str, changes: dict[str, Any], expected: dict[str, int], tiny_model: MakeModel, monkeypatch: Any
) -> None:
    """Small weights make small differences: they must show, as in float32."""
    counted = counts(tiny_model(model_type, initializer_range=0.02, **changes), Dtype.BFLOAT16, monkeypatch)
    assert {name: counted[name] for name in expected} == expected


def test_the_original_weights_are_freed(tiny_model: MakeModel) -> None:
    folder = tiny_model("llama")
    sizes = {
        swaps: weight_bytes(load_model(ShardConfig(model_id="tiny", uds_path=Path("unused"), swaps=swaps), folder))
        for swaps in (True, False)
    }
    head_bytes = 320 * 64 * 4  # tied to the embedding, which stays: the packed head is a copy
    assert sizes[True] == pytest.approx(sizes[False] + head_bytes, rel=0.01)


def weight_bytes(runner: TransformersRunner) -> int:
    """Of parameters and buffers, shared storage counted once."""
    sizes = {}
    for tensor in (*runner.model.parameters(), *runner.model.buffers()):
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        else:  # prepacked: the library's own layout
            sizes[id(tensor)] = tensor.nbytes
    return sum(sizes.values())
