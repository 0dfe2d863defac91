"""How a server ends: asked to, by losing a part of itself, and without a chance to say a word."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from integration.asking import WITHIN_S, body, connect, generate, metrics, num_in_progress, wait_for_status
from integration.launched import Launched, message_of, serving, starting
from integration.reciting import ENDLESS

NUM_STREAMS = 8
LONG = 1000
SHUTTING_DOWN = {"error": "Server is shutting down", "error_type": "shutting_down"}


@pytest.fixture
def server(reciting_model: Path) -> Iterator[Launched]:
    """A server for the test alone, which ends it."""
    with starting("--model-id", str(reciting_model), "--max-shard-restarts", "0") as started:
        started.wait_until_ready()
        yield started


@contextlib.asynccontextmanager
async def running_streams(server: Launched) -> AsyncIterator[list[asyncio.Task[list[dict[str, Any]]]]]:
    """Streams whose first token has come; each task ends with all the events that its client has read."""
    begun = asyncio.Queue[None]()

    async def read() -> list[dict[str, Any]]:
        events = []
        async with connect(server, "/generate_stream", body(ENDLESS, max_new_tokens=LONG)) as connection:
            async for event in connection.events():
                events.append(event)
                if len(events) == 1:
                    begun.put_nowait(None)
        return events

    tasks = [asyncio.create_task(read()) for _ in range(NUM_STREAMS)]
    async with asyncio.timeout(WITHIN_S):
        for _ in tasks:
            await begun.get()
    yield tasks
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.fault("F8", "SIGTERM with streams shorter than the grace", "all finish, new ones 503, exit 0")
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
async def test_streams_finish_when_the_server_is_asked_to_end(server: Launched, number: signal.Signals) -> None:
    async with running_streams(server) as streams:
        with server.shards_frozen():  # so that none of them ends meanwhile
            assert num_in_progress(metrics(server)) == NUM_STREAMS
            server.process.send_signal(number)
            wait_for_status(server, "/health", 503)
            refused = server.client.post("/generate", json=body("a"))
            assert (refused.status_code, refused.json()) == (503, SHUTTING_DOWN)
            assert server.client.get("/live").status_code == 200
        texts = ["".join(event["token"]["text"] for event in await stream) for stream in streams]
    assert [len(text) for text in texts] == [LONG] * NUM_STREAMS
    assert server.end() == 0
    assert server.errors == []
    assert sum(message_of(line) == "Success" for line in server.lines) == NUM_STREAMS


@pytest.mark.slow
@pytest.mark.fault("F9", "SIGTERM with streams longer than the grace", "an error event for each, exit 0")
async def test_a_drain_that_takes_too_long_ends_with_an_error_for_every_client(reciting_model: Path) -> None:
    with starting("--model-id", str(reciting_model), "--graceful-termination-timeout", "1") as server:
        server.wait_until_ready()
        async with running_streams(server) as streams:
            with server.shards_frozen():
                server.process.send_signal(signal.SIGTERM)
                ends = [(await stream)[-1] for stream in streams]
        assert ends == [SHUTTING_DOWN] * NUM_STREAMS
        assert server.end() == 0


@pytest.mark.slow
async def test_a_shard_that_is_killed_ends_the_server_in_one_line(server: Launched) -> None:
    async with running_streams(server) as streams:
        server.processes()["shard 0"].kill()
        ends = [(await stream)[-1] for stream in streams]
    assert all(end.get("error_type") == "generation" for end in ends), ends
    assert server.end() == 1
    assert server.errors[-1].startswith("Shard 0 crashed: killed by signal 9")
    assert "Traceback" not in server.text


@pytest.mark.fault("F6", "SIGKILL of the router", "shards end, exit 1")
@pytest.mark.slow
async def test_a_router_that_is_killed_ends_the_server_in_one_line(server: Launched) -> None:
    server.processes()["router"].kill()
    assert server.end() == 1
    assert server.errors[-1].startswith("Webserver Crashed: killed by signal 9")


@pytest.mark.slow
@pytest.mark.fault("F12", "SIGKILL of the launcher", "no process is left")
async def test_no_process_outlives_a_launcher_that_is_killed(server: Launched) -> None:
    async with running_streams(server):
        assert len(server.processes()) == 4
        server.process.kill()
        assert server.end() == -signal.SIGKILL


@pytest.mark.fault("F11", "SIGTERM while the model loads", "exit 0, nothing left")
def test_a_launch_that_is_interrupted_while_it_loads_ends_well(reciting_model: Path) -> None:
    with starting("--model-id", str(reciting_model)) as server:
        while "Starting Webserver" not in server.text:
            assert server.process.poll() is None
        assert server.stop() == 0
        assert server.errors == []


@pytest.mark.fault("F27", "two launchers side by side", "their ranks, sockets and ports never meet")
@pytest.mark.slow
def test_two_servers_side_by_side_never_meet(tiny_llama: Path, reciting_model: Path) -> None:
    """Started at the same moment, two ranks each: nobody's ranks, sockets or ports are anybody else's."""
    with (
        starting("--model-id", str(reciting_model), "--num-shard", "2") as one,
        starting("--model-id", str(tiny_llama), "--num-shard", "2") as two,
    ):
        one.wait_until_ready()
        two.wait_until_ready()
        assert generate(one, "a", max_new_tokens=3)["generated_text"] == "bcd"
        assert generate(two, "a", max_new_tokens=3)["generated_text"] != "bcd"
        assert len(one.processes()) == len(two.processes()) == 5
        assert one.stop() == 0
        assert metrics(two)["tgi_request_success"] == 1
        assert len(generate(two, "a", max_new_tokens=3)["details"]["tokens"]) == 3
        assert two.stop() == 0


@pytest.mark.slow
def test_a_killed_rank_ends_its_peer(reciting_model: Path) -> None:
    with serving("--model-id", str(reciting_model), "--num-shard", "2", "--max-shard-restarts", "0") as server:
        server.processes()["shard 1"].kill()
        assert server.end() == 1
        assert server.errors[-1].startswith("Shard 1 crashed: killed by signal 9")
