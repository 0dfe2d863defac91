"""F1 to F5, F19, F23: shards that die, hang, or fail in a step, under streams that must not notice."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from faults.hostile_model import HANG, KILL, NAN, OUT_OF_MEMORY, RAISE
from faults.ledger import End, assert_equal, ledger, undisturbed
from integration.asking import WITHIN_S, body, metrics, wait_for_status, wait_until_idle
from integration.launched import Launched, message_of, serving, starting
from integration.reciting import ENDLESS
from tiny_models import make_tiny_encoder

pytestmark = pytest.mark.slow  # `make test-faults`

Record = Callable[[str, object], None]
fault = pytest.mark.fault
GO_ON = "all go on with the undisturbed tokens"
NUM_STREAMS = 32
TOKENS = 300
GRAMMAR = {"type": "regex", "value": "[a-f]{60,280}"}


def mixed_requests(count: int = NUM_STREAMS, tokens: int = TOKENS) -> list[tuple[dict[str, Any], bool]]:
    """Greedy and sampled, guided and free, streams and whole answers; with whether it is a stream."""
    requests = []
    for number in range(count):
        parameters: dict[str, Any] = {"max_new_tokens": tokens - number}
        if number % 2:
            parameters |= {"do_sample": True, "seed": number, "temperature": 1.3}
        if number % 4 == 3:
            parameters["grammar"] = GRAMMAR
        if number % 8 == 6:
            parameters |= {"repetition_penalty": 1.2}
        requests.append((body(f"stream {number} begins", **parameters), number % 5 != 4))
    return requests


@pytest.mark.parametrize(
    ("ranks", "victim"),
    [
        pytest.param(1, "shard 0", marks=fault("F1", "SIGKILL of the only shard, 32 streams", GO_ON)),
        pytest.param(2, "shard 1", marks=fault("F2", "SIGKILL of rank 1 of 2, 32 streams", GO_ON)),
    ],
)
async def test_a_shard_is_killed_under_32_streams(
    long_llama: Path, record_property: Record, ranks: int, victim: str
) -> None:
    with starting("--model-id", str(long_llama), "--num-shard", str(ranks)) as server:
        server.wait_until_ready()
        requests = mixed_requests()
        expected = await undisturbed(server, requests)
        async with ledger(server) as books:
            books.send_all(requests)
            await books.begun()
            killed_at = time.monotonic()
            server.processes()[victim].kill()
            await books.ended()
            gap_s = time.monotonic() - killed_at
        assert books.ends == {"ok": NUM_STREAMS}
        assert_equal(books.entries, expected)
        values = wait_until_idle(server)
        assert values["tgi_request_replay_count"] > 0
        assert server.stop() == 0
        record_property("seen", f"{books.ends}, equal; all done {gap_s:.1f} s later")


@fault("F1", "SIGKILL of the only shard, 32 streams, bfloat16", "all go on; the share with the undisturbed tokens")
async def test_bfloat16_streams_go_on(long_llama: Path, record_property: Record) -> None:
    """Kernels round by the shape of a step, so a stream may differ from itself without any fault: both are told."""
    with starting("--model-id", str(long_llama), "--dtype", "bfloat16") as server:
        server.wait_until_ready()
        requests = mixed_requests()
        expected = await undisturbed(server, requests)
        again = await undisturbed(server, requests)
        async with ledger(server) as books:
            books.send_all(requests)
            await books.begun()
            server.processes()["shard 0"].kill()
            await books.ended()
        assert books.ends == {"ok": NUM_STREAMS}
        assert server.stop() == 0
        equal, by_itself = (
            sum(got.token_ids == wanted.token_ids for got, wanted in zip(entries, expected, strict=True))
            for entries in (books.entries, again)
        )
        record_property("seen", f"{books.ends}, {equal} of {NUM_STREAMS} equal; without a fault {by_itself}")


@fault("F7", "the shards' sockets are removed while it serves", "nothing is lost; they are made again with the shards")
async def test_sockets_that_are_removed(long_llama: Path, record_property: Record) -> None:
    with starting("--model-id", str(long_llama), "--num-shard", "2") as server:
        server.wait_until_ready()
        requests = mixed_requests(8)
        expected = await undisturbed(server, requests)
        command = server.processes()["router"].cmdline()
        sockets = Path(command[command.index("--master-shard-uds-path") + 1]).parent
        async with ledger(server) as books:
            books.send_all(requests)
            await books.begun()
            removed = [path for path in sockets.iterdir() if path.is_socket()]
            assert len(removed) >= 2
            for path in removed:
                path.unlink()
            late = books.send(body("late", max_new_tokens=5))
            await books.ended()
        assert late.end is End.OK
        assert_equal(books.entries[:-1], expected)
        assert wait_until_idle(server)["tgi_request_replay_count"] == 0
        server.processes()["shard 1"].kill()
        wait_for_status(server, "/health", 503)
        wait_for_status(server, "/health", 200)
        assert server.client.post("/generate", json=body("after it", max_new_tokens=5)).status_code == 200
        assert server.stop() == 0
        record_property("seen", f"{books.ends}, equal; then a restart, and on")


@pytest.mark.parametrize(
    "ranks",
    [
        pytest.param(1, marks=fault("F1", "the same with `--max-shard-restarts 0`", "errors <= 2 s, exit 1 <= 10 s")),
        pytest.param(2, marks=fault("F2", "the same with `--max-shard-restarts 0`", "errors <= 2 s, exit 1 <= 10 s")),
    ],
)
async def test_a_shard_is_killed_where_nothing_is_restarted(
    reciting_model: Path, record_property: Record, ranks: int
) -> None:
    """TGI's fail-stop."""
    arguments = ("--model-id", str(reciting_model), "--num-shard", str(ranks), "--max-shard-restarts", "0")
    with starting(*arguments) as server:
        server.wait_until_ready()
        async with ledger(server) as books:
            for number in range(8):
                books.send(body(ENDLESS, max_new_tokens=4000), stream=number % 2 == 0)
            await books.begun()
            killed_at = time.monotonic()
            server.processes()[f"shard {ranks - 1}"].kill()
            await books.ended()
            told_s = time.monotonic() - killed_at
        for entry in books.entries:
            assert entry.end is (End.SSE_ERROR if entry.is_stream else End.HTTP_ERROR)
            assert entry.error is not None and entry.error["error_type"] == "generation"
            assert entry.is_stream or entry.status == 424
        assert server.end() == 1
        gone_s = time.monotonic() - killed_at
        assert server.errors[-1].startswith(f"Shard {ranks - 1} crashed: killed by signal 9")
        record_property("seen", f"errors after {told_s:.1f} s, exit 1 after {gone_s:.1f} s")


