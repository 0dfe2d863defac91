"""Which files a model is made of, and which of them are here: against a hub on a local port."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from downloading import FILES, WEIGHTS, Outcome, download
from fake_hub import SHA, FakeHub, Repository, served
from text_generation_server.config import ConfigError
from text_generation_server.weights.hub import choose_files, find_model

CODE_MODEL = {**FILES, "config.json": b'{"auto_map": {"AutoModel": "modeling_custom.Model", "AutoConfig": "a/b--c.D"}}'}


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with served(org__model=Repository(FILES), org__code=Repository(CODE_MODEL)) as hub:
        yield hub


def contents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_download_brings_what_is_needed_and_says_where(hub: FakeHub, tmp_path: Path) -> None:
    outcome = download(hub, tmp_path, "org/model")
    assert (outcome.code, outcome.errors) == (0, [])
    (resolved,) = outcome.events("resolved")
    assert contents(outcome.folder) == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert (outcome.folder / "model.safetensors").read_bytes() == WEIGHTS
    assert (resolved["sha"], resolved["pipeline_tag"]) == (SHA, "text-generation")
    (last,) = [event for event in outcome.events("progress") if event["file"] == "model.safetensors"][-1:]
    assert (last["done"], last["total"], last["unit"]) == (len(WEIGHTS), len(WEIGHTS), "bytes")

    hub.requests.clear()
    again = download(hub, tmp_path, "org/model")
    assert again.code == 0 and not any("org/model" in path for _, path, _ in hub.requests), (
        "the second time needs no network"
    )
    assert again.lines[0]["message"] == "Files are already present on the host. Skipping download."
    assert again.folder == outcome.folder

    offline = download(hub, tmp_path, "org/model", HF_HUB_OFFLINE="1")
    assert offline.code == 0 and offline.events("resolved")[0]["sha"] == SHA


def test_a_plan_brings_the_configuration_alone(hub: FakeHub, tmp_path: Path) -> None:
    code = (
        "import os; from text_generation_server.weights.hub import find_config\n"
        "print(find_config('org/model', None, os.environ).folder)"
    )
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert contents(Path(done.stdout.strip())) == ["config.json"]
    assert download(hub, tmp_path, "org/model").code == 0, "a part of a model is no model"
    assert hub.downloads("model.safetensors")


def test_code_is_downloaded_only_for_who_trusts_it(hub: FakeHub, tmp_path: Path) -> None:
    outcome = download(hub, tmp_path, "org/code", "--trust-remote-code")
    assert "modeling_custom.py" in contents(outcome.folder)
    again = download(hub, tmp_path, "org/code", "--trust-remote-code")
    assert "Files are already present on the host. Skipping download." in [line["message"] for line in again.lines]


def test_code_is_downloaded_when_it_is_trusted_later(hub: FakeHub, tmp_path: Path) -> None:
    outcome = download(hub, tmp_path, "org/code")
    assert "modeling_custom.py" not in contents(outcome.folder)
    offline = download(hub, tmp_path, "org/code", "--trust-remote-code", HF_HUB_OFFLINE="1")
    (error,) = offline.errors
    assert offline.code == 1 and error.startswith("`org/code` is not complete in the cache and HF_HUB_OFFLINE is set")
    assert "the cache has a part of org/code: modeling_custom.py is missing" in offline.lines[0]["message"]

    hub.requests.clear()
    assert download(hub, tmp_path, "org/code", "--trust-remote-code").code == 0
    assert "modeling_custom.py" in contents(outcome.folder)
    assert hub.downloads("modeling_custom.py") == [""] and hub.downloads("model.safetensors") == []


@pytest.mark.parametrize("removed", [["tokenizer.json", "tokenizer_config.json"], ["tokenizer_config.json"]])
def test_what_another_program_has_not_fetched_is_downloaded(hub: FakeHub, tmp_path: Path, removed: list[str]) -> None:
    outcome = cached_in_part(hub, tmp_path, removed)
    hub.requests.clear()
    assert download(hub, tmp_path, "org/model").code == 0
    assert set(removed) < set(contents(outcome.folder))
    assert hub.downloads("model.safetensors") == []


def test_offline_a_model_without_a_tokenizer_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    cached_in_part(hub, tmp_path, ["tokenizer.json", "tokenizer_config.json"])
    offline = download(hub, tmp_path, "org/model", HF_HUB_OFFLINE="1")
    (error,) = offline.errors
    assert offline.code == 1 and error.startswith("`org/model` is not complete in the cache and HF_HUB_OFFLINE is set")


def test_offline_a_model_without_its_chat_template_is_served(hub: FakeHub, tmp_path: Path) -> None:
    outcome = cached_in_part(hub, tmp_path, ["tokenizer_config.json"])
    offline = download(hub, tmp_path, "org/model", HF_HUB_OFFLINE="1")
    assert (offline.code, offline.folder) == (0, outcome.folder)
    (warning,) = [line["message"] for line in offline.lines if line["level"] == "WARNING"]
    assert warning.startswith("the cache has no tokenizer_config.json, perhaps no chat template: `org/model` is not")


def cached_in_part(hub: FakeHub, home: Path, removed: list[str]) -> Outcome:
    """The cache as a program leaves it that has no use for some of the files."""
    outcome = download(hub, home, "org/model")
    for name in removed:
        (outcome.folder / name).resolve().unlink()
        (outcome.folder / name).unlink()
    return outcome


def test_a_revision_is_looked_up_by_its_name(hub: FakeHub, tmp_path: Path) -> None:
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


def test_a_token_opens_a_gated_model(tmp_path: Path) -> None:
    with served(org__gated=Repository(FILES, gated=True)) as hub:
        assert download(hub, tmp_path, "org/gated", HF_TOKEN="hf_x").code == 0


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
        "modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "onnx/config.json",
    ]  # fmt: skip
    assert choose_files(files)[1] == [
        "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors",
        "additional_chat_templates/rag.jinja", "chat_template.jinja", "config.json", "generation_config.json",
        "merges.txt", "model.safetensors.index.json", "modules.json", "tokenizer.model", "vocab.txt",
    ]  # fmt: skip


def test_folders_are_taken_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        find_model(str(tmp_path), None, {})
    (tmp_path / "config.json").write_text("{}")
    assert find_model(str(tmp_path), None, {}).folder == tmp_path.resolve()
    assert find_model("embedded", None, {}).folder.name == "files"


@pytest.mark.parametrize("model_id", ["org/model", "embedded", "."])
def test_the_override_replaces_every_model(tmp_path: Path, model_id: str) -> None:
    env = {"WEIGHTS_CACHE_OVERRIDE": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"WEIGHTS_CACHE_OVERRIDE .* has no config\.json"):
        find_model(model_id, None, env)
    (tmp_path / "config.json").write_text("{}")
    assert find_model(model_id, None, env).folder == tmp_path.resolve()
