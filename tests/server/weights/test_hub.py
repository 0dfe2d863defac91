"""The real huggingface_hub against a hub on a local port, each download in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fake_hub import SHA, FakeHub, Repository, served
from huggingface_hub.errors import LocalEntryNotFoundError
from text_generation_server.config import ConfigError
from text_generation_server.weights.download import explained
from text_generation_server.weights.hub import choose_files, find_model

WEIGHTS = bytes(range(256)) * 4000
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": WEIGHTS,
    "tokenizer.json": b"{}",
    "README.md": b"read me",
    "modeling_custom.py": b"raise SystemExit",
    "pytorch_model.bin": b"\x80\x04",
}


@dataclass
class Outcome:
    code: int
    lines: list[dict[str, Any]]

    @property
    def errors(self) -> list[str]:
        return [line["message"] for line in self.lines if line["level"] == "ERROR"]

    def events(self, name: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line.get("event") == name]


def download(hub: FakeHub, home: Path, *arguments: str, **env: str) -> Outcome:
    """Run ``download-weights`` as the launcher does."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "TGI_"))}
    process = subprocess.run(
        [sys.executable, "-m", "text_generation_server", "download-weights", *arguments],
        env=clean | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "TGI_DOWNLOAD_PAUSE_S": "0.05", **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert process.stdout == ""
    return Outcome(process.returncode, [json.loads(line) for line in process.stderr.splitlines()])


def test_a_download_brings_what_is_needed_and_says_where(tmp_path: Path) -> None:
    with served(org__model=Repository(FILES)) as hub:
        outcome = download(hub, tmp_path, "org/model")
        assert (outcome.code, outcome.errors) == (0, [])
        (resolved,) = outcome.events("resolved")
        folder = Path(resolved["folder"])
        assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
        assert (folder / "model.safetensors").read_bytes() == WEIGHTS
        assert (resolved["sha"], resolved["pipeline_tag"]) == (SHA, "text-generation")
        (last,) = [event for event in outcome.events("progress") if event["file"] == "model.safetensors"][-1:]
        assert (last["done"], last["total"], last["unit"]) == (len(WEIGHTS), len(WEIGHTS), "bytes")

        hub.requests.clear()
        again = download(hub, tmp_path, "org/model")
        assert again.code == 0 and not any("org/model" in path for _, path, _ in hub.requests), (
            "the second time needs no network"
        )
        assert again.lines[0]["message"] == "Files are already present on the host. Skipping download."
        assert again.events("resolved")[0]["folder"] == str(folder)

    offline = download(hub, tmp_path, "org/model", HF_HUB_OFFLINE="1")
    assert offline.code == 0 and offline.events("resolved")[0]["sha"] == SHA


def test_code_is_downloaded_only_for_who_trusts_it(tmp_path: Path) -> None:
    with served(org__model=Repository(FILES)) as hub:
        outcome = download(hub, tmp_path, "org/model", "--trust-remote-code")
    assert (Path(outcome.events("resolved")[0]["folder"]) / "modeling_custom.py").is_file()


def test_a_cut_connection_is_resumed_where_it_broke(tmp_path: Path) -> None:
    chunk = 10 * 2**20  # what huggingface_hub writes at a time
    weights = WEIGHTS * 25
    with served(org__model=Repository({**FILES, "model.safetensors": weights})) as hub:
        hub.cut_after["model.safetensors"] = [chunk + 1000, chunk + 1000]
        outcome = download(hub, tmp_path, "org/model")
        assert outcome.code == 0
        assert hub.downloads("model.safetensors") == ["", f"bytes={chunk}-", f"bytes={2 * chunk}-"]
        folder = Path(outcome.events("resolved")[0]["folder"])
        assert (folder / "model.safetensors").read_bytes() == weights


def test_a_file_is_tried_five_times(tmp_path: Path) -> None:
    with served(org__model=Repository(FILES)) as hub:
        hub.failures["tokenizer.json"] = [500, 500, 500, 500]
        outcome = download(hub, tmp_path, "org/model")
        assert outcome.code == 0
        assert sum("try 4 of 5 failed" in line["message"] for line in outcome.lines) == 1


def test_a_revision_is_looked_up_by_its_name(tmp_path: Path) -> None:
    with served(org__model=Repository(FILES)) as hub:
        assert download(hub, tmp_path, "org/model", "--revision", SHA).code == 0
        outcome = download(hub, tmp_path, "org/model", "--revision", "nope")
        assert (outcome.code, outcome.errors) == (1, ["`org/model` has no revision `nope`; check --revision"])


@pytest.mark.parametrize(
    ("model_id", "env", "text"),
    [
        ("org/gated", {}, "`org/gated` is gated: accept its licence on its page on the hub, and set HF_TOKEN"),
        ("org/missing", {}, "`org/missing` is not on the hub, or it is private"),
        ("org/model", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ("org/pickled", {}, "only pickled weights (pytorch_model.bin)"),
        ("org/other", {}, "has no config.json"),
        ("not a model!", {}, "neither a folder nor a model id"),
        ("./nothing-here", {}, "there is no folder ./nothing-here"),
    ],
)
def test_what_cannot_be_downloaded_is_one_line_with_a_remedy(
    tmp_path: Path, model_id: str, env: dict[str, str], text: str
) -> None:
    repositories = {
        "org__model": Repository(FILES),
        "org__gated": Repository(FILES, gated=True),
        "org__pickled": Repository({"config.json": b"{}", "pytorch_model.bin": b"\x80"}),
        "org__other": Repository({"README.md": b""}),
    }
    with served(**repositories) as hub:
        outcome = download(hub, tmp_path, model_id, **env)
    assert outcome.code == 1
    (error,) = outcome.errors
    assert text in error and "\n" not in error
    assert not any("exception" in line for line in outcome.lines)
    assert not outcome.events("resolved")


def test_a_hub_that_cannot_be_reached_is_one_line_too() -> None:
    # Not through a real download: the library itself tries for half a minute.
    message = r"cannot be reached .*ConnectError: refused.*check the network"
    with pytest.raises(ConfigError, match=message), explained("org/model", None, has_token=False):
        raise LocalEntryNotFoundError("long story") from httpx2.ConnectError("refused")


def test_a_token_opens_a_gated_model(tmp_path: Path) -> None:
    with served(org__gated=Repository(FILES, gated=True)) as hub:
        assert download(hub, tmp_path, "org/gated", HF_TOKEN="hf_x").code == 0


def test_what_a_killed_download_left_is_removed(tmp_path: Path) -> None:
    blobs = tmp_path / "hub/models--org--model/blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{'a' * 64}.0123abcd.incomplete").write_bytes(b"half")
    with served(org__model=Repository(FILES)) as hub:
        assert download(hub, tmp_path, "org/model").code == 0
    assert not list(blobs.glob("*.incomplete"))


@pytest.mark.parametrize(
    ("files", "weights"),
    [
        (["model.safetensors", "config.json"], ["model.safetensors"]),
        (["model.safetensors", "consolidated.safetensors"], ["model.safetensors"]),
        (["model.safetensors", "optimizer.safetensors", "training_args.safetensors"], ["model.safetensors"]),
        (["model.safetensors", "onnx/model.safetensors"], ["model.safetensors"]),
        (
            ["model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json", "model.safetensors"],
            ["model-1.safetensors", "model-2.safetensors"],
        ),
    ],
)
def test_the_weights_are_chosen(files: list[str], weights: list[str]) -> None:
    assert choose_files(files)[0] == weights


def test_the_small_files_are_chosen() -> None:
    files = [
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.model", "vocab.txt", "merges.txt",
        "chat_template.jinja", "additional_chat_templates/rag.jinja", "model.safetensors.index.json", "x.py",
        "pytorch_model.bin.index.json", "README.md", "runs/log.json", "training_args.json", "pytorch_model.bin",
    ]  # fmt: skip
    assert choose_files(files)[1] == [
        "additional_chat_templates/rag.jinja", "chat_template.jinja", "config.json", "generation_config.json",
        "merges.txt", "model.safetensors.index.json", "tokenizer.model", "vocab.txt",
    ]  # fmt: skip


def test_folders_are_taken_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        find_model(str(tmp_path), None, {})
    (tmp_path / "config.json").write_text("{}")
    assert find_model(str(tmp_path), None, {}).folder == tmp_path.resolve()
    assert find_model("org/model", None, {"WEIGHTS_CACHE_OVERRIDE": str(tmp_path)}).folder == tmp_path.resolve()
    assert find_model("embedded", None, {}).folder.name == "files"
