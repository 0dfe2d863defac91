"""The words of kernels, each in a kernel of a few lines against torch."""

from __future__ import annotations

import math
from collections.abc import Callable

import llvmlite.binding as llvm
import pytest
import torch
from text_generation_server.cpu_kernels import compiler
from text_generation_server.cpu_kernels.compiler import Kernel
from text_generation_server.cpu_kernels.language import DTYPES, LANES, Code, Value
from torch import Tensor

pytestmark = pytest.mark.skipif(
    compiler.reason_unavailable() is not None, reason=f"no kernels here: {compiler.reason_unavailable()}"
)

ROUNDINGS = [
    pytest.param(False, id="rounded by integer arithmetic"),
    pytest.param(
        True,
        id="rounded by the processor",
        marks=pytest.mark.skipif(not compiler.processor_has("avx512bf16"), reason="the processor has no AVX512-BF16"),
    ),
]
POWERS = [
    pytest.param(False, id="by integer arithmetic"),
    pytest.param(
        True,
        id="by the processor",
        marks=pytest.mark.skipif(not compiler.processor_has("avx512dq"), reason="the processor has no AVX512-DQ"),
    ),
]
SMALLEST_NORMAL = 2.0**-126


def run(
    write: Callable[[Code], None],
    *arguments: Tensor | int,
    has_bfloat16: bool | None = None,
    has_exponents: bool | None = None,
) -> None:
    """Compile a kernel and run it once, on one thread; its arguments are counted from 1."""
    code = compiler.new_code("tested")
    if has_bfloat16 is not None:
        code.has_bfloat16 = has_bfloat16
    if has_exponents is not None:
        code.has_exponents = has_exponents
    write(code)
    kernel = Kernel(code, num_arguments=len(arguments))
    kernel(*(each.data_ptr() if isinstance(each, Tensor) else each for each in arguments), units=1)


def mapped(
    function: Callable[[Code, Value], Value],
    x: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    has_bfloat16: bool | None = None,
    has_exponents: bool | None = None,
) -> Tensor:
    """``function`` of 16 numbers at a time, stored as ``dtype``."""
    size = x.numel()
    filled = torch.cat((x, x.new_zeros(-size % LANES)))
    out = torch.zeros(filled.shape, dtype=dtype)

    def write(code: Code) -> None:
        source, target = code.tensor(1, x.dtype), code.tensor(2, dtype)
        with code.loop(code.arguments[3], step=LANES) as place:
            target.put(place, function(code, source.vector(place)))

    run(write, filled, out, filled.numel(), has_bfloat16=has_bfloat16, has_exponents=has_exponents)
    return out[:size]


def counted(function: Callable[[Code, Value], Value], *numbers: int) -> list[int]:
    """``function`` of one integer at a time."""
    out = torch.zeros(len(numbers), dtype=torch.int64)

    def write(code: Code) -> None:
        source, target = code.tensor(1, torch.int64), code.tensor(2, torch.int64)
        with code.loop(code.arguments[3]) as place:
            target[place] = function(code, source[place])

    run(write, torch.tensor(numbers), out, len(numbers))
    return out.tolist()


def of_rows(function: Callable[[Code, Value], Value], x: Tensor) -> Tensor:
    """A float32 of each row of 16 numbers."""
    out = torch.zeros(len(x))

    def write(code: Code) -> None:
        source, target = code.tensor(1, torch.float32), code.tensor(2, torch.float32)
        with code.loop(len(x)) as row:
            target[row] = function(code, source.vector(row * LANES))

    run(write, x.contiguous(), out)
    return out


def same(left: Tensor, right: Tensor) -> bool:
    """Bit for bit, but one not-a-number is like another."""
    bits = torch.int32 if left.dtype == torch.float32 else torch.int16
    both_nan = left.isnan() & right.isnan()
    return bool(((left.view(bits) == right.view(bits)) | both_nan).all())


# -- exp -------------------------------------------------------------------------------------------------------------


def exp(x: Tensor) -> Tensor:
    return mapped(lambda code, value: code.exp(value), x)


