from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import pytest
import soft_tiles
import torch
import torch.nn.functional as F
from kernels_here import REASON, needs_kernels
from llvmlite import ir
from text_generation_server.cpu_kernels import compiler, packed_product, panels, tiled_product, tiles, vector_product
from text_generation_server.cpu_kernels.compiler import Kernel, Sequence
from text_generation_server.cpu_kernels.packed_product import PackedProduct, pack, supports
from text_generation_server.cpu_kernels.panels import (
    PANEL,
    Epilogue,
    Method,
    gate_and_up,
    pack_by_steps,
    pack_by_tiles,
)
from text_generation_server.cpu_kernels.vector_product import NARROW, WIDE
from torch import Tensor

needs_tiles = pytest.mark.skipif(
    REASON is not None or not tiles.are_available(), reason=REASON or "the processor has no AMX for bfloat16"
)

METHODS = {
    "tiles": tiled_product.METHOD,
    "tiles in software": soft_tiles.METHOD,
    "vectors": vector_product.method_by(NARROW, by_pairs=False),
    "vectors of pairs": vector_product.method_by(NARROW, by_pairs=True),
    "wide vectors": vector_product.method_by(WIDE, by_pairs=False),
    "wide vectors of pairs": vector_product.method_by(WIDE, by_pairs=True),
}
"""What one processor is given runs on every other too, if not as fast; but tiles."""

TOLERANCE = 2**-8
"""Rounding once costs half of it."""
ROWS = [*range(1, 35), 47, 48, 49, 63, 64, 65, 96, 127, 128, 129, 1000]

TAKES_ADDRESS = ir.FunctionType(ir.VoidType(), [ir.PointerType()])


@dataclasses.dataclass(slots=True)
class Weights:
    weight_NK: Tensor
    up_NK: Tensor
    bias_N: Tensor

    @property
    def num_inputs(self) -> int:
        return self.weight_NK.shape[1]

    def product(self, epilogue: Epilogue, *, bias: bool = False) -> PackedProduct:
        gated = epilogue is Epilogue.GATED
        packed = pack(gate_and_up(self.weight_NK, self.up_NK) if gated else self.weight_NK)
        return PackedProduct(packed, len(self.weight_NK), self.num_inputs, self.bias_N if bias else None, epilogue)

    def obvious(self, x: Tensor, epilogue: Epilogue, other: Tensor | None, *, bias: bool = False) -> Tensor:
        result = x.double() @ self.weight_NK.double().T
        if bias:
            result = result + self.bias_N.double()
        if epilogue is Epilogue.GATED:
            return F.silu(result) * (x.double() @ self.up_NK.double().T)
        return result if other is None else result + other.double()

    def check(self, rows: int, epilogue: Epilogue, *, bias: bool = False) -> None:
        x = torch.randn(rows, self.num_inputs).bfloat16()
        other = torch.randn(rows, len(self.weight_NK)).bfloat16() if epilogue is Epilogue.ADD else None
        out = self.product(epilogue, bias=bias)(x, other)
        assert (out.shape, out.dtype) == ((rows, len(self.weight_NK)), torch.bfloat16)
        assert_near(out, self.obvious(x, epilogue, other, bias=bias))


@pytest.fixture(
    params=[pytest.param(name, marks=needs_tiles if name == "tiles" else needs_kernels) for name in METHODS]
)
def method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Method:
    """Every way to multiply, in place of the one for this processor."""
    method = METHODS[request.param]
    monkeypatch.setattr(packed_product, "method", lambda: method)
    return method


every_method = pytest.mark.usefixtures("method")


@functools.cache
def weights(num_outputs: int, num_inputs: int) -> Weights:
    torch.manual_seed(0)
    weight_NK, up_NK = (torch.randn(2, num_outputs, num_inputs) / num_inputs**0.5).bfloat16()
    return Weights(weight_NK, up_NK, torch.randn(num_outputs))


