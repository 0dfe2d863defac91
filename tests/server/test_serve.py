from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

SLOW_LOADING = """
import tempfile, time
from text_generation_server import cli, shard

def load_model(*arguments):
    with tempfile.TemporaryDirectory():
        print("loading", flush=True)
        time.sleep(60)

shard.load_model = load_model
cli.app()
"""


def test_a_start_that_is_cut_off_leaves_no_file_behind(tiny_llama: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SLOW_LOADING, "serve", str(tiny_llama), "--uds-path", str(tmp_path / "shard")]
    with subprocess.Popen(command, env=os.environ | {"TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"loading\n"
        assert os.listdir(tmp_path)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert os.listdir(tmp_path) == []
