"""Which accelerators are there, without importing torch."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata


@dataclass(frozen=True, slots=True)
class Devices:
    count: int | None
    """As the environment names them; None when it does not. TGI counts no others."""
    card: str | None
    """Such as ``nvidia-a100-sxm4-80gb``; None on a CPU."""


def find_devices(environ: Mapping[str, str]) -> Devices:
    count = count_devices(environ)
    return Devices(count=count, card=None if count == 0 else _card_name())


def count_devices(environ: Mapping[str, str]) -> int | None:
    for variable in ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"):
        value = environ.get(variable)
        if value is None:
            continue
        if variable == "NVIDIA_VISIBLE_DEVICES" and value in ("all", "void"):
            return len(query("--query-gpu=uuid", "--format=csv,noheader"))
        return len([entry for entry in value.split(",") if entry.strip() not in ("", "-1", "void", "none")])
    return None


def query(*arguments: str) -> list[str]:
    """Non-empty lines that ``nvidia-smi`` prints; none where it is missing or broken."""
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        answer = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, errors="replace", timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.rstrip() for line in answer.stdout.splitlines() if line.strip()]


def package_version(name: str) -> str:
    """Installed version, read from the package's metadata: importing torch would take seconds."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "N/A"


def _card_name() -> str | None:
    # A CPU build of torch computes on the CPU whatever cards there are.
    if package_version("torch").endswith("+cpu"):
        return None
    names = query("--query-gpu=gpu_name", "--format=csv,noheader")
    return names[0].strip().lower().replace(" ", "-") if names else None
