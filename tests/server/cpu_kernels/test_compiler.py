from __future__ import annotations

import functools
import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from text_generation_server.cpu_kernels import compiler
from text_generation_server.cpu_kernels.compiler import Kernel, Sequence

pytestmark = pytest.mark.skipif(
    compiler.reason_unavailable() is not None, reason=f"no kernels here: {compiler.reason_unavailable()}"
)


@pytest.fixture
def forgotten() -> Iterator[None]:
    """What was found out about this process is found out anew, in the test and after it."""
    for each in (compiler._openmp, compiler._parallel, compiler.reason_unavailable):
        each.cache_clear()
    yield
    for each in (compiler._openmp, compiler._parallel, compiler.reason_unavailable):
        each.cache_clear()


def adding(amount: int) -> Kernel:
    """Adds to each of its integers, a unit each. Its arguments: their address and their number."""
    code = compiler.new_code("adding")
    numbers = code.tensor(1, torch.int64)
    with code.units(code.arguments[2]) as unit:
        numbers[unit] = numbers[unit] + amount  # not atomic: a unit done twice is seen, at once or not
    return Kernel(code, num_arguments=2)


@functools.cache
def mirroring() -> Kernel:
    """Each integer and its opposite number, plus one. Its arguments: where from, where to, how many."""
    code = compiler.new_code("mirroring")
    source, target, total = code.tensor(1, torch.int64), code.tensor(2, torch.int64), code.arguments[3]
    with code.units(total) as unit:
        target[unit] = source[total - 1 - unit] + 1
    return Kernel(code, num_arguments=3)


@pytest.mark.parametrize("units", [1, 2, 3, 5, 64, 100_000])
def test_every_unit_is_done_once(units: int, num_threads: int) -> None:
    counts = torch.zeros(units + 1, dtype=torch.int64)
    kernel = adding(1)
    for times in range(1, 4):
        kernel(counts.data_ptr(), units, units=units)
        assert (counts[:units] == times).all()
    assert counts[units] == 0


def test_without_units_nothing_runs(num_threads: int) -> None:
    adding(1)(0, 0, units=0)


def test_a_kernel_wants_all_its_arguments() -> None:
    kernel = adding(1)
    with pytest.raises(ValueError, match="size"):
        kernel(0, units=1)


def test_kernels_and_torch_take_turns_on_the_same_threads(num_threads: int) -> None:
    kernel = adding(1)
    numbers = torch.zeros(100_000, dtype=torch.int64)
    for _ in range(30):
        kernel(numbers.data_ptr(), len(numbers), units=len(numbers))
        numbers.add_(1)
    assert (numbers == 60).all()


# -- sequences -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 7, pytest.param(64, marks=pytest.mark.slow)])
def test_a_kernel_of_a_sequence_reads_what_the_one_before_it_wrote(size: int, num_threads: int) -> None:
    """Thousands of kernels: one thread that goes ahead too early would seldom be seen."""
    length = 40
    sequence = Sequence(*[mirroring()] * length)
    memory = torch.zeros(length + 1, size, dtype=torch.int64)
    places = [row.data_ptr() for row in memory]
    arguments = [(places[index], places[index + 1], size) for index in range(length)]
    sequence.fill(*arguments)
    for launch in range(200):
        memory[0] = torch.arange(size) + launch
        sequence.run()
        assert torch.equal(memory[length], memory[0] + length), launch


def test_a_sequence_waits_for_the_slowest_thread(num_threads: int) -> None:
    """The first kernel has a single unit, which takes long; the second one what it wrote last."""
    code = compiler.new_code("slow")
    memory = code.tensor(1, torch.int64)
    with code.units(code.integer(1)), code.loop(1_000_000):
        memory.add_to(0, 1)
    sequence = Sequence(Kernel(code, num_arguments=1), mirroring())
    numbers = torch.zeros(2, dtype=torch.int64)
    sequence.fill((numbers.data_ptr(),), (numbers.data_ptr(), numbers[1:].data_ptr(), 1))
    for launch in range(1, 6):
        sequence.run()
        assert numbers.tolist() == [launch * 1_000_000, launch * 1_000_000 + 1]


def test_kernels_of_a_sequence_have_units_and_arguments_of_their_own(num_threads: int) -> None:
    few, many = torch.zeros(3, dtype=torch.int64), torch.zeros(5000, dtype=torch.int64)
    sequence = Sequence(adding(1), adding(10))
    sequence.fill((few.data_ptr(), 3), (many.data_ptr(), 5000))
    for _ in range(5):
        sequence.run()
    assert (few == 5).all()
    assert (many == 50).all()