@fault("F1", "again and again, past `--max-shard-restarts`", "errors to all, exit 1")
async def test_shards_that_keep_dying_are_given_up(reciting_model: Path, record_property: Record) -> None:
    with starting("--model-id", str(reciting_model), "--max-shard-restarts", "1") as server:
        server.wait_until_ready()
        async with ledger(server) as books:
            for _ in range(4):
                books.send(body(ENDLESS, max_new_tokens=4000))
            await books.begun()
            first = server.processes()["shard 0"]
            first.kill()
            wait_for_status(server, "/health", 503)
            wait_for_status(server, "/health", 200)
            server.processes()["shard 0"].kill()
            await books.ended()
        assert books.ends == {"sse_error": 4}
        assert all(entry.error is not None and entry.error["error_type"] == "generation" for entry in books.entries)
        assert server.end() == 1
        assert "1 restarts in the last 10 minutes" in server.errors[-1]
        record_property("seen", f"{books.ends}, exit 1")


@pytest.mark.parametrize(
    ("ranks", "victim"),
    [
        pytest.param(1, "shard 0", marks=fault("F3", "SIGSTOP of the only shard, limit 3 s", f"<= 4 s; {GO_ON}")),
        pytest.param(2, "shard 1", marks=fault("F3", "SIGSTOP of rank 1 of 2, limit 3 s", f"<= 4 s; {GO_ON}")),
    ],
)
async def test_a_shard_stops(long_llama: Path, record_property: Record, ranks: int, victim: str) -> None:
    arguments = ("--model-id", str(long_llama), "--num-shard", str(ranks), "--stall-timeout", "3")
    with starting(*arguments) as server:
        server.wait_until_ready()
        requests = mixed_requests(8)
        expected = await undisturbed(server, requests)
        async with ledger(server) as books:
            books.send_all(requests)
            await books.begun()
            stopped_at = time.monotonic()
            server.processes()[victim].suspend()
            wait_for_status(server, "/health", 503)
            found_s = time.monotonic() - stopped_at
            await books.ended()
        assert_equal(books.entries, expected)
        assert server.client.get("/health").status_code == 200
        assert server.stop() == 0
        record_property("seen", f"found after {found_s:.1f} s, {books.ends}, equal")


