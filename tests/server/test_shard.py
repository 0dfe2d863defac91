"""The life of a shard as a process: what ends it, and with which code."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import two_ranks
from text_generation_proto.v1 import generate_pb2 as pb
from text_generation_proto.v1 import generate_pb2_grpc as pb_grpc
from text_generation_server.engine.engine import STEP_FAILED

NEUTRAL = pb.SamplingParameters(temperature=1, top_p=1, typical_p=1, repetition_penalty=1)
PREFILL = pb.Prefill(
    new_sequences=[
        pb.NewSequence(sequence_id=1, token_ids=[5, 6], num_prompt_tokens=2, blocks=[1], sampling=NEUTRAL),
    ],
    chunks=[pb.Chunk(sequence_id=1, num_tokens=2)],
)


@contextlib.contextmanager
def broken_group(folder: Path, place: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two ranks of a model that breaks on rank 1; rank r logs to ``log-r``."""
    port = two_ranks.free_port()
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(2):
            group = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
            command = [sys.executable, two_ranks.__file__, "serve", str(folder), "--sharded", "--uds-path"]
            with open(place / f"log-{rank}", "wb") as log:
                ranks.append(subprocess.Popen([*command, str(place / "shard")], env=os.environ | group, stderr=log))
        yield ranks
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def errors(log: Path) -> list[str]:
    lines: list[dict[str, Any]] = [json.loads(line) for line in log.read_text().splitlines()]
    return [line["message"] for line in lines if line["level"] == "ERROR"]


@pytest.mark.slow
def test_a_rank_that_fails_says_why_and_the_group_ends(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    with broken_group(tiny_model("llama"), tmp_path) as ranks, contextlib.ExitStack() as stack:
        channels = [stack.enter_context(grpc.insecure_channel(f"unix://{tmp_path}/shard-{rank}")) for rank in range(2)]
        stubs = [pb_grpc.TextGenerationStub(channel) for channel in channels]  # type: ignore[no-untyped-call]
        for stub in stubs:
            stub.Warmup(pb.WarmupRequest(max_total_tokens=64, max_concurrent_requests=4), wait_for_ready=True)
        prefill = pb.PrefillRequest(step_id=1, prefill=PREFILL)
        for call in [stub.Prefill.future(prefill) for stub in stubs]:
            assert not call.result(30).HasField("failure")
        calls = [stub.Decode.future(pb.DecodeRequest(step_id=2, decode=pb.Decode(sequence_ids=[1]))) for stub in stubs]
        assert calls[1].result(30).failure.message == STEP_FAILED
        assert [rank.wait(30) for rank in ranks] == [1, 1]
    failed, ended = errors(tmp_path / "log-1")
    assert failed == "step 2 of epoch 0 failed: ValueError: the model broke down\nin many lines"
    assert ended == "shard 1 ends, it can compute no further step: ValueError: the model broke down"
    assert not list(tmp_path.glob("shard-*"))