def test_exp_is_right_to_two_units_in_the_last_place() -> None:
    torch.manual_seed(0)
    x = torch.cat((torch.linspace(-87, 88, 100_000), torch.randn(100_000), torch.randn(10_000) * 1e-6))
    expected = x.double().exp()
    unit = torch.exp2(expected.log2().floor() - 23)
    assert ((exp(x).double() - expected).abs() / unit).max() <= 2


def test_exp_of_nothing_is_one() -> None:
    assert exp(torch.tensor([0.0, -0.0])).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("beyond", "bound"),
    [
        *((each, -87.0) for each in (-87.1, -88.0, -104.0, -1e30, -math.inf)),
        *((each, 88.0) for each in (88.1, 89.0, 1e30, math.inf)),
    ],
)
def test_exp_of_what_lies_outside_counts_as_the_bound(beyond: float, bound: float) -> None:
    assert exp(torch.tensor([beyond])).item() == exp(torch.tensor([bound])).item()


def test_exp_of_not_a_number_is_none_and_stays_in_its_lane() -> None:
    x = torch.zeros(LANES)
    x[3] = math.nan
    assert exp(x).isnan().tolist() == [lane == 3 for lane in range(LANES)]


# -- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_vectors_are_loaded_as_they_are_stored(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.cat((torch.randn(100), torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 2.0**-14, 65504]))).to(
        dtype
    )
    assert same(mapped(lambda code, value: value, x), x.float())


@pytest.mark.parametrize("has_bfloat16", ROUNDINGS)
def test_bfloat16_is_rounded_to_the_nearest_and_to_even(has_bfloat16: bool) -> None:
    """Each bfloat16 there is, with what lies at, before and behind the middle between it and the next."""
    dropped = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (torch.arange(1 << 16)[:, None] << 16 | dropped).flatten()
    x = bits.to(torch.int32).view(torch.float32)
    expected = x.bfloat16()
    if has_bfloat16:  # which takes for zero what has fewer digits than others
        expected = torch.where(x.abs() < SMALLEST_NORMAL, torch.copysign(torch.zeros(()), x), x).bfloat16()
    rounded = mapped(lambda code, value: value, x, dtype=torch.bfloat16, has_bfloat16=has_bfloat16)
    assert same(rounded, expected)


@pytest.mark.parametrize("has_bfloat16", ROUNDINGS)
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, 0x7FFFFFFF, -0x400000, -0x7FFFFF, -1])
def test_not_a_number_stays_what_it_is_as_bfloat16(bits: int, has_bfloat16: bool) -> None:
    x = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    rounded = mapped(lambda code, value: value, x, dtype=torch.bfloat16, has_bfloat16=has_bfloat16)
    assert rounded.isnan().all()
    assert bool(rounded.view(torch.int16) < 0) == (bits < 0)


def test_float16_is_rounded_to_the_nearest_and_to_even() -> None:
    """Each float16 there is, with what lies at, before and behind the middle between it and the next."""
    each = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.float16).float()
    each = each[each.isfinite()]
    middle = (each + torch.nextafter(each.half(), torch.tensor(math.inf).half()).float()) / 2
    x = torch.cat((each, middle, *(torch.nextafter(middle, torch.tensor(end)) for end in (-math.inf, math.inf))))
    x = torch.cat((x, torch.tensor([65519.0, 65520.0, 1e30, -1e30, math.nan, math.inf])))
    assert same(mapped(lambda code, value: value, x, dtype=torch.float16), x.half())


