"""What decides on a GPU whether a back end serves."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from text_generation_server.attention import registry, trial
from text_generation_server.attention.interface import LayerSpec, Unsupported
from text_generation_server.attention.llvm_paged import LlvmPaged
from text_generation_server.attention.torch_paged import TorchPaged
from text_generation_server.cpu_kernels import compiler
from torch import Tensor

CPU = torch.device("cpu")
PLAIN = LayerSpec(query_heads=4, kv_heads=2, key_dim=16, value_dim=16)
LAYERS = [PLAIN, dataclasses.replace(PLAIN, window=5), dataclasses.replace(PLAIN, softcap=2.0, has_sinks=True)]
OPTIONS: dict[str, Any] = {"block_size": 16, "dtype": torch.float32, "kv_dtype": None, "device": CPU}


class Failing(TorchPaged):
    def attend(self, *args: Any, **options: Any) -> Tensor:
        raise ValueError("no C compiler\nin sight")


class NearlyRight(TorchPaged):
    def attend(self, *args: Any, **options: Any) -> Tensor:
        return super().attend(*args, **options) * 1.001


class Blind(TorchPaged):
    """Reads what it has not written."""

    def attend(self, *args: Any, **options: Any) -> Tensor:
        return torch.full_like(super().attend(*args, **options), torch.nan)


@pytest.mark.skipif(compiler.reason_unavailable() is not None, reason="no kernels here")
def test_a_back_end_that_gives_the_reference_s_results_serves() -> None:
    trial.attempt(LlvmPaged(layers=LAYERS, **OPTIONS), LAYERS, **OPTIONS)


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        pytest.param(Failing, r"^a trial step fails \(ValueError: no C compiler\)$", id="it fails"),
        pytest.param(NearlyRight, r"^a trial step gives other results .* \(relative error 0\.001\)$", id="it is wrong"),
        pytest.param(Blind, r"^a trial step gives other results .* \(relative error nan\)$", id="it leaves holes"),
    ],
)
def test_one_that_does_not_is_refused_with_the_reason(backend: type[TorchPaged], reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        trial.attempt(backend(layers=LAYERS, **OPTIONS), LAYERS, **OPTIONS)


def test_on_a_gpu_the_registry_tries_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def attempt(backend: object, layers: list[LayerSpec], **options: Any) -> None:
        tried.append((type(backend), options["device"].type))
        raise Unsupported("it is the wrong day")

    class Anywhere(TorchPaged):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options | {"device": CPU})

    monkeypatch.setattr(trial, "attempt", attempt)
    monkeypatch.setattr(registry, "_load", lambda name: Anywhere)
    options: dict[str, Any] = OPTIONS | {"device": torch.device("cuda")}
    assert registry.create(("varlen", "torch"), layers=LAYERS, **options)[0] == "torch"
    assert tried == [(Anywhere, "cuda")]