@fault("F3", "SIGSTOP of the shard that is started again, while it loads", GO_ON)
async def test_a_shard_stops_while_it_is_started_again(long_llama: Path, record_property: Record) -> None:
    with starting("--model-id", str(long_llama), "--stall-timeout", "3") as server:
        server.wait_until_ready()
        requests = mixed_requests(8)
        expected = await undisturbed(server, requests)
        async with ledger(server) as books:
            books.send_all(requests)
            await books.begun()
            server.processes()["shard 0"].kill()
            (await _next_shard(server, 2)).suspend()
            await books.ended()
        assert_equal(books.entries, expected)
        assert any("Shard 0 hangs: it loads" in message_of(line) for line in server.lines)
        assert server.stop() == 0
        record_property("seen", f"{books.ends}, equal, after {books.longest_gap_s:.0f} s")


@fault("F3", "SIGSTOP of an encoder that was killed and started again while idle, limit 3 s", "all are answered")
async def test_an_encoder_stops_after_it_was_started_again(tmp_path: Path, record_property: Record) -> None:
    folder = make_tiny_encoder("bert", tmp_path / "encoder")
    with starting("--model-id", str(folder), "--stall-timeout", "3") as server:
        server.wait_until_ready()
        texts = {"inputs": ["one text", "another"]}
        expected = server.client.post("/embed", json=texts).json()
        server.processes()["shard 0"].kill()
        shard = await _next_shard(server, 2)
        wait_for_status(server, "/health", 503)
        wait_for_status(server, "/health", 200)
        assert server.client.post("/embed", json=texts).json() == expected
        shard.suspend()
        began = time.monotonic()
        response = await asyncio.to_thread(server.client.post, "/embed", json=texts, timeout=WITHIN_S)
        assert (response.status_code, response.json()) == (200, expected)
        record_property("seen", f"answered after {time.monotonic() - began:.0f} s")
        assert server.stop() == 0


async def _next_shard(server: Launched, incarnation: int) -> psutil.Process:
    """Shard 0, as soon as it is started so often."""
    async with asyncio.timeout(WITHIN_S):
        while True:
            shard = server.processes().get("shard 0")
            with contextlib.suppress(psutil.Error):
                if shard is not None and shard.environ()["TGI_INCARNATION"] == str(incarnation):
                    return shard
            await asyncio.sleep(0.02)


@fault("F4", "SIGSTOP for 2 s, then SIGCONT", "nothing fails, nothing is replayed")
async def test_a_shard_that_stops_for_a_moment_is_waited_for(long_llama: Path, record_property: Record) -> None:
    with serving("--model-id", str(long_llama)) as server:
        async with ledger(server) as books:
            for number in range(8):
                books.send(body(f"stream {number}", max_new_tokens=400))
            await books.begun()
            with server.shards_frozen():
                await asyncio.sleep(2)
            await books.ended()
        assert books.ends == {"ok": 8}
        assert wait_until_idle(server)["tgi_request_replay_count"] == 0
        record_property("seen", str(books.ends))


ALONE = "424 for it alone, 31 undisturbed"