@pytest.mark.parametrize("dtype", DTYPES)
def test_vectors_may_begin_anywhere_and_leave_their_neighbours_alone(dtype: torch.dtype) -> None:
    x, out = torch.arange(40).to(dtype), torch.full((40,), -1).to(dtype)

    def write(code: Code) -> None:
        source, target = code.tensor(1, dtype) + 1, code.tensor(2, dtype)
        source.prefetch(1 << 20)  # of memory that is not there: nothing happens
        (target + 3).put(2, source.vector(code.integer(6)))

    run(write, x, out)
    assert out.tolist() == [*[-1] * 5, *range(7, 7 + LANES), *[-1] * (35 - LANES)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_single_numbers_are_read_and_written(dtype: torch.dtype) -> None:
    x, out = torch.tensor([3, 4, 5]).to(dtype), torch.zeros(3).to(dtype)

    def write(code: Code) -> None:
        source, target = code.tensor(1, dtype), code.tensor(2, dtype)
        target[0] = source[code.integer(2)]
        target[1] = source[0] + source[1]
        target[code.integer(2)] = -7

    run(write, x, out)
    assert out.tolist() == [5, 7, -7]


def test_scratch_is_room_of_its_own() -> None:
    out = torch.zeros(2 * LANES)

    def write(code: Code) -> None:
        left, right = code.scratch(LANES), code.scratch(LANES)
        left.put(0, code.vector(1))
        right.put(0, code.vector(2))
        target = code.tensor(1, torch.float32)
        target.put(0, left.vector(0))
        target.put(LANES, right.vector(0))

    run(write, out)
    assert out.tolist() == [1] * LANES + [2] * LANES


def test_what_is_added_to_an_integer_returns_what_it_was() -> None:
    numbers = torch.tensor([40, 0, 0])

    def write(code: Code) -> None:
        places = code.tensor(1, torch.int64)
        places[1] = places.add_to(0, 2)
        places[2] = places.now(0)

    run(write, numbers)
    assert numbers.tolist() == [42, 40, 42]


# -- arithmetic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        pytest.param(lambda code, x: x + 2, lambda x: x + 2, id="x + 2"),
        pytest.param(lambda code, x: 2 + x, lambda x: 2 + x, id="2 + x"),
        pytest.param(lambda code, x: x - 0.1, lambda x: x - 0.1, id="x - 0.1"),
        pytest.param(lambda code, x: 0.1 - x, lambda x: 0.1 - x, id="0.1 - x"),
        pytest.param(lambda code, x: 3 * x * x, lambda x: 3 * x * x, id="3 x x"),
        pytest.param(lambda code, x: x / 3, lambda x: x / 3, id="x / 3"),
        pytest.param(lambda code, x: 3 / x, lambda x: 3 / x, id="3 / x"),
        pytest.param(lambda code, x: x + code.number(0.1), lambda x: x + 0.1, id="a number beside a vector"),
        pytest.param(lambda code, x: code.number(0.1) - x, lambda x: 0.1 - x, id="a vector beside a number"),
        pytest.param(lambda code, x: code.multiply_add(x, x, code.vector(0.5)), lambda x: x * x + 0.5, id="x x + 0.5"),
        pytest.param(lambda code, x: code.maximum(x, code.vector(0)), lambda x: x.clamp(min=0), id="the larger one"),
        pytest.param(
            lambda code, x: code.choose(x > 0.5, x, code.vector(-1)),
            lambda x: torch.where(x > 0.5, x, -1.0),
            id="a choice in each lane",
        ),
        pytest.param(
            lambda code, x: x * code.lane_numbers(), lambda x: x * (torch.arange(len(x)) % LANES), id="lane numbers"
        ),
        pytest.param(
            lambda code, x: code.spread(code.first(x)),
            lambda x: x[::LANES].repeat_interleave(LANES),
            id="the first lane in all",
        ),
    ],
)
def test_vectors(function: Callable[[Code, Value], Value], expected: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    x = torch.randn(10 * LANES)
    torch.testing.assert_close(mapped(function, x).double(), expected(x.double()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        pytest.param(lambda code, n: n + 2, lambda n: n + 2, id="n + 2"),
        pytest.param(lambda code, n: 100 - n * 3, lambda n: 100 - n * 3, id="100 - 3 n"),
        pytest.param(lambda code, n: n // 7, lambda n: n // 7, id="n // 7"),
        pytest.param(lambda code, n: n % 7, lambda n: n % 7, id="n % 7"),
        pytest.param(lambda code, n: code.smaller(n, code.integer(9)), lambda n: min(n, 9), id="the smaller one"),
        pytest.param(
            lambda code, n: code.choose((n >= 3).both(n < 20), n, code.integer(-1)),
            lambda n: n if 3 <= n < 20 else -1,
            id="truth values",
        ),
    ],
)
def test_integers(function: Callable[[Code, Value], Value], expected: Callable[[int], int]) -> None:
    numbers = [0, 1, 2, 3, 6, 7, 8, 9, 19, 20, 1 << 40]
    assert counted(function, *numbers) == [expected(number) for number in numbers]


def test_integers_are_compared_with_their_signs() -> None:
    assert counted(lambda code, n: code.choose(n < 0, code.integer(1), code.integer(0)), -5, 0, 5) == [1, 0, 0]


def test_a_square_root_and_an_integer_as_float32() -> None:
    out = torch.zeros(2)

    def write(code: Code) -> None:
        target = code.tensor(1, torch.float32)
        number = code.to_float(code.arguments[2])
        target[0], target[1] = number, code.square_root(number)

    run(write, out, 2)
    assert out.tolist() == [2, torch.tensor(2.0).sqrt().item()]


def test_the_sum_of_all_lanes() -> None:
    torch.manual_seed(0)
    x = torch.cat((torch.randint(-1000, 1000, (50, LANES)).float(), torch.eye(LANES)))
    assert of_rows(lambda code, value: code.sum(value), x).tolist() == x.sum(1).tolist()


def test_the_largest_of_all_lanes() -> None:
    torch.manual_seed(0)
    x = torch.cat((torch.randn(50, LANES), torch.eye(LANES), torch.full((1, LANES), -math.inf)))
    assert of_rows(lambda code, value: code.largest(value), x).tolist() == x.amax(1).tolist()


def test_the_larger_of_not_a_number_and_another_is_not_a_number() -> None:
    x = torch.zeros(LANES, LANES).masked_fill(torch.eye(LANES) > 0, math.nan)
    assert of_rows(lambda code, value: code.largest(value), x).isnan().all()
    x = torch.tensor([math.nan, 1.0])
    assert mapped(lambda code, value: code.maximum(value, code.vector(0)), x).isnan().tolist() == [True, False]
    assert mapped(lambda code, value: code.maximum(code.vector(0), value), x).isnan().tolist() == [True, False]


def test_the_sums_of_16_vectors_lie_in_their_lanes() -> None:
    torch.manual_seed(0)
    x = torch.randint(-1000, 1000, (LANES, LANES)).float()
    out = torch.zeros(LANES)

    def write(code: Code) -> None:
        source = code.tensor(1, torch.float32)
        code.tensor(2, torch.float32).put(0, code.sums([source.vector(row * LANES) for row in range(LANES)]))

    run(write, x, out)
    assert out.tolist() == x.sum(1).tolist()


# -- pairs -----------------------------------------------------------------------------------------------------------


PAIRS_AND_SUMS = (torch.bfloat16, torch.bfloat16, torch.float32)


def write_dot_pairs(code: Code) -> None:
    """One pair of the first argument with 16 of the second, added to the third."""
    left, right, out = (code.tensor(1 + place, dtype) for place, dtype in enumerate(PAIRS_AND_SUMS))
    out.put(0, code.dot_pairs(left.spread_bits(2), right.bits(0), out.vector(0)))


@pytest.mark.parametrize("has_bfloat16", ROUNDINGS)
def test_products_of_pairs_are_added(has_bfloat16: bool) -> None:
    torch.manual_seed(0)
    left, right, out = torch.randn(32).bfloat16(), torch.randn(32).bfloat16(), torch.randn(LANES)
    right[5] = math.nan
    expected = out.double() + (left[2:4].double() * right.view(LANES, 2).double()).sum(1)
    run(write_dot_pairs, left, right, out, has_bfloat16=has_bfloat16)
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert out.isnan().tolist() == [lane == 2 for lane in range(LANES)]


def test_products_of_pairs_are_one_instruction_where_there_is_one() -> None:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    target = llvm.Target.from_triple("x86_64-unknown-linux-gnu")
    code = Code("tested", has_bfloat16=True)
    write_dot_pairs(code)
    assembly = target.create_target_machine(cpu="znver4").emit_assembly(llvm.parse_assembly(code.finish()))
    assert assembly.count("vdpbf16ps") == 1


@pytest.mark.parametrize("half", [0, 1])
def test_the_numbers_of_pairs(half: int) -> None:
    x, out = torch.randn(32, generator=torch.Generator().manual_seed(0)).bfloat16(), torch.zeros(LANES)

    def write(code: Code) -> None:
        bits = code.tensor(1, torch.bfloat16).bits(0)
        code.tensor(2, torch.float32).put(0, code.upper_numbers(bits) if half else code.lower_numbers(bits))

    run(write, x, out)
    assert torch.equal(out, x[half::2].float())


# -- flow ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "stop", "step"), [(0, 5, 1), (0, 0, 1), (3, 3, 1), (5, 3, 1), (2, 9, 3), (0, 48, 16), (-2, 2, 1)]
)
@pytest.mark.parametrize("known", [True, False], ids=["when it is compiled", "when it runs"])
def test_a_loop_counts_like_a_range(start: int, stop: int, step: int, known: bool) -> None:
    seen = torch.full((50,), -99)
    used = torch.zeros(1, dtype=torch.int64)

    def write(code: Code) -> None:
        target, count = code.tensor(1, torch.int64), code.tensor(2, torch.int64)
        first, last = (start, stop) if known else (code.arguments[3], code.arguments[4])
        with code.loop(last, first, step) as index:
            target[count.add_to(0, 1)] = index

    run(write, seen, used, start, stop)
    assert seen[: used.item()].tolist() == list(range(start, stop, step))


def test_loops_stand_in_loops_and_carry_variables() -> None:
    out = torch.zeros(2, dtype=torch.int64)

    def write(code: Code) -> None:
        total, rounds = code.variable(code.integer(0)), code.variable(code.integer(0))
        with code.loop(10) as row:
            with code.loop(row) as column:
                total.set(total.get() + row * column)
            rounds.set(rounds.get() + 1)
        target = code.tensor(1, torch.int64)
        target[0], target[1] = total.get(), rounds.get()

    run(write, out)
    assert out.tolist() == [sum(row * column for row in range(10) for column in range(row)), 10]


def test_a_variable_may_be_a_vector() -> None:
    x, out = torch.arange(64.0), torch.zeros(LANES)

    def write(code: Code) -> None:
        sums = code.variable(code.vector(0))
        with code.loop(64, step=LANES) as place:
            sums.set(sums.get() + code.tensor(1, torch.float32).vector(place))
        code.tensor(2, torch.float32).put(0, sums.get())

    run(write, x, out)
    assert out.tolist() == x.view(4, LANES).sum(0).tolist()


def test_a_variable_in_a_loop_begins_anew_in_each_round() -> None:
    out = torch.zeros(5, dtype=torch.int64)

    def write(code: Code) -> None:
        with code.loop(5) as row:
            total = code.variable(code.integer(0))
            with code.loop(row):
                total.set(total.get() + 1)
            code.tensor(1, torch.int64)[row] = total.get()

    run(write, out)
    assert out.tolist() == [0, 1, 2, 3, 4]


def test_what_is_done_when_a_condition_holds_is_not_done_otherwise() -> None:
    out = torch.zeros(10, dtype=torch.int64)

    def write(code: Code) -> None:
        target = code.tensor(1, torch.int64)
        with code.loop(10) as index, code.when(index > 2):
            target[index] = 1
            with code.when(index.equals(5)):
                target[index] = 2

    run(write, out)
    assert out.tolist() == [0, 0, 0, 1, 1, 2, 1, 1, 1, 1]


@pytest.mark.parametrize("number", [1, 6, 27])
def test_a_loop_repeats_while_its_condition_holds(number: int) -> None:
    """Halves even numbers, triples others and adds one, until 1 is reached."""
    out = torch.zeros(1, dtype=torch.int64)

    def write(code: Code) -> None:
        current, rounds = code.variable(code.arguments[2]), code.variable(code.integer(0))
        with code.repeat_while(lambda: current.get() > 1):
            code.pause()
            before = current.get()
            current.set(code.choose((before % 2).equals(0), before // 2, before * 3 + 1))
            rounds.set(rounds.get() + 1)
        code.tensor(1, torch.int64)[0] = rounds.get()

    run(write, out, number)
    expected = 0
    while number > 1:
        number = number // 2 if number % 2 == 0 else number * 3 + 1
        expected += 1
    assert out.item() == expected


def test_a_matrix_of_bits_is_transposed() -> None:
    x = torch.arange(16 * 16, dtype=torch.int32).view(16, 16).view(torch.float32)
    out = torch.zeros(16, 16)

    def write(code: Code) -> None:
        source, target = code.tensor(1, torch.float32), code.tensor(2, torch.float32)
        for row, values in enumerate(code.transpose([source.bits(row * LANES) for row in range(LANES)])):
            target.put_bits(row * LANES, values)

    run(write, x, out)
    assert torch.equal(out.view(torch.int32), x.view(torch.int32).T)


@pytest.mark.parametrize("half", [0, 1])
def test_halves_of_two_vectors_become_neighbours(half: int) -> None:
    first, second = torch.randint(-(2**15), 2**15, (2, 32), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    out = torch.zeros(32, dtype=torch.int16)

    def write(code: Code) -> None:
        vectors = [code.tensor(argument, torch.bfloat16).bits(0) for argument in (1, 2)]
        joined = code.upper_halves(*vectors) if half else code.lower_halves(*vectors)
        code.tensor(3, torch.bfloat16).put_bits(0, joined)

    run(write, first, second, out)
    assert torch.equal(out, torch.stack((first[half::2], second[half::2]), 1).flatten())


def test_upper_halves_are_numbers_rounded() -> None:
    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    x[0, 3], x[1, 5] = math.nan, 0.0
    out = torch.zeros(32, dtype=torch.bfloat16)

    def write(code: Code) -> None:
        source, target = code.tensor(1, torch.float32), code.tensor(2, torch.bfloat16)
        halves = [code.to_half(source.vector(row * LANES)) for row in range(2)]
        target.put_bits(0, code.upper_halves(*halves))

    run(write, x, out)
    torch.testing.assert_close(out, x.to(torch.bfloat16).T.flatten(), rtol=0, atol=0, equal_nan=True)


def test_whether_a_condition_holds_in_any_lane() -> None:
    x = torch.zeros(3, 16)
    x[1, 7], x[2] = 2.0, 3.0
    out = torch.zeros(3, dtype=torch.int64)

    def write(code: Code) -> None:
        source, target = code.tensor(1, torch.float32), code.tensor(2, torch.int64)
        for row in range(3):
            any_is_large = code.in_any_lane(source.vector(row * LANES) > 1)
            with code.when(any_is_large):
                target[row] = 1
            with code.when(code.opposite(any_is_large)):
                target[row] = 2

    run(write, x, out)
    assert out.tolist() == [2, 1, 1]


def test_the_floor_of_numbers() -> None:
    x = torch.tensor([-1.5, -1.0, 0.0, 0.999, 1.0, 7.25, 2.0**24])
    assert torch.equal(mapped(lambda code, value: code.floor(value), x), x.floor())


def test_a_condition_may_differ_from_lane_to_lane() -> None:
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0, math.nan])

    def inside(code: Code, value: Value) -> Value:
        return code.choose((value >= -1).both(value <= 1), value, code.vector(9))

    assert mapped(inside, x).tolist() == [9, -1, 0, 1, 9, 9]


@pytest.mark.parametrize("has_exponents", POWERS)
def test_powers_of_two_are_right_to_four_digits(has_exponents: bool) -> None:
    def power(x: Tensor) -> Tensor:
        return mapped(lambda code, value: code.power_of_two(value), x, has_exponents=has_exponents)

    x = torch.cat((torch.linspace(-126, 100, 100_001), torch.arange(-126.0, 101), -torch.rand(1000) * 1e-6))
    torch.testing.assert_close(power(x).double(), x.double().exp2(), rtol=1.1e-4, atol=0)
    extremes = power(torch.tensor([0.0, -(2.0**100), -200.0, -math.inf, -126.5, math.nan]))
    assert extremes[:5].tolist() == pytest.approx([1, 0, 0, 0, 0], rel=1.1e-4, abs=SMALLEST_NORMAL)
    assert extremes[5].isnan()