def test_arguments_may_change_between_runs(num_threads: int) -> None:
    left, right = torch.zeros(2, 100, dtype=torch.int64)
    sequence = Sequence(adding(1), adding(10))
    sequence.fill((left.data_ptr(), 100), (left.data_ptr(), 100))
    sequence.run()
    sequence.set(1, right.data_ptr())
    sequence.run()
    sequence.set(0, left.data_ptr(), 50)
    sequence.run()
    with pytest.raises(AssertionError):
        sequence.set(0, left.data_ptr(), 50, 0)
    assert left.tolist() == [13] * 50 + [12] * 50
    assert right.tolist() == [20] * 100


def test_a_sequence_is_filled_with_all_arguments_of_all_kernels() -> None:
    sequence = Sequence(adding(1), adding(10))
    with pytest.raises(ValueError, match="shorter"):
        sequence.fill((0, 0))
    with pytest.raises(AssertionError):
        sequence.fill((0,), (0, 0, 0))


def test_a_kernel_may_run_alone_and_in_several_sequences(num_threads: int) -> None:
    numbers = torch.zeros(100, dtype=torch.int64)
    arguments = numbers.data_ptr(), 100
    kernel = adding(1)
    twice, thrice = Sequence(kernel, kernel), Sequence(kernel, kernel, kernel)
    twice.fill(arguments, arguments)
    thrice.fill(arguments, arguments, arguments)
    for _ in range(10):
        kernel(*arguments, units=100)
        twice.run()
        thrice.run()
    assert (numbers == 60).all()


# -- lifetime --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_kernel_outlives_others() -> None:
    """What one was compiled with is its own: it goes when the kernel goes, and not before."""
    kept: list[Kernel] = []
    for number in range(8):
        kept.append(adding(number))
        for _ in range(2):
            adding(100)
        gc.collect()
    numbers = torch.zeros(10, dtype=torch.int64)
    for kernel in kept:
        kernel(numbers.data_ptr(), 10, units=10)
    assert (numbers == sum(range(8))).all()
    del kernel, kept
    gc.collect()
    adding(1)(numbers.data_ptr(), 10, units=10)
    assert (numbers == sum(range(8)) + 1).all()


def test_a_sequence_keeps_its_kernels() -> None:
    sequence = Sequence(adding(1), adding(2))
    gc.collect()
    adding(100)  # where the code of one that is gone might lie
    numbers = torch.zeros(10, dtype=torch.int64)
    sequence.fill((numbers.data_ptr(), 10), (numbers.data_ptr(), 10))
    sequence.run()
    assert (numbers == 3).all()


# -- where kernels can be used ---------------------------------------------------------------------------------------


def test_kernels_can_be_used_here(forgotten: None) -> None:
    assert compiler.reason_unavailable() is None


def test_the_threads_of_other_systems_are_not_known(forgotten: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Plan9")
    assert compiler.reason_unavailable() == "threads on Plan9 are not known here"
    with pytest.raises(compiler.Unavailable, match="Plan9"):
        adding(1)


def test_another_openmp_than_gnus_is_not_known(forgotten: None, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = "7f00-7f01 r-xp 00000000 00:00 1 /usr/lib/libomp.so.5\n7f02-7f03 rw-p 00000000 00:00 0\n"
    monkeypatch.setattr(Path, "read_text", lambda path, **options: maps)
    assert compiler.reason_unavailable() == "this torch does not compute with GNU's OpenMP"


def test_a_processor_does_not_have_what_nobody_has_heard_of() -> None:
    assert not compiler.processor_has("warp-drive")


@pytest.mark.parametrize("setting", ["OMP_THREAD_LIMIT=1", "OMP_DYNAMIC=true"])
def test_a_sequence_ends_with_fewer_threads_than_torch_has(setting: str) -> None:
    """In a process of its own: the variable is read once, and a mistake would hang."""
    program = """
import torch
from text_generation_server.cpu_kernels.compiler import Kernel, Sequence, new_code
code = new_code("adding")
numbers = code.tensor(1, torch.int64)
with code.units(code.arguments[2]) as unit:
    numbers[unit] = numbers[unit] + 1
kernel = Kernel(code, num_arguments=2)
torch.set_num_threads(4)
counts = torch.zeros(100, dtype=torch.int64)
both = Sequence(kernel, kernel)
both.fill((counts.data_ptr(), 100), (counts.data_ptr(), 100))
both.run()
assert (counts == 2).all()
"""
    name, _, value = setting.partition("=")
    subprocess.run([sys.executable, "-c", program], env={**os.environ, name: value}, check=True, timeout=60)
