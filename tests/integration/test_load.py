"""Many clients at once, clients that go away, and nothing left of them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from integration.asking import (
    Connection,
    body,
    connect,
    generate,
    metrics,
    num_in_progress,
    wait_until,
    wait_until_idle,
)
from integration.crowd import PERMITS
from integration.launched import Launched, serving
from integration.processes import footprint, idle_cpu_s
from integration.reciting import ENDLESS, POSITIONS

OVERLOADED = {"error": "Model is overloaded", "error_type": "overloaded"}
LONG = 400
LONG_BODY = body(ENDLESS, max_new_tokens=LONG)


@asynccontextmanager
async def streams(server: Launched, number: int, request: dict[str, Any]) -> AsyncIterator[list[Connection]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(connect(server, "/generate_stream", request)) for _ in range(number)]


async def test_128_streams_run_and_the_129th_is_refused(reciting: Launched) -> None:
    async with AsyncExitStack() as stack:
        with reciting.shards_frozen():  # so that none of them ends before the last has begun
            connections = await stack.enter_async_context(streams(reciting, PERMITS, LONG_BODY))
            wait_until(reciting, lambda now: num_in_progress(now) == PERMITS)
            for path in ("/generate", "/generate_stream", "/"):
                refused = reciting.client.post(path, json=body("hi"))
                assert (refused.status_code, refused.json()) == (429, OVERLOADED)
            # What needs no permit still answers.
            assert reciting.client.post("/tokenize", json={"inputs": "hi"}).status_code == 200
        wait_until(reciting, lambda now: now["tgi_batch_current_size"] == PERMITS)
        ends = [[event async for event in connection.events()][-1] for connection in connections]
    assert [end["index"] for end in ends] == [LONG] * PERMITS
    assert len({end["generated_text"] for end in ends}) == 1, "the same answer to everybody"
    wait_until_idle(reciting)


async def leave(server: Launched, request: dict[str, Any], number: int, rng: random.Random) -> None:
    """A client that goes away by FIN or RST. One of five asks for no stream, another waits for no piece of it."""
    path = "/generate" if number % 5 == 0 else "/generate_stream"
    async with connect(server, path, request) as connection:
        for _ in range(number % 5 - 1):
            await connection.some()
        if number % 5 < 2:
            await asyncio.sleep(rng.uniform(0, 0.05))  # while it is read, checked, queued or computed
        if number % 2:
            connection.reset()
        else:
            await connection.leave()


@pytest.mark.fault("F13", "1,000 clients go away, by FIN and by RST", "blocks, permits and descriptors as before")
def test_1000_clients_that_go_away_leave_nothing_behind(reciting: Launched) -> None:
    processes = reciting.processes()
    rng = random.Random(3)

    async def wave(size: int) -> None:
        await asyncio.gather(*(leave(reciting, LONG_BODY, number, rng) for number in range(size)))

    asyncio.run(wave(100))  # what is made once and kept is there after these
    first = wait_until_idle(reciting)
    before = {role: footprint(process) for role, process in processes.items()}
    for _ in range(10):
        asyncio.run(wave(100))
    last = wait_until_idle(reciting)
    assert last["tgi_request_success"] == first["tgi_request_success"], "none of them stayed to the end"
    # A connection that is reset before its request has been read never becomes a request.
    assert last["tgi_request_cancelled"] - first["tgi_request_cancelled"] > 900
    for role, process in processes.items():
        footprint(process, at_most=before[role])
    assert generate(reciting, "hi", max_new_tokens=3)["details"]["generated_tokens"] == 3


async def test_what_a_client_held_is_free_before_the_next_step(reciting: Launched) -> None:
    async with streams(reciting, 8, body(ENDLESS, max_new_tokens=POSITIONS - 96)) as running:
        await asyncio.gather(*(connection.some() for connection in running))
        with reciting.shards_frozen():
            assert metrics(reciting)["tgi_batch_current_size"] == 8
            for connection in running[::2]:
                connection.reset()
            await asyncio.gather(*(connection.leave() for connection in running[1::2]))
            wait_until_idle(reciting)


@pytest.mark.fault("F13", "a client goes away while it waits", "it is forgotten")
async def test_a_client_that_leaves_the_queue_is_forgotten(reciting: Launched) -> None:
    with reciting.shards_frozen():
        async with streams(reciting, 1, LONG_BODY), streams(reciting, 40, LONG_BODY) as waiting:
            wait_until(reciting, lambda now: num_in_progress(now) == 41)
            for connection in waiting[::2]:
                connection.reset()
            await asyncio.gather(*(connection.leave() for connection in waiting[1::2]))
            wait_until(reciting, lambda now: num_in_progress(now) == 1 and now["tgi_queue_size"] <= 1)
    wait_until_idle(reciting)


@pytest.mark.parametrize("name", ["embedded", "reciting"])
def test_an_idle_server_uses_no_processor(request: pytest.FixtureRequest, name: str) -> None:
    assert_idle(request.getfixturevalue(name), {"launcher", "router", "grammar worker", "shard 0"})


@pytest.mark.slow
def test_idle_ranks_do_not_spin_while_they_wait_for_each_other(tiny_llama: Path) -> None:
    with serving("--model-id", str(tiny_llama), "--num-shard", "2") as server:
        assert_idle(server, {"launcher", "router", "grammar worker", "shard 0", "shard 1"})


def assert_idle(server: Launched, roles: set[str]) -> None:
    generate(server, "hi", max_new_tokens=20)
    wait_until_idle(server)
    for _ in range(10):  # what spins does so in every look; a busy machine makes the few wake-ups dear in some
        used = idle_cpu_s(server.processes(), over_s=3.0)
        assert set(used) == roles
        if max(used.values()) < 0.05:
            break
    assert max(used.values()) < 0.05, used