@pytest.mark.parametrize(
    ("character", "arguments"),
    [
        pytest.param(KILL, (), id="a crash", marks=fault("F1", "one request of 32 kills the shard", ALONE)),
        pytest.param(RAISE, (), id="an exception", marks=fault("F23", "one request of 32 raises in a step", ALONE)),
        pytest.param(
            HANG, ("--stall-timeout", "3"), id="a hang", marks=fault("F3", "one request of 32 makes it hang", ALONE)
        ),
        pytest.param(
            OUT_OF_MEMORY, (), id="no memory", marks=fault("F5", "one request of 32 runs out of memory", ALONE)
        ),
        pytest.param(NAN, (), id="not a number", marks=fault("F19", "one request of 32 gives logits of NaN", ALONE)),
    ],
)
async def test_who_makes_the_shard_fail_fails_alone(
    hostile_model: Path, record_property: Record, character: str, arguments: tuple[str, ...]
) -> None:
    with starting("--model-id", str(hostile_model), "--trust-remote-code", *arguments) as server:
        server.wait_until_ready()
        requests = mixed_requests(31)
        expected = await undisturbed(server, requests)
        async with ledger(server) as books:
            books.send_all(requests)
            await books.begun()
            guilty = books.send(body(f"the {character} one", max_new_tokens=20), stream=False)
            await books.ended()
        assert (guilty.end, guilty.status) == (End.HTTP_ERROR, 424)
        assert guilty.error is not None and guilty.error["error_type"] == "generation"
        assert_equal(books.entries[:-1], expected)
        values = wait_until_idle(server)
        assert values["tgi_out_of_memory_count"] == (character == OUT_OF_MEMORY)
        assert server.client.get("/health").status_code == 200
        restarts = sum("Restarting the shards" in message_of(line) for line in server.lines)
        assert restarts == (3 if character in (KILL, HANG) else 0)
        assert server.stop() == 0
        record_property("seen", f"{books.ends}, equal; {restarts} restarts")


async def test_prompts_that_do_not_fit_make_steps_smaller(hostile_model: Path) -> None:
    with starting("--model-id", str(hostile_model), "--trust-remote-code") as server:
        server.wait_until_ready()
        before = metrics(server)["tgi_batch_max_prefill_tokens"]
        for _ in range(2):
            assert server.client.post("/generate", json=body(OUT_OF_MEMORY)).status_code == 424
        values = wait_until_idle(server)
        assert values["tgi_out_of_memory_count"] == 2
        assert values["tgi_batch_max_prefill_tokens"] == before // 2
        assert server.client.post("/generate", json=body("fine", max_new_tokens=3)).status_code == 200
        assert server.stop() == 0


async def test_requests_that_come_while_shards_are_restarted_are_answered(long_llama: Path) -> None:
    with starting("--model-id", str(long_llama)) as server:
        server.wait_until_ready()
        server.processes()["shard 0"].kill()
        wait_for_status(server, "/health", 503)
        assert server.client.get("/live").status_code == 200
        async with ledger(server) as books:
            for number in range(4):
                books.send(body(f"late {number}", max_new_tokens=5), stream=number % 2 == 0)
            await books.ended()
        assert books.ends == {"ok": 4}
        assert server.stop() == 0


@pytest.mark.parametrize(
    "drains_first",
    [
        pytest.param(False, marks=fault("F8", "SIGTERM while shards are restarted", f"{GO_ON}, exit 0")),
        pytest.param(True, marks=fault("F8", "SIGKILL of the only shard after SIGTERM", f"{GO_ON}, exit 0")),
    ],
)
async def test_a_server_that_is_told_to_end_while_shards_are_restarted(
    long_llama: Path, record_property: Record, drains_first: bool
) -> None:
    with starting("--model-id", str(long_llama)) as server:
        server.wait_until_ready()
        requests = mixed_requests(8, tokens=1500)
        expected = await undisturbed(server, requests)
        async with ledger(server) as books:
            books.send_all(requests)
            await books.begun()
            shard = server.processes()["shard 0"]
            if drains_first:
                server.process.send_signal(signal.SIGTERM)
                wait_for_status(server, "/health", 503)
            shard.kill()
            if not drains_first:
                wait_for_status(server, "/health", 503)
                server.process.send_signal(signal.SIGTERM)
            await books.ended()
        assert_equal(books.entries, expected)
        assert server.end() == 0
        assert sum("Restarting the shards" in message_of(line) for line in server.lines) == 1
        record_property("seen", f"{books.ends}, equal, exit 0")
