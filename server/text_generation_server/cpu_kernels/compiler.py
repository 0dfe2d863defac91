"""From a kernel's text to a function of this process, and onto torch's own threads.

Kernels share the team of OpenMP threads that torch computes with: threads of their own would wait for one another on
the same cores. Only GNU's OpenMP is known here, which the Linux builds of torch carry.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import threading
from pathlib import Path
from typing import Any

import llvmlite
import torch

from text_generation_server.cpu_kernels import object_cache
from text_generation_server.cpu_kernels.language import Code

_compiling = threading.Lock()


class Unavailable(Exception):
    """Kernels cannot run here; the text says why."""


def new_code(name: str) -> Code:
    """A kernel to be written for this processor."""
    return Code(name, has_bfloat16=processor_has("avx512bf16"), has_exponents=processor_has("avx512dq"))


class Kernel:
    """A compiled kernel. One thread calls the kernels of a process; it is joined by the team.

    Arguments are addresses and integers. The tensors behind the addresses are the caller's to keep.
    """

    def __init__(self, code: Code, *, num_arguments: int, keep: bool = True) -> None:
        """``keep`` the machine code for later starts: not if there are addresses of this process in it."""
        self._engine, self.address = _compile(code, keep=keep)
        self.num_arguments = num_arguments
        self._parallel = _parallel()
        self._alone = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.address)
        self._arguments = (ctypes.c_int64 * (num_arguments + 1))()
        self._place = ctypes.addressof(self._arguments)

    def __call__(self, *arguments: int, units: int) -> None:
        """Run until all units are done; the kernel knows their number from its arguments."""
        self._arguments[:] = [0, *arguments]
        num_threads = min(units, torch.get_num_threads())
        if num_threads > 1:
            self._parallel(self.address, self._place, num_threads, 0)
        elif units:
            self._alone(self._place)


Launch = tuple[Kernel, tuple[int, ...]]
"""A kernel and its arguments."""


class Sequence:
    """Kernels one after another in a single launch: between them the team meets, and is not sent home."""

    def __init__(self, *kernels: Kernel) -> None:
        self._kernels = kernels  # so that they live as long
        self._driver = _driver()
        self._parallel = _parallel()
        head = 2 + 2 * len(kernels)
        self._memory = (ctypes.c_int64 * (head + sum(kernel.num_arguments + 1 for kernel in kernels)))()
        self._memory[1] = len(kernels)
        self._place = ctypes.addressof(self._memory)
        self._counters: list[int] = []
        """Where each kernel's arguments begin: with the units taken."""
        for index, kernel in enumerate(kernels):
            self._memory[2 + 2 * index], self._memory[3 + 2 * index] = kernel.address, self._place + 8 * head
            self._counters.append(head)
            head += kernel.num_arguments + 1

    def fill(self, *arguments: tuple[int, ...]) -> None:
        """Set the arguments of all kernels for the runs to come."""
        for first, kernel, values in zip(self._counters, self._kernels, arguments, strict=True):
            assert len(values) == kernel.num_arguments
            self._memory[first + 1 : first + 1 + len(values)] = list(values)

    def set(self, kernel: int, *arguments: int) -> None:
        """Change the first arguments of the kernel at an index, or all."""
        assert len(arguments) <= self._kernels[kernel].num_arguments
        first = self._counters[kernel] + 1
        self._memory[first : first + len(arguments)] = list(arguments)

    def run(self) -> None:
        memory = self._memory
        memory[0] = 0
        for place in self._counters:
            memory[place] = 0
        self._parallel(self._driver.address, self._place, torch.get_num_threads(), 0)


SPINS = 2000
"""Looks at the others, of about 50 ns, before the core is offered to somebody else."""


@functools.cache
def _driver() -> Kernel:
    """Its arguments: how often threads have met, the number of kernels, and of each its address and that of its own."""
    code = new_code("sequence")
    # Not how many were asked for: OpenMP may be told to give fewer.
    num_threads = code.number_from(code.integer(_address_of(_openmp().omp_get_num_threads)))
    with code.loop(code.arguments[1]) as index:
        code.call_address(code.arguments[index * 2 + 2], code.arguments[index * 2 + 3])
        all_met = (index + 1) * num_threads
        code.arguments.add_to(0, 1)
        spins = code.variable(code.integer(0))
        with code.repeat_while(lambda: code.arguments.now(0) < all_met):
            code.pause()
            spins.set(spins.get() + 1)
            with code.when(spins.get() > SPINS):  # somebody else may have the core that the others need
                code.call_address(code.integer(_address_of(ctypes.CDLL(None).sched_yield)), code.integer(0))
    return Kernel(code, num_arguments=1, keep=False)


def _address_of(function: Any) -> int:
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return address


@functools.cache
def _llvm() -> Any:
    """LLVM's bindings, ready for this processor."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm


@functools.cache
def processor_has(feature: str) -> bool:
    """By LLVM's name for it."""
    return bool(_llvm().get_host_cpu_features().get(feature, False))


@functools.cache
def _target() -> tuple[str, str]:
    """This processor by LLVM's name, and its features."""
    llvm = _llvm()
    return llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()


def _compile(code: Code, *, keep: bool) -> tuple[Any, int]:
    """The engine that owns the machine code, and where it begins. ``keep``: on disk, for later starts."""
    llvm = _llvm()
    text = code.finish()
    key = object_cache.key_of(text, *_target(), llvmlite.__version__)
    with _compiling:
        machine = llvm.Target.from_default_triple().create_target_machine(  # the engine will own it
            cpu=_target()[0], features=_target()[1], opt=3, jit=True
        )
        machine_code = object_cache.load(key) if keep else None
        if machine_code is None:
            module = llvm.parse_assembly(text)
            module.verify()
            options = llvm.create_pipeline_tuning_options(speed_level=2)
            builder = llvm.create_pass_builder(machine, options)
            builder.getModulePassManager().run(module, builder)
            machine_code = machine.emit_object(module)
            if keep:
                object_cache.store(key, machine_code)
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
        engine.add_object_file(llvm.ObjectFileRef.from_data(machine_code))
        engine.finalize_object()
        return engine, engine.get_function_address(code.function.name)


@functools.cache
def _openmp() -> ctypes.CDLL:
    """The OpenMP that torch has loaded."""
    if platform.system() != "Linux":
        raise Unavailable(f"threads on {platform.system()} are not known here")
    torch.get_num_threads()  # torch, and so its OpenMP, is loaded
    mapped = (
        Path(line.rpartition(" ")[2]) for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    )
    found = {path for path in mapped if path.name.startswith("libgomp")}
    if not found:
        raise Unavailable("this torch does not compute with GNU's OpenMP")
    # Another library may bring one too, with a team of its own. torch's lies in torch/lib, or beside it in torch.libs.
    home = Path(torch.__file__).parent
    own = [path for path in found if path.is_relative_to(home) or path.parent == home.with_name("torch.libs")]
    return ctypes.CDLL(str((own or sorted(found))[0]))


@functools.cache
def _parallel() -> Any:
    """Runs a function on the threads of the team."""
    function = _openmp().GOMP_parallel
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    return function


@functools.cache
def reason_unavailable() -> str | None:
    """Why kernels cannot be used here, or None if they can."""
    try:
        _parallel()
    except Unavailable as error:
        return str(error)
    return None
