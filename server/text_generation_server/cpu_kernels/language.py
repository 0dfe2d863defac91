"""The words that processor kernels are written in: typed values with operators, memory, loops. They become LLVM IR.

A vector is 16 float32 numbers, whatever the numbers in memory are. LLVM maps it to what the processor has: one register
of AVX-512, two of AVX2, four of NEON.

Kernels run on all threads of a team at once. Their work is cut into units, and each thread takes the next one that is
left: so none waits for a slow one, and no thread needs to know which it is.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from llvmlite import ir

LANES = 16

_BOOL, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 16, 32, 64))
_F32 = ir.FloatType()
_VECTOR, _VECTOR_I32, _VECTOR_I16 = (ir.VectorType(each, LANES) for each in (_F32, _I32, _I16))
_VECTOR_F16 = ir.VectorType(ir.HalfType(), LANES)
_POINTER = ir.PointerType()
_NOTHING = ir.VoidType()

_STORED: dict[torch.dtype, Any] = {
    torch.float32: _F32,
    torch.bfloat16: _I16,
    torch.float16: ir.HalfType(),
    torch.int64: _I64,
}

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of numbers that vectors are loaded from and stored to."""


class _BFloat16(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite has no class for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat16)

    def __hash__(self) -> int:
        return hash(_BFloat16)


_VECTOR_BF16 = ir.VectorType(_BFloat16(), LANES)
_PAIRS_BF16 = ir.VectorType(_BFloat16(), 2 * LANES)

Number = int | float


class Value:
    """An integer (64 bits), a float32, a vector of these, or a truth value; operators give new ones.

    Numbers of Python become constants of the other operand's type, and a float32 beside a vector stands in all lanes.
    """

    __slots__ = ("code", "ir")

    def __init__(self, code: Code, value: Any) -> None:
        self.code = code
        self.ir = value

    @property
    def is_integer(self) -> bool:
        return bool(self.ir.type == _I64)

    def __add__(self, other: Value | Number) -> Value:
        return self._both(other, "add", "fadd")

    def __radd__(self, other: Number) -> Value:
        return self + other

    def __sub__(self, other: Value | Number) -> Value:
        return self._both(other, "sub", "fsub")

    def __rsub__(self, other: Number) -> Value:
        return self.code.constant(other, self) - self

    def __mul__(self, other: Value | Number) -> Value:
        return self._both(other, "mul", "fmul")

    def __rmul__(self, other: Number) -> Value:
        return self * other

    def __truediv__(self, other: Value | Number) -> Value:
        return self._both(other, "", "fdiv")

    def __rtruediv__(self, other: Number) -> Value:
        return self.code.constant(other, self) / self

    def __floordiv__(self, other: Value | Number) -> Value:
        """Of integers that are not negative."""
        return self._both(other, "udiv", "")

    def __mod__(self, other: Value | Number) -> Value:
        """Of integers that are not negative."""
        return self._both(other, "urem", "")

    def __lt__(self, other: Value | Number) -> Value:
        return self._compared("<", other)

    def __gt__(self, other: Value | Number) -> Value:
        return self._compared(">", other)

    def __le__(self, other: Value | Number) -> Value:
        return self._compared("<=", other)

    def __ge__(self, other: Value | Number) -> Value:
        return self._compared(">=", other)

    def both(self, other: Value) -> Value:
        """Of truth values."""
        return Value(self.code, self.code.builder.and_(self.ir, other.ir))

    def equals(self, other: Value | Number) -> Value:
        return self._compared("==", other)

    def _compared(self, operator: str, other: Value | Number) -> Value:
        builder = self.code.builder
        compare = builder.icmp_signed if self.is_integer else builder.fcmp_ordered
        return Value(self.code, compare(operator, self.ir, self.code.constant(other, self).ir))

    def _both(self, other: Value | Number, integer: str, floating: str) -> Value:
        left, right = self, self.code.constant(other, self)
        if left.ir.type != right.ir.type:  # a number beside a vector
            left, right = (each if each.ir.type == _VECTOR else self.code.spread(each) for each in (left, right))
        operation = getattr(self.code.builder, integer if left.is_integer else floating)
        return Value(self.code, operation(left.ir, right.ir))


