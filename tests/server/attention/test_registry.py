from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from text_generation_server.attention import registry
from text_generation_server.attention.interface import LayerSpec, Unsupported
from text_generation_server.attention.torch_paged import TorchPaged
from text_generation_server.config import ConfigError

CPU = torch.device("cpu")
LAYER = LayerSpec(query_heads=4, kv_heads=2, key_dim=8, value_dim=8)
OPTIONS: dict[str, Any] = {"layers": [LAYER], "block_size": 4, "dtype": torch.float32, "device": CPU, "kv_dtype": None}


class Willing:
    """Serves anything."""

    def __init__(self, **options: Any) -> None:
        self.options = options


class Fussy:
    """Serves nothing."""

    def __init__(self, **options: Any) -> None:
        raise Unsupported("it is too warm")


@pytest.fixture(autouse=True)
def backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside those that there are: `willing`, `fussy`, and `missing`, whose module is not there."""
    module = ModuleType("pretended_backends")
    module.__dict__.update(Willing=Willing, Fussy=Fussy)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("willing", "fussy"):
        monkeypatch.setitem(registry.BACKENDS, name, f"{module.__name__}:{name.capitalize()}")
    monkeypatch.setitem(registry.BACKENDS, "missing", "text_generation_server.attention.not_there:Missing")


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("cpu", ("llvm", "torch")),
        ("cuda", ("triton", "varlen", "flash-attn", "torch")),
        ("mps", ("torch",)),
    ],
)
def test_the_default_depends_on_the_device(device: str, expected: tuple[str, ...]) -> None:
    assert registry.candidates(None, torch.device(device)) == expected


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["torch", "llvm", "missing"])
def test_a_name_that_is_given_is_the_only_candidate(name: str, device: str) -> None:
    assert registry.candidates(name, torch.device(device)) == (name,)


@pytest.mark.parametrize("name", ["flashiest", "", "Torch"])
def test_an_unknown_name_is_refused_with_the_choices(name: str) -> None:
    expected = (
        f"^attention `{name}` is not known: choose one of "
        "flash-attn, fussy, llvm, missing, torch, triton, varlen, willing$"
    )
    with pytest.raises(ConfigError, match=expected):
        registry.candidates(name, CPU)


def test_what_is_preferred_is_known() -> None:
    assert {name for names in registry.PREFERRED_BY_DEVICE.values() for name in names} <= set(registry.BACKENDS)


def test_a_back_end_is_made_by_name() -> None:
    name, backend = registry.create(("torch",), **OPTIONS)
    assert name == "torch"
    assert isinstance(backend, TorchPaged)


def test_a_back_end_is_told_what_it_is_to_serve() -> None:
    _, backend = registry.create(("willing",), **OPTIONS)
    assert isinstance(backend, Willing)
    assert backend.options == OPTIONS


def test_the_first_that_can_serve_is_taken() -> None:
    assert registry.create(("willing", "torch"), **OPTIONS)[0] == "willing"


@pytest.mark.parametrize(
    ("names", "reasons"),
    [
        pytest.param(
            ("fussy", "torch"), ["attention `fussy` cannot be used here: it is too warm"], id="one that refuses"
        ),
        pytest.param(
            ("missing", "torch"),
            ["attention `missing` cannot be used here: No module named 'text_generation_server.attention.not_there'"],
            id="one that cannot be imported",
        ),
        pytest.param(
            ("fussy", "fussy", "torch", "willing"),
            ["attention `fussy` cannot be used here: it is too warm"] * 2,
            id="several",
        ),
    ],
)
def test_what_cannot_be_used_is_passed_over_with_its_reason(
    names: tuple[str, ...], reasons: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, registry.__name__):
        name, backend = registry.create(names, **OPTIONS)
    assert name == "torch"
    assert isinstance(backend, TorchPaged)
    assert caplog.messages == reasons


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        pytest.param(("fussy",), "attention `fussy` cannot be used here: it is too warm", id="the only one"),
        pytest.param(
            ("missing",), "attention `missing` cannot be used here: No module named .*not_there'", id="not imported"
        ),
        pytest.param(
            ("missing", "fussy"), "attention `fussy` cannot be used here: it is too warm", id="the last of several"
        ),
    ],
)
def test_when_none_can_be_used_the_last_is_refused_by_name(names: tuple[str, ...], reason: str) -> None:
    with pytest.raises(ConfigError, match=f"^{reason}$"):
        registry.create(names, **OPTIONS)


def test_an_error_of_another_kind_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Fussy, **options: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Fussy, "__init__", broken)
    with pytest.raises(ZeroDivisionError):
        registry.create(("fussy", "torch"), **OPTIONS)


def test_a_cache_in_another_format_is_served_by_torch_on_a_processor() -> None:
    layer = dataclasses.replace(LAYER, key_dim=16, value_dim=16)
    options = OPTIONS | {"layers": [layer], "block_size": 16, "kv_dtype": torch.float8_e5m2}
    assert registry.create(registry.candidates(None, CPU), **options)[0] == "torch"


def test_heads_that_the_kernel_does_not_know_are_served_by_torch() -> None:
    assert registry.create(registry.candidates(None, CPU), **OPTIONS)[0] == "torch"


def test_a_shard_needs_no_triton() -> None:
    """In a process of its own, where Triton cannot be imported."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, text_generation_server.shard\n"
        "from text_generation_server.attention import registry\n"
        "from text_generation_server.attention.interface import LayerSpec\n"
        "layers = [LayerSpec(query_heads=2, kv_heads=1, key_dim=16, value_dim=16)]\n"
        "options = dict(layers=layers, block_size=16, dtype=torch.float32, device=torch.device('cpu'))\n"
        "print(registry.create(('triton', 'torch'), **options)[0])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout.strip()) == (0, "torch"), run.stderr