def assert_near(out: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(out.double(), expected, rtol=TOLERANCE, atol=1e-5)


# -- the order in memory ---------------------------------------------------------------------------------------------


def test_weights_are_packed_by_panels_steps_tiles_and_pairs() -> None:
    weight_NK = torch.arange(64.0)[:, None] * 1000 + torch.arange(96)
    by_steps = [(panel, step, tile) for panel in (0, 32) for step in (0, 32, 64) for tile in (0, 16)]
    by_tiles = [(panel, step, tile) for panel in (0, 32) for tile in (0, 16) for step in (0, 32, 64)]
    for packed, order in ((pack_by_steps(weight_NK), by_steps), (pack_by_tiles(weight_NK), by_tiles)):
        expected = [
            weight_NK[panel + tile + output, step + pair + each].item()
            for panel, step, tile in order
            for pair in range(0, 32, 2)
            for output in range(16)
            for each in range(2)
        ]
        assert packed.tolist() == expected


@pytest.mark.parametrize("order", [pack_by_steps, pack_by_tiles])
def test_the_last_panel_overlaps_the_one_before(order: Callable[[Tensor], Tensor]) -> None:
    weight_NK = torch.randn(80, 64)
    assert torch.equal(order(weight_NK), torch.cat((order(weight_NK[:64]), order(weight_NK[48:]))))


def test_gate_and_up_alternate_by_16_outputs() -> None:
    torch.manual_seed(0)
    gate_NK, up_NK = torch.randn(32, 64), torch.randn(32, 64)
    both = torch.cat((gate_NK[:16], up_NK[:16], gate_NK[16:], up_NK[16:]))
    assert torch.equal(gate_and_up(gate_NK, up_NK), both)


# -- products --------------------------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("epilogue", Epilogue)
def test_any_number_of_rows(epilogue: Epilogue, rows: int) -> None:
    torch.manual_seed(1)
    weights(64, 96).check(rows, epilogue)


@every_method
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(32, 32), (32, 4096), (576, 1536), (960, 576)])
@pytest.mark.parametrize("rows", [1, 17, 33])
@pytest.mark.parametrize("epilogue", Epilogue)
def test_any_number_of_inputs_and_outputs(epilogue: Epilogue, rows: int, num_outputs: int, num_inputs: int) -> None:
    torch.manual_seed(1)
    weights(num_outputs, num_inputs).check(rows, epilogue)


@every_method
@pytest.mark.parametrize("rows", [1, 16, 40])
@pytest.mark.parametrize("epilogue", [Epilogue.NONE, Epilogue.ADD])
def test_a_bias_is_added(epilogue: Epilogue, rows: int) -> None:
    torch.manual_seed(1)
    weights(64, 96).check(rows, epilogue, bias=True)


