"""``download-weights`` in a process of its own, as the launcher runs it, against a hub on a local port."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fake_hub import FakeHub

WEIGHTS = bytes(range(256)) * 4000
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": WEIGHTS,
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b'{"eos_token": null}',
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

    @property
    def folder(self) -> Path:
        (resolved,) = self.events("resolved")
        return Path(resolved["folder"])

    def events(self, name: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line.get("event") == name]


def start_download(hub: FakeHub, home: Path, *arguments: str, **env: str) -> subprocess.Popen[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "TGI_"))}
    return subprocess.Popen(
        [sys.executable, "-m", "text_generation_server", "download-weights", *arguments],
        env=clean | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "TGI_DOWNLOAD_PAUSE_S": "0.05", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome_of(process: subprocess.Popen[str]) -> Outcome:
    try:
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert stdout == ""
    return Outcome(process.returncode, [json.loads(line) for line in stderr.splitlines()])


def download(hub: FakeHub, home: Path, *arguments: str, **env: str) -> Outcome:
    return outcome_of(start_download(hub, home, *arguments, **env))
