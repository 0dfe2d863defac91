"""A model of the hub, from the first launch to its answers; the hub is on a local port."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import pytest
from fake_hub import SHA, Repository, served
from integration.launched import ONE_THREAD, message_of, serving, starting

WEIGHTS = "model.safetensors"
WITHIN_S = 120.0


@pytest.mark.slow
@pytest.mark.fault(
    "F16", "SIGKILL in the middle of a download", "the next launch goes on with it; no file is left over"
)
def test_a_launch_that_was_killed_is_gone_on_with_by_the_next(tiny_llama: Path, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in tiny_llama.iterdir() if path.is_file()}
    nine_tenths = len(files[WEIGHTS]) * 9 // 10
    with served(org__tiny=Repository(files)) as hub:
        environ = {**ONE_THREAD, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        hub.stall_after[WEIGHTS] = [nine_tenths]
        name = f"{hashlib.sha256(files[WEIGHTS]).hexdigest()}.incomplete"
        with starting("--model-id", "org/tiny", environ=environ) as killed:
            deadline = time.monotonic() + WITHIN_S
            while nine_tenths not in [path.stat().st_size for path in tmp_path.rglob(name)]:
                assert time.monotonic() < deadline and killed.process.poll() is None
                time.sleep(0.02)
            killed.process.kill()
            killed.process.wait()
            killed.assert_gone()
        hub.go_on.set()
        with serving("--model-id", "org/tiny", environ=environ) as server:
            assert hub.downloads(WEIGHTS) == ["", f"bytes={nine_tenths}-"]
            info = server.client.get("/info").json()
            assert (info["model_id"], info["model_sha"], info["model_pipeline_tag"]) == (
                "org/tiny", SHA, "text-generation"
            )  # fmt: skip
            answer = server.client.post("/generate", json={"inputs": "a", "parameters": {"max_new_tokens": 2}})
            assert answer.status_code == 200
            assert any(f"{nine_tenths} of {len(files[WEIGHTS])} bytes are here" in message_of(x) for x in server.lines)