class Pointer:
    """Memory that holds numbers of one type, and a place in it that indices count from."""

    __slots__ = ("address", "code", "dtype")

    def __init__(self, code: Code, address: Any, dtype: torch.dtype) -> None:
        self.code = code
        self.address = address
        self.dtype = dtype

    def _at(self, index: Value | int) -> Any:
        place = self.code.integer(index).ir
        return _untyped(self.code.builder.gep(self.address, [place], source_etype=_STORED[self.dtype]))

    def of(self, dtype: torch.dtype) -> Pointer:
        """The same memory, holding other numbers."""
        return Pointer(self.code, self.address, dtype)

    def __add__(self, index: Value | int) -> Pointer:
        return Pointer(self.code, self._at(index), self.dtype)

    def __getitem__(self, index: Value | int) -> Value:
        """One number, as it is stored: of float32 or int64."""
        assert self.dtype in (torch.float32, torch.int64)
        loaded = self.code.builder.load(self._at(index), typ=_STORED[self.dtype])
        return Value(self.code, loaded)

    def __setitem__(self, index: Value | int, value: Value | Number) -> None:
        assert self.dtype in (torch.float32, torch.int64)
        kind = _STORED[self.dtype]
        stored = value.ir if isinstance(value, Value) else ir.Constant(kind, value)
        self.code.builder.store(stored, self._at(index))

    def vector(self, index: Value | int) -> Value:
        """16 numbers from ``index`` on."""
        builder, place = self.code.builder, self._at(index)
        if self.dtype == torch.float32:
            return Value(self.code, builder.load(place, align=4, typ=_VECTOR))
        if self.dtype == torch.float16:
            return Value(self.code, builder.fpext(builder.load(place, align=2, typ=_VECTOR_F16), _VECTOR))
        wide = builder.zext(builder.load(place, align=2, typ=_VECTOR_I16), _VECTOR_I32)
        return Value(self.code, builder.bitcast(builder.shl(wide, _lanes(16)), _VECTOR))

    def put(self, index: Value | int, value: Value) -> None:
        """Store a vector to ``index`` and on, rounded to the nearest (to even)."""
        builder, place = self.code.builder, self._at(index)
        if self.dtype == torch.float32:
            builder.store(value.ir, place, align=4)
        elif self.dtype == torch.float16:
            builder.store(builder.fptrunc(value.ir, _VECTOR_F16), place, align=2)
        elif self.code.has_bfloat16:
            kind = ir.FunctionType(_VECTOR_BF16, [_VECTOR])
            rounded = self.code.call("llvm.x86.avx512bf16.cvtneps2bf16.512", kind, value.ir)
            builder.store(rounded.ir, place, align=2)
        else:
            bits = builder.bitcast(value.ir, _VECTOR_I32)
            last_kept = builder.and_(builder.lshr(bits, _lanes(16)), _lanes(1))
            rounded = builder.lshr(builder.add(bits, builder.add(last_kept, _lanes(0x7FFF))), _lanes(16))
            # Rounding may carry a not-a-number into its sign; one with a set bit that is kept stays what it is.
            is_nan = builder.fcmp_unordered("uno", value.ir, value.ir)
            quiet = builder.or_(builder.lshr(bits, _lanes(16)), _lanes(0x40))
            builder.store(builder.trunc(builder.select(is_nan, quiet, rounded), _VECTOR_I16), place, align=2)

    def bits(self, index: Value | int) -> Value:
        """The 64 bytes from ``index`` on as a vector of whatever they are, for `transpose`: 32 halves, say."""
        return Value(self.code, self.code.builder.load(self._at(index), align=2, typ=_VECTOR))

    def spread_bits(self, index: Value | int) -> Value:
        """The 4 bytes from ``index`` on in all lanes, as bits: two halves, say."""
        return self.code.spread(Value(self.code, self.code.builder.load(self._at(index), align=2, typ=_F32)))

    def put_bits(self, index: Value | int, value: Value) -> None:
        self.code.builder.store(value.ir, self._at(index), align=2)

    def prefetch(self, index: Value | int) -> None:
        """Have the memory there brought into the second cache."""
        kind = ir.FunctionType(_NOTHING, [_POINTER, _I32, _I32, _I32])
        read, level, data = (ir.Constant(_I32, value) for value in (0, 2, 1))
        self.code.call("llvm.prefetch.p0", kind, self._at(index), read, level, data)

    def now(self, index: Value | int) -> Value:
        """One integer that other threads change."""
        return Value(self.code, self.code.builder.load_atomic(self._at(index), "acquire", 8, typ=_I64))

    def add_to(self, index: Value | int, amount: int) -> Value:
        """Add to one integer that other threads add to as well, and return what it was."""
        place, amount = self._at(index), ir.Constant(_I64, amount)
        return Value(self.code, self.code.builder.atomic_rmw("add", place, amount, "acq_rel"))


