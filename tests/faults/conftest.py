"""Models that the faults are tried on."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults.hostile_model import make_hostile_model
from tiny_models import make_tiny_model


@pytest.fixture(scope="session")
def long_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with room for long answers."""
    return make_tiny_model("llama", tmp_path_factory.mktemp("llama"), max_position_embeddings=2048)


@pytest.fixture(scope="session")
def hostile_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hostile_model(tmp_path_factory.mktemp("hostile"))
