"""What cannot be served is refused at the start: exit code 1, one line that says why, nothing left."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from integration.launched import refusal, starting

MakeModel = Callable[..., Path]


def slow(value: str) -> Any:
    return pytest.param(value, marks=pytest.mark.slow)


@pytest.mark.fault("F22", "a port that is taken", "exit 1 in one line")
def test_a_taken_port() -> None:
    with socket.create_server(("0.0.0.0", 0)) as holder:
        port = holder.getsockname()[1]
        with starting("--port", str(port), environ={"JSON_OUTPUT": "false"}) as server:
            assert server.end() == 1
            assert f"Port {port} on 0.0.0.0 is already in use: " in server.text.splitlines()[-1]
            assert "Starting shard" not in server.text


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    line = refusal("--model-id", str(tmp_path))
    assert line.startswith("Shard 0 failed to start: ")
    assert "config.json" in line


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["mamba", slow("bloom")])
def test_an_architecture_that_cannot_run_on_paged_attention(tiny_model: MakeModel, model_type: str) -> None:
    line = refusal("--model-id", str(tiny_model(model_type)))
    assert line.startswith(f"Shard 0 failed to start: model type `{model_type}` cannot be served: ")


@pytest.mark.fault("F18", "a model type that nobody knows", "exit 1 in one line")
@pytest.mark.slow
def test_a_model_that_transformers_does_not_know(tmp_path: Path, tiny_llama: Path) -> None:
    folder = copied(tiny_llama, tmp_path, model_type="llama9")
    assert "`llama9` cannot be served: transformers" in refusal("--model-id", str(folder))


@pytest.mark.fault("F17", "safetensors that are cut off", "exit 1 in one line, naming the file")
def test_weights_that_are_cut_off(tmp_path: Path, tiny_llama: Path) -> None:
    folder = copied(tiny_llama, tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    line = refusal("--model-id", str(folder))
    assert "Shard 0 failed to start: model.safetensors: " in line
    assert line.endswith(f"; the weights in {folder} are damaged, download or copy them again")


@pytest.mark.slow
def test_a_length_that_the_model_was_not_made_for(tiny_llama: Path) -> None:
    line = refusal("--model-id", str(tiny_llama), "--max-total-tokens", "4096")
    assert "`max_total_tokens` must be <= the 512 positions that the model was made for. Given: 4096" in line


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gpt2", slow("stablelm"), slow("cohere")])
def test_two_shards_of_a_model_that_cannot_be_split(tiny_model: MakeModel, model_type: str) -> None:
    """Without a plan of `transformers`, or with norms over the heads."""
    line = refusal("--model-id", str(tiny_model(model_type)), "--num-shard", "2")
    assert f"model type `{model_type}` cannot be " in line
    assert "split over 2 shards" in line
    assert line.endswith(" --num-shard 1")


def copied(model: Path, folder: Path, **config_changes: object) -> Path:
    copy = shutil.copytree(model, folder / "model")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | config_changes))
    return copy