@every_method
@pytest.mark.parametrize("together", [1, 3, 14])
@pytest.mark.parametrize("units_rows", [(0, 1), (0, 33), (1, -1), (1, 1), (3, -28)])
@pytest.mark.parametrize("epilogue", Epilogue)
def test_a_unit_has_any_number_of_panels(
    method: Method, epilogue: Epilogue, units_rows: tuple[int, int], together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """7 panels, 14 when gated: the last unit has fewer of them."""
    monkeypatch.setattr(panels, "PANELS_PER_UNIT", together)
    monkeypatch.setattr(packed_product, "UNITS_PER_THREAD", 1)
    torch.manual_seed(1)
    units, more = units_rows
    weights(7 * PANEL, 96).check(units * method.rows_per_unit + more, epilogue)


@every_method
@pytest.mark.parametrize("rows", [1, 33, 150])
@pytest.mark.parametrize("num_inputs", [1536, 2080, 6240])
@pytest.mark.parametrize("epilogue", Epilogue)
def test_many_inputs_come_in_chunks(epilogue: Epilogue, num_inputs: int, rows: int) -> None:
    torch.manual_seed(1)
    weights(96, num_inputs).check(rows, epilogue)


@every_method
@pytest.mark.parametrize("rows", [1, 100, 1000])
def test_every_thread_has_several_units(rows: int, num_threads: int) -> None:
    product = weights(32 * PANEL, 96).product(Epilogue.NONE)
    assert product.units(rows) >= packed_product.UNITS_PER_THREAD * num_threads


@every_method
@pytest.mark.parametrize("rows", [1, 15, 32, 50, 129])
@pytest.mark.parametrize("bias", [False, True], ids=["without a bias", "with a bias"])
def test_a_product_is_added_in_place(rows: int, bias: bool) -> None:
    torch.manual_seed(1)
    layer = weights(64, 96)
    x, out = torch.randn(rows, 96).bfloat16(), torch.randn(rows, 64).bfloat16()
    expected = layer.obvious(x, Epilogue.ADD, out, bias=bias)
    product = layer.product(Epilogue.ADD, bias=bias)
    arguments = product.arguments(rows, x.data_ptr(), out.data_ptr(), out.data_ptr())
    product.kernel(*arguments, units=product.units(rows))
    assert_near(out, expected)


@every_method
@pytest.mark.parametrize("bias", [False, True], ids=["without a bias", "with a bias"])
@pytest.mark.parametrize("rows", [1, 20, 130])
@pytest.mark.parametrize("num_outputs", [33, 50, 63, 95])
def test_outputs_need_not_fill_panels_if_nothing_follows(num_outputs: int, rows: int, bias: bool) -> None:
    torch.manual_seed(1)
    weights(num_outputs, 96).check(rows, Epilogue.NONE, bias=bias)


@every_method
def test_a_gate_may_be_far_from_zero() -> None:
    x = torch.tensor([-1000.0, -100.0, -88.0, -10.0, 0.0, 10.0, 100.0, 1000.0])[:, None].expand(-1, 32).bfloat16()
    means = torch.full((32, 32), 1 / 32).bfloat16()
    layer = Weights(means, means, torch.zeros(32))
    assert_near(layer.product(Epilogue.GATED)(x), layer.obvious(x, Epilogue.GATED, None))


@every_method
@pytest.mark.parametrize("shape", [(96,), (1, 5, 96), (2, 3, 7, 96), (0, 96), (2, 0, 96)])
def test_rows_lie_in_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    layer, x = weights(64, 96), torch.randn(shape).bfloat16()
    out = layer.product(Epilogue.NONE)(x)
    assert out.shape == (*shape[:-1], 64)
    assert_near(out, layer.obvious(x, Epilogue.NONE, None))


@every_method
def test_rows_need_not_lie_together() -> None:
    torch.manual_seed(1)
    layer, x, other = weights(64, 96), torch.randn(96, 20).bfloat16().T, torch.randn(64, 20).bfloat16().T
    assert_near(layer.product(Epilogue.ADD)(x, other), layer.obvious(x, Epilogue.ADD, other))


@every_method
@pytest.mark.parametrize("num_inputs", [96, 4096], ids=["at once", "in chunks"])
@pytest.mark.parametrize("epilogue", Epilogue)
def test_a_row_has_the_same_result_alone_and_among_others(epilogue: Epilogue, num_inputs: int) -> None:
    torch.manual_seed(1)
    product = weights(64, num_inputs).product(epilogue)
    x = torch.randn(70, num_inputs).bfloat16()
    other = torch.randn(70, 64).bfloat16() if epilogue is Epilogue.ADD else None
    together = product(x, other)
    for rows in (1, 7, 16, 17, 31, 32, 33, 69):
        assert torch.equal(product(x[-rows:], None if other is None else other[-rows:]), together[-rows:])


@every_method
def test_results_do_not_depend_on_the_number_of_threads(num_threads: int) -> None:
    torch.manual_seed(1)
    layer, x = weights(576, 1536), torch.randn(100, 1536).bfloat16()
    product = layer.product(Epilogue.NONE)
    out = product(x)
    assert_near(out, layer.obvious(x, Epilogue.NONE, None))
    torch.set_num_threads(1)
    assert torch.equal(product(x), out)


@every_method
def test_not_a_number_stays_in_its_row() -> None:
    torch.manual_seed(1)
    product, x = weights(64, 96).product(Epilogue.NONE), torch.randn(40, 96).bfloat16()
    expected = product(x)
    x[20, 50] = float("nan")
    out = product(x)
    assert out[20].isnan().all()
    others = torch.arange(40) != 20
    assert torch.equal(out[others], expected[others])


@needs_tiles
@pytest.mark.parametrize("rows", [1, 5, 16, 17, 40])
def test_products_of_onednn_on_the_same_threads_stay_right(rows: int, num_threads: int) -> None:
    """It multiplies in tiles too, in shapes of its own."""
    torch.manual_seed(1)
    layer = weights(256, 512)
    packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight_NK, None)
    product = layer.product(Epilogue.NONE)
    for own_rows in (0, 1, 2, 16, 19, 33, 64, rows):
        x, own_x = torch.randn(rows, 512).bfloat16(), torch.randn(own_rows, 512).bfloat16()
        for _ in range(2):
            out = torch.ops.mkldnn._linear_pointwise.default(x, packed, None, "none", [], "")
            assert_near(out, layer.obvious(x, Epilogue.NONE, None))
            assert_near(product(own_x), layer.obvious(own_x, Epilogue.NONE, None))


