from __future__ import annotations

from pathlib import Path

import pytest
from text_generation_launcher import devices
from text_generation_launcher.devices import count_devices, package_version


@pytest.mark.parametrize(
    ("environ", "count"),
    [
        ({}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2"}, 3),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, 0),
        ({"CUDA_VISIBLE_DEVICES": "GPU-aa,GPU-bb", "NVIDIA_VISIBLE_DEVICES": "0"}, 2),
        ({"NVIDIA_VISIBLE_DEVICES": "0,1"}, 2),
        ({"ZE_AFFINITY_MASK": "0,1"}, 2),
    ],
)
def test_devices_are_counted_as_the_environment_names_them(environ: dict[str, str], count: int | None) -> None:
    assert count_devices(environ) == count


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two cards."""
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\ncase $1 in *uuid*) echo GPU-1; echo GPU-2;; *) echo NVIDIA H200; echo NVIDIA H200;; esac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")


def test_all_devices_are_counted_by_nvidia_smi(nvidia_smi: None) -> None:
    assert count_devices({"NVIDIA_VISIBLE_DEVICES": "all"}) == 2


@pytest.mark.parametrize(("torch", "card"), [("2.13.0+cpu", None), ("2.13.0+cu130", "nvidia-h200")])
def test_the_card(nvidia_smi: None, monkeypatch: pytest.MonkeyPatch, torch: str, card: str | None) -> None:
    monkeypatch.setattr(devices, "package_version", lambda name: torch)
    assert devices.find_devices({}).card == card
    assert devices.find_devices({"CUDA_VISIBLE_DEVICES": ""}).card is None


def test_a_package_that_is_not_there_has_no_version() -> None:
    assert package_version("no-such-package-of-ours") == "N/A"
