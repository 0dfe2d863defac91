"""`text-generation-server` on its own, with the command lines of TGI's scripts."""

from __future__ import annotations

import subprocess
import sys

import pytest

TGIS_OPTIONS = [
    *("--revision", "main", "--upload-to-model-id", "org/quantized", "--percdamp", "0.01", "--act-order"),
    *("--groupsize", "128", "--trust-remote-code", "--logger-level", "INFO", "--json-output"),
]


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["org/model", "folder"], id="without options"),
        pytest.param(["org/model", "folder", *TGIS_OPTIONS], id="options behind the arguments"),
        pytest.param([*TGIS_OPTIONS, "org/model", "folder"], id="options before the arguments"),
    ],
)
def test_quantize_is_refused_as_such_and_not_for_its_options(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "text_generation_server", "quantize", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert "`quantize` is not supported yet" in line