def setting_shapes() -> Kernel:
    """On all threads. Its argument: where the shapes are."""
    code = compiler.new_code("setting_shapes")
    code.call("llvm.x86.ldtilecfg", TAKES_ADDRESS, code.tensor(1, torch.float32).address)
    return Kernel(code, num_arguments=1)


def getting_shapes() -> Kernel:
    """Of each thread. Its arguments: where they go, and where threads are counted."""
    code = compiler.new_code("getting_shapes")
    thread = code.tensor(2, torch.int64).add_to(0, 1)
    code.call("llvm.x86.sttilecfg", TAKES_ADDRESS, (code.tensor(1, torch.float32) + thread * 16).address)
    return Kernel(code, num_arguments=2)


@needs_tiles
@pytest.mark.parametrize("epilogue", Epilogue)
def test_the_shapes_that_others_have_set_are_there_again(epilogue: Epilogue, num_threads: int) -> None:
    """Who multiplies in tiles may set their shapes once, and count on them from then on."""
    layer, rows = weights(576, 96), 50
    product = layer.product(epilogue)
    x, out, other = torch.randn(rows, 96).bfloat16(), *torch.randn(2, rows, 576).bfloat16()
    shapes, nothing = torch.zeros(2, 64, dtype=torch.uint8)
    shapes[0], shapes[16:32:2], shapes[48:56] = 1, 4, torch.arange(1, 9)  # rows of 4 bytes, 1 to 8 of them
    after, counter = torch.zeros(num_threads, 64, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    multiply = product.arguments(rows, x.data_ptr(), out.data_ptr(), other.data_ptr())
    sequence = Sequence(setting_shapes(), product.kernel, getting_shapes(), setting_shapes())
    sequence.fill((shapes.data_ptr(),), multiply, (after.data_ptr(), counter.data_ptr()), (nothing.data_ptr(),))
    sequence.run()
    assert counter.item() == num_threads
    assert torch.equal(after, shapes.expand(num_threads, -1))


# -- where it can be used --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_outputs", "num_inputs", "dtype"),
    [
        pytest.param(16, 64, torch.bfloat16, id="fewer than 32 outputs"),
        pytest.param(64, 48, torch.bfloat16, id="inputs that are no multiple of 32"),
        pytest.param(64, 64, torch.float32, id="float32"),
        pytest.param(64, 64, torch.float16, id="float16"),
    ],
)
def test_what_does_not_fit_into_panels_is_not_supported(num_outputs: int, num_inputs: int, dtype: torch.dtype) -> None:
    assert not supports(num_outputs, num_inputs, dtype)


@needs_kernels
def test_something_may_follow_whole_panels_only() -> None:
    assert all(supports(64, 96, torch.bfloat16, epilogue) for epilogue in Epilogue)
    assert supports(48, 96, torch.bfloat16, Epilogue.GATED)  # with as many of the other kind three panels
    assert supports(33, 96, torch.bfloat16)
    assert not supports(48, 96, torch.bfloat16, Epilogue.ADD)
    assert not supports(40, 96, torch.bfloat16, Epilogue.GATED)


@pytest.mark.parametrize("granted", [True, False])
def test_tiles_are_used_where_processor_and_system_grant_them(granted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "processor_has", lambda feature: True)
    monkeypatch.setattr(tiles, "_may_be_used", lambda: granted)
    assert packed_product.method() is (tiled_product.METHOD if granted else vector_product.method())
