"""Machine code on disk: what is found there is what was stored, and nobody else's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from kernels_here import needs_kernels
from text_generation_server.cpu_kernels import compiler, object_cache
from text_generation_server.cpu_kernels.compiler import Kernel

KEY = object_cache.key_of("a", "b")
CODE = bytes(range(256))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "text-generation/kernels"


def added() -> int:
    """What a kernel says that is compiled, or comes from the disk."""
    code = compiler.new_code("adding")
    numbers = code.tensor(1, torch.int64)
    with code.units(code.arguments[2]) as unit:
        numbers[unit] = numbers[unit] + 42
    numbers_N = torch.zeros(1, dtype=torch.int64)
    Kernel(code, num_arguments=2)(numbers_N.data_ptr(), 1, units=1)
    return int(numbers_N.item())


def test_what_was_stored_is_found() -> None:
    assert object_cache.load(KEY) is None
    object_cache.store(KEY, CODE)
    assert object_cache.load(KEY) == CODE
    assert object_cache.load(object_cache.key_of("ab", "")) is None


def test_half_a_file_is_none(folder: Path) -> None:
    object_cache.store(KEY, CODE)
    stored = (folder / KEY).read_bytes()
    for part in (stored[:-1], stored[:20], b"", stored[:-1] + b"?"):
        (folder / KEY).write_bytes(part)
        assert object_cache.load(KEY) is None
    object_cache.store(KEY, CODE)
    assert object_cache.load(KEY) == CODE


@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_others_can_write_is_not_run(folder: Path, what: str) -> None:
    object_cache.store(KEY, CODE)
    (folder if what == "folder" else folder / KEY).chmod(0o777)
    assert object_cache.load(KEY) is None


def test_a_folder_that_cannot_be_made_is_no_error(folder: Path) -> None:
    folder.parent.write_text("a file is in the way")
    object_cache.store(KEY, CODE)
    assert object_cache.load(KEY) is None


def test_the_least_recently_used_go_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_cache, "MAX_FILES", 3)
    for age, name in enumerate("dcba"):
        object_cache.store(name, CODE)
        os.utime(folder / name, (1000 - age, 1000 - age))
    assert object_cache.load("a") == CODE, "it was the oldest"
    object_cache.store("new", CODE)
    assert sorted(path.name for path in folder.iterdir()) == ["a", "d", "new"]


@needs_kernels
def test_a_kernel_is_compiled_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert added() == 42
    (stored,) = folder.iterdir()

    def compiled(*given: object, **named: object) -> None:
        pytest.fail("it was compiled again")

    with monkeypatch.context() as patched:
        patched.setattr(compiler._llvm(), "create_pass_builder", compiled)
        assert added() == 42
    stored.write_bytes(b"no machine code")
    assert added() == 42


@needs_kernels
def test_kernels_run_without_a_folder(folder: Path) -> None:
    folder.parent.write_text("a file is in the way")
    assert added() == 42
