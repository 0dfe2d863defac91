from __future__ import annotations

import pytest
import torch
from text_generation_server.attention import registry
from text_generation_server.attention.torch_paged import TorchPaged
from text_generation_server.config import ConfigError


def test_the_default_depends_on_the_device() -> None:
    assert registry.resolve(None, torch.device("cpu")) == "torch"
    assert registry.resolve("torch", torch.device("cuda")) == "torch"


def test_an_unknown_name_is_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"attention `flashiest` is not known: choose one of .*torch"):
        registry.resolve("flashiest", torch.device("cpu"))


def test_a_back_end_that_cannot_be_imported_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.BACKENDS, "broken", "text_generation_server.attention.not_there:Broken")
    with pytest.raises(ConfigError, match="attention `broken` cannot be used here"):
        registry.load("broken")


def test_a_back_end_is_imported_by_name() -> None:
    assert registry.load("torch") is TorchPaged
