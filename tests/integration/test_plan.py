"""`text-generation-launcher --plan` as its users run it: the plan, its exit code, and what it says of hostile input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from integration.launched import LAUNCHER, ONE_THREAD, refusal, serving, starting
from text_generation_launcher.environment import without_flags

MakeModel = Callable[..., Path]


def slow(*values: object) -> Any:
    """The same refusals are tested in one process in `server/test_memory_report.py`."""
    return pytest.param(*values, marks=pytest.mark.slow)


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**without_flags(os.environ), **ONE_THREAD, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [LAUNCHER, "--plan", *arguments], capture_output=True, text=True, env=env, timeout=240, check=False
    )


@pytest.mark.slow
def test_the_embedded_model_fits_here() -> None:
    done = plan()
    assert (done.returncode, done.stderr) == (0, "")
    for word in ("embedded on", "weights", "activations", "logits", "KV cache", "longest request", "at once"):
        assert word in done.stdout
    assert "--max-total-tokens 2048 (the model's positions)" in done.stdout


@pytest.mark.slow
def test_a_gpu_that_is_not_here() -> None:
    done = plan("--plan-device", "L4", "--json-output", "--cuda-memory-fraction", "0.5")
    assert (done.returncode, done.stderr) == (0, "")
    content = json.loads(done.stdout)
    assert content["device"] == {"kind": "cuda", "name": "L4 (21.90 GiB)", "usable_bytes": int(21.9 * 2**30) // 2}


def test_what_does_not_fit_ends_with_1_the_numbers_and_a_flag() -> None:
    done = plan("--plan-device", "512MiB")
    assert done.returncode == 1
    assert "weights" in done.stdout
    [line] = done.stderr.splitlines()
    assert line.startswith("Error: not enough memory on a GPU with 0.50 GiB: the weights do not fit")


@pytest.mark.slow
def test_a_model_without_its_weights(tiny_model: MakeModel, tmp_path: Path) -> None:
    shutil.copy(tiny_model("llama") / "config.json", tmp_path)
    done = plan("--model-id", str(tmp_path), "--plan-device", "24GiB")
    assert done.returncode == 0
    assert "the plan is made from config.json alone" in done.stderr


def written(folder: Path, content: str) -> Path:
    (folder / "config.json").write_text(content)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--plan-device", "H99"], "device `H99` is not known"),
        slow(["--plan-device=-24GiB"], "device `-24GiB` is not known"),
        slow(["--plan-device", "9" * 400 + "GiB"], "is not known"),
        slow(["--model-id", "no/such-model"], "no/such-model"),
        slow(["--num-shard", "3"], "cannot be split over 3 shards"),
    ],
)
def test_hostile_arguments(arguments: list[str], text: str) -> None:
    refused(plan(*arguments), text)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "text"),
    [
        (None, "has no config.json"),
        ("[]", "config.json of the model is not a JSON object"),
        slow("{", "config.json of the model cannot be read"),
        slow('{"model_type": "llama", "hidden_size": 1e400, "dtype": "float32"}', "cannot be served"),
        slow('{"model_type": "llama", "hidden_size": 4611686018427387904, "dtype": "float32"}', "cannot be served"),
        slow('{"model_type": ["llama"]}', "cannot be served"),
        slow('{"model_type": "llama", "dtype": "float32", "vocab_size": -1}', "cannot be served"),
    ],
)
def test_hostile_configurations(config: str | None, text: str, tmp_path: Path) -> None:
    if config is not None:
        written(tmp_path, config)
    refused(plan("--model-id", str(tmp_path), "--plan-device", "24GiB"), text)


def test_weights_in_another_format(tmp_path: Path, tiny_llama: Path) -> None:
    shutil.copy(tiny_llama / "config.json", tmp_path)
    (tmp_path / "model-q4.gguf").write_bytes(b"GGUF")
    refused(plan("--model-id", str(tmp_path)), "no model.safetensors")


def refused(done: subprocess.CompletedProcess[str], text: str) -> None:
    assert done.returncode == 1
    assert done.stdout == ""
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    *warnings, error = done.stderr.splitlines()
    assert error.startswith("Error: ")
    assert all(line.startswith("Warning: ") for line in warnings), done.stderr


@pytest.mark.slow
def test_weights_that_no_machine_holds_are_refused_before_they_are_read(tmp_path: Path, tiny_llama: Path) -> None:
    """A file of 4 TiB that takes no space: to read it would take hours."""
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    width = 2**20
    config |= {"hidden_size": width, "num_hidden_layers": 1, "head_dim": 16, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": width}))
    entries = {"model.embed_tokens.weight": {"dtype": "F32", "shape": [2**20, width], "data_offsets": [0, 2**42]}}
    header = json.dumps(entries).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2**42)
    line = refusal("--model-id", str(folder))
    assert line.startswith("Shard 0 failed to start: not enough memory on cpu: the weights do not fit: ")
    assert "TiB" not in line and "`--dtype bfloat16` halves them" in line


@pytest.mark.slow
def test_limits_that_need_too_much_are_refused_before_loading(tiny_llama: Path) -> None:
    line = refusal("--model-id", str(tiny_llama), "--max-batch-total-tokens", "2000000000")
    assert line.startswith("Shard 0 failed to start: not enough memory on cpu: ")
    assert "decrease `--max-batch-total-tokens` to" in line


@pytest.mark.slow
def test_every_limit_is_logged_with_how_it_came_about(tiny_llama: Path) -> None:
    with serving("--model-id", str(tiny_llama), "--max-batch-total-tokens", "1024") as server:
        assert "Maximum input tokens: 511 (`max_total_tokens` - 1)" in server.text
        assert "Maximum total tokens: 512 (the model's positions)" in server.text
        assert "Maximum batch prefill tokens: 512 (the default on a CPU)" in server.text
        assert "Maximum batch total tokens: 1024 (as given, in 64 blocks of 16)" in server.text
        assert "KV-cache blocks: 64, size: 16 (512.0 KiB: as `--max-batch-total-tokens` asks; " in server.text


def test_plan_device_alone_is_refused() -> None:
    with starting("--plan-device", "L4") as server:
        assert server.end() == 1
        assert "give `--plan` too" in server.text