class Variable:
    """A value that changes, on the way through a loop for example."""

    __slots__ = ("code", "kind", "place")

    def __init__(self, code: Code, initial: Value) -> None:
        self.code = code
        self.kind = initial.ir.type
        self.place = code.reserve(self.kind, 1)
        self.set(initial)

    def get(self) -> Value:
        return Value(self.code, self.code.builder.load(self.place, typ=self.kind))

    def set(self, value: Value) -> None:
        self.code.builder.store(value.ir, self.place)


class Code:
    """A function under construction, ``void (int64 *arguments)``. Its first argument is the number of units taken."""

    def __init__(self, name: str, *, has_bfloat16: bool, has_exponents: bool = False) -> None:
        """``has_bfloat16``: the processor rounds to it, and multiplies pairs of it (AVX512-BF16). ``has_exponents``: it
        splits numbers at their integers, and scales by powers of two (AVX512-DQ)."""
        self.has_bfloat16 = has_bfloat16
        self.has_exponents = has_exponents
        self.module = ir.Module(name)
        self.function = ir.Function(self.module, ir.FunctionType(_NOTHING, [_POINTER]), name)
        self._locals = ir.IRBuilder(self.function.append_basic_block("locals"))
        self._start = self.function.append_basic_block("start")
        self.builder = ir.IRBuilder(self._start)
        self.arguments = Pointer(self, self.function.args[0], torch.int64)

    def finish(self) -> str:
        """The module's text."""
        self._locals.branch(self._start)
        self.builder.ret_void()
        return str(self.module)

    # -- values --------------------------------------------------------------------------------------------------

    def integer(self, value: Value | int) -> Value:
        return value if isinstance(value, Value) else Value(self, ir.Constant(_I64, value))

    def constant(self, value: Value | Number, like: Value) -> Value:
        """A number of Python as a constant of another value's type; a value is returned as it is."""
        if isinstance(value, Value):
            return value
        if like.ir.type == _VECTOR:
            return Value(self, ir.Constant(_VECTOR, [_float32(value)] * LANES))
        return Value(self, ir.Constant(like.ir.type, value if like.is_integer else _float32(value)))

    def number(self, value: float) -> Value:
        return Value(self, ir.Constant(_F32, _float32(value)))

    def vector(self, value: float) -> Value:
        """The number in all lanes."""
        return Value(self, ir.Constant(_VECTOR, [_float32(value)] * LANES))

    def lane_numbers(self) -> Value:
        return Value(self, ir.Constant(_VECTOR, [float(lane) for lane in range(LANES)]))

    def spread(self, value: Value) -> Value:
        """A float32 in all lanes."""
        nothing = ir.Constant(_VECTOR, ir.Undefined)
        first = self.builder.insert_element(nothing, value.ir, ir.Constant(_I32, 0))
        return Value(self, self.builder.shuffle_vector(first, nothing, ir.Constant(_VECTOR_I32, [0] * LANES)))

    def pointer(self, address: Value, dtype: torch.dtype) -> Pointer:
        return Pointer(self, self.builder.inttoptr(address.ir, _POINTER), dtype)

    def tensor(self, argument: int, dtype: torch.dtype) -> Pointer:
        """Memory whose address is an argument."""
        return self.pointer(self.arguments[argument], dtype)

    def scratch(self, count: int) -> Pointer:
        """Room for float32 numbers on the thread's stack."""
        return Pointer(self, self.reserve(_F32, count), torch.float32)

    def variable(self, initial: Value) -> Variable:
        return Variable(self, initial)

    def reserve(self, kind: Any, count: int) -> Any:
        place = self._locals.alloca(kind, count)
        place.align = 64
        return _untyped(place)

    # -- arithmetic ----------------------------------------------------------------------------------------------

    def multiply_add(self, left: Value, right: Value, addend: Value) -> Value:
        """``left * right + addend``, rounded once where the processor can."""
        kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
        return self.call("llvm.fmuladd.v16f32", kind, left.ir, right.ir, addend.ir)

    def dot_pairs(self, left: Value, right: Value, addend: Value) -> Value:
        """``addend`` plus, in each lane, the product of the lower bfloat16 numbers and that of the upper ones.

        ``left`` and ``right`` are vectors of bits: each lane holds two numbers.
        """
        if self.has_bfloat16:
            kind = ir.FunctionType(_VECTOR, [_VECTOR, _PAIRS_BF16, _PAIRS_BF16])
            pairs = [self.builder.bitcast(each.ir, _PAIRS_BF16) for each in (left, right)]
            return self.call("llvm.x86.avx512bf16.dpbf16ps.512", kind, addend.ir, *pairs)
        lower = self.multiply_add(self.lower_numbers(left), self.lower_numbers(right), addend)
        return self.multiply_add(self.upper_numbers(left), self.upper_numbers(right), lower)

    def lower_numbers(self, bits: Value) -> Value:
        """Of lanes that hold two bfloat16 numbers each, as float32."""
        pairs = self.builder.bitcast(bits.ir, _VECTOR_I32)
        return Value(self, self.builder.bitcast(self.builder.shl(pairs, _lanes(16)), _VECTOR))

    def upper_numbers(self, bits: Value) -> Value:
        pairs = self.builder.bitcast(bits.ir, _VECTOR_I32)
        return Value(self, self.builder.bitcast(self.builder.and_(pairs, _lanes(-0x10000)), _VECTOR))

    def maximum(self, left: Value, right: Value) -> Value:
        """Not-a-number if one of the two is."""
        kind = left.ir.type
        name = f"llvm.maximum.{'v16f32' if kind == _VECTOR else 'f32'}"
        return self.call(name, ir.FunctionType(kind, [kind] * 2), left.ir, right.ir)

    def smaller(self, left: Value, right: Value) -> Value:
        """Of two integers."""
        return self.choose(left < right, left, right)

    def choose(self, condition: Value, yes: Value, no: Value) -> Value:
        return Value(self, self.builder.select(condition.ir, yes.ir, no.ir))

    def floor(self, value: Value) -> Value:
        """Of each lane."""
        return self.call("llvm.floor.v16f32", ir.FunctionType(_VECTOR, [_VECTOR]), value.ir)

    def opposite(self, condition: Value) -> Value:
        return Value(self, self.builder.not_(condition.ir))

    def in_any_lane(self, condition: Value) -> Value:
        """Whether what was found out lane by lane is so in one at least."""
        bits = self.builder.bitcast(condition.ir, _I16)
        return Value(self, self.builder.icmp_unsigned("!=", bits, ir.Constant(_I16, 0)))

    def square_root(self, value: Value) -> Value:
        """Of a float32."""
        return self.call("llvm.sqrt.f32", ir.FunctionType(_F32, [_F32]), value.ir)

    def to_float(self, value: Value) -> Value:
        """An integer as a float32."""
        return Value(self, self.builder.sitofp(value.ir, _F32))

    def exp(self, x: Value) -> Value:
        """Of each lane, to about 2 units in the last place; what lies outside of -87 .. 88 counts as these.

        Source: range reduction by ln 2 in two parts and the polynomial of degree 6 of the Cephes library's expf.
        """
        x = self.choose(x < -87, self.vector(-87), x)
        x = self.choose(x > 88, self.vector(88), x)
        unary = ir.FunctionType(_VECTOR, [_VECTOR])
        power = self.call("llvm.rint.v16f32", unary, (x * 1.4426950408889634).ir)
        rest = self.multiply_add(power, self.vector(-0.693359375), x)
        rest = self.multiply_add(power, self.vector(2.12194440e-4), rest)
        series = self.vector(1.9875691500e-4)
        for factor in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
            series = self.multiply_add(series, rest, self.vector(factor))
        series = self.multiply_add(series, rest * rest, rest + 1)
        is_number = self.builder.fcmp_ordered("ord", power.ir, power.ir)  # no integer is not-a-number
        exponent = self.builder.fptosi(self.builder.select(is_number, power.ir, self.vector(0).ir), _VECTOR_I32)
        scale = self.builder.shl(self.builder.add(exponent, _lanes(127)), _lanes(23))
        return series * Value(self, self.builder.bitcast(scale, _VECTOR))

    def to_half(self, vector: Value) -> Value:
        """Such that the upper halves of lanes are the numbers rounded to bfloat16, to the nearest, for `upper_halves`.

        Not-a-number stays that if bfloat16 numbers led to it.
        """
        bits = self.builder.add(self.builder.bitcast(vector.ir, _VECTOR_I32), _lanes(0x8000))
        return Value(self, self.builder.bitcast(bits, _VECTOR))

    def lower_halves(self, first: Value, second: Value) -> Value:
        """Of two vectors of bits, lane by lane as neighbours in memory."""
        return self._joined_halves(first, second, 0)

    def upper_halves(self, first: Value, second: Value) -> Value:
        return self._joined_halves(first, second, 1)

    def _joined_halves(self, first: Value, second: Value, half: int) -> Value:
        halves = ir.VectorType(_I16, 2 * LANES)
        lanes = [2 * lane + half + which for lane in range(LANES) for which in (0, 2 * LANES)]
        joined = self.builder.shuffle_vector(
            self.builder.bitcast(first.ir, halves),
            self.builder.bitcast(second.ir, halves),
            ir.Constant(ir.VectorType(_I32, 2 * LANES), lanes),
        )
        return Value(self, self.builder.bitcast(joined, _VECTOR))

    def transpose(self, rows: list[Value]) -> list[Value]:
        """16 vectors as a matrix: lane i of result j is lane j of row i."""
        for distance in (1, 2, 4, 8):
            for row in range(LANES):
                if not row & distance:
                    upper, lower = rows[row], rows[row + distance]
                    stay = [lane if not lane & distance else LANES + lane - distance for lane in range(LANES)]
                    move = [lane + distance if not lane & distance else LANES + lane for lane in range(LANES)]
                    rows[row] = self._shuffled(upper, lower, stay)
                    rows[row + distance] = self._shuffled(upper, lower, move)
        return rows

    def power_of_two(self, x: Value) -> Value:
        """``2 ** x`` of each lane, to 4 digits, which is more than bfloat16 has, for x below 127; 0, or
        nearly, where that is smaller than all numbers that have all their digits.

        Source: the Chebyshev fit of degree 3 to ``2 ** f`` for f in 0 .. 1.
        """
        if not self.has_exponents:
            # The exponent that is written for this one, 0, is that of the number 0.
            x = self.choose(x < -127, self.vector(-127), x)
            below = self.floor(x)
            # No conversion: it would say nothing about not-a-number, which the series keeps instead.
            exponent = self.builder.bitcast((below + (_INTEGERS_FROM + 127)).ir, _VECTOR_I32)
            scale = Value(self, self.builder.bitcast(self.builder.shl(exponent, _lanes(23)), _VECTOR))
            return self._power_series(x - below) * scale
        every_lane, nothing = ir.Constant(_I16, -1), self.vector(0).ir
        # Control 1: what is left above the next lower integer. The other instruction takes that integer.
        kind = ir.FunctionType(_VECTOR, [_VECTOR, _I32, _VECTOR, _I16, _I32])
        below, as_set = ir.Constant(_I32, 1), ir.Constant(_I32, 4)
        rest = self.call("llvm.x86.avx512.mask.reduce.ps.512", kind, x.ir, below, nothing, every_lane, as_set)
        series = self._power_series(rest)
        kind = ir.FunctionType(_VECTOR, [_VECTOR, _VECTOR, _VECTOR, _I16, _I32])
        return self.call("llvm.x86.avx512.mask.scalef.ps.512", kind, series.ir, x.ir, nothing, every_lane, as_set)

    def _power_series(self, rest: Value) -> Value:
        series = self.vector(_POWER_SERIES[-1])
        for factor in reversed(_POWER_SERIES[:-1]):
            series = self.multiply_add(series, rest, self.vector(factor))
        return series

    def sum(self, vector: Value) -> Value:
        """Of all lanes, always in the same order."""
        for distance in (1, 2, 4, 8):
            vector = vector + self._swapped(vector, distance)
        return self.first(vector)

    def largest(self, vector: Value) -> Value:
        for distance in (1, 2, 4, 8):
            vector = self.maximum(vector, self._swapped(vector, distance))
        return self.first(vector)

    def sums(self, vectors: list[Value]) -> Value:
        """The sums of 16 vectors as one: lane i is the sum of vector i."""
        level = 0
        while len(vectors) > 1:
            pairs = zip(vectors[::2], vectors[1::2], strict=True)
            vectors = [self._folded(left, right, 1 << level) for left, right in pairs]
            level += 1
        return vectors[0]

    def _folded(self, left: Value, right: Value, distance: int) -> Value:
        """Each lane with its neighbour, of the left vector in lanes without the bit, of the right one in the others."""
        own = [lane + (LANES if lane & distance else 0) for lane in range(LANES)]
        other = [(lane ^ distance) + (LANES if lane & distance else 0) for lane in range(LANES)]
        return self._shuffled(left, right, own) + self._shuffled(left, right, other)

    def _swapped(self, vector: Value, distance: int) -> Value:
        return self._shuffled(vector, vector, [lane ^ distance for lane in range(LANES)])

    def _shuffled(self, left: Value, right: Value, lanes: list[int]) -> Value:
        return Value(self, self.builder.shuffle_vector(left.ir, right.ir, ir.Constant(_VECTOR_I32, lanes)))

    def first(self, vector: Value) -> Value:
        """The number in its first lane."""
        return Value(self, self.builder.extract_element(vector.ir, ir.Constant(_I32, 0)))

    def compiler_barrier(self) -> None:
        """No reading, writing or prefetching is moved across: LLVM would put all that a block asks for at its begin."""
        self.builder.fence("seq_cst", "singlethread")  # no instruction comes of it

    # -- flow ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def units(self, total: Value) -> Iterator[Value]:
        """The units that this thread takes, until none is left."""
        head, body, end = (self.builder.append_basic_block(name) for name in ("unit", "work", "done"))
        self.builder.branch(head)
        self.builder.position_at_end(head)
        unit = self.arguments.add_to(0, 1)
        self.builder.cbranch((unit < total).ir, body, end)
        self.builder.position_at_end(body)
        yield unit
        self.builder.branch(head)
        self.builder.position_at_end(end)

    @contextlib.contextmanager
    def loop(self, stop: Value | int, start: Value | int = 0, step: Value | int = 1) -> Iterator[Value]:
        before = self.builder.block
        head, body, end = (self.builder.append_basic_block(name) for name in ("loop", "body", "end"))
        self.builder.branch(head)
        self.builder.position_at_end(head)
        place = self.builder.phi(_I64)
        place.add_incoming(self.integer(start).ir, before)
        index = Value(self, place)
        self.builder.cbranch((index < self.integer(stop)).ir, body, end)
        self.builder.position_at_end(body)
        yield index
        place.add_incoming((index + step).ir, self.builder.block)
        self.builder.branch(head)
        self.builder.position_at_end(end)

    @contextlib.contextmanager
    def repeat_while(self, condition: Callable[[], Value]) -> Iterator[None]:
        head, body, end = (self.builder.append_basic_block(name) for name in ("while", "body", "end"))
        self.builder.branch(head)
        self.builder.position_at_end(head)
        self.builder.cbranch(condition().ir, body, end)
        self.builder.position_at_end(body)
        yield
        self.builder.branch(head)
        self.builder.position_at_end(end)

    @contextlib.contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        with self.builder.if_then(condition.ir):
            yield

    def pause(self) -> None:
        """Tell the processor that this is a loop that waits."""
        if platform.machine() == "x86_64":
            self.call("llvm.x86.sse2.pause", ir.FunctionType(_NOTHING, []))

    def call_address(self, address: Value, argument: Value) -> None:
        """A function of one argument like this one, with where its arguments are."""
        function = self.builder.inttoptr(address.ir, ir.PointerType(ir.FunctionType(_NOTHING, [_POINTER])))
        self.builder.call(function, [self.builder.inttoptr(argument.ir, _POINTER)])

    def number_from(self, address: Value) -> Value:
        """What a function of C returns, an ``int``, without arguments."""
        function = self.builder.inttoptr(address.ir, ir.PointerType(ir.FunctionType(_I32, [])))
        return Value(self, self.builder.sext(self.builder.call(function, []), _I64))

    def call(self, name: str, kind: Any, *arguments: Any) -> Value:
        """An intrinsic function of LLVM."""
        function = self.module.globals.get(name) or ir.Function(self.module, kind, name)
        return Value(self, self.builder.call(function, arguments))


_POWER_SERIES = tuple(
    float(each)
    for each in np.polynomial.Chebyshev.interpolate(lambda x: np.exp2(x), 3, domain=[0, 1])
    .convert(kind=np.polynomial.Polynomial)
    .coef
)
_INTEGERS_FROM = 1.5 * 2**23
"""Sums with this number are whole, and hold what was added to it in their last bits."""


def _untyped(pointer: Any) -> Any:
    """LLVM's pointers have no type of what they point to; llvmlite still gives them one."""
    pointer.type = _POINTER
    return pointer


def _lanes(value: int) -> Any:
    return ir.Constant(_VECTOR_I32, [value] * LANES)


def _float32(value: float) -> float:
    """The nearest float32: LLVM takes no other as a constant of that type."""
    return float(torch.tensor(value, dtype=torch.float32))
