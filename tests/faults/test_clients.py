"""F10, F13 to F15, F21, F24: signals that come twice, connections that break, descriptors that run out."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from faults.chaos import Chaos, chaos_proxy
from faults.ledger import End, ledger
from integration.asking import address_of, body, connect, message, wait_for_status, wait_until_idle
from integration.launched import serving, starting
from integration.reciting import ENDLESS

pytestmark = pytest.mark.slow  # `make test-faults`
Record = Callable[[str, object], None]
fault = pytest.mark.fault


@fault("F10", "a second SIGTERM", "an error event for each at once, exit 143")
async def test_a_second_signal_ends_everything_at_once(reciting_model: Path, record_property: Record) -> None:
    with starting("--model-id", str(reciting_model)) as server:
        server.wait_until_ready()
        async with ledger(server) as books:
            for number in range(8):
                books.send(body(ENDLESS, max_new_tokens=4000), stream=number % 2 == 0)
            await books.begun()
            with server.shards_frozen():
                server.process.send_signal(signal.SIGTERM)
                wait_for_status(server, "/health", 503)
                second_at = time.monotonic()
                server.process.send_signal(signal.SIGTERM)
                await books.ended()
        ended_s = time.monotonic() - second_at
        assert set(books.ends) == {"sse_error", "http_error"}
        assert server.end() == 128 + signal.SIGTERM
        record_property("seen", f"{books.ends} after {ended_s:.1f} s, exit {128 + signal.SIGTERM}")


@fault("F8", "SIGTERM while a client reads slowly", "it gets all of its answer, exit 0")
async def test_a_slow_reader_at_the_end(reciting_model: Path, record_property: Record) -> None:
    with starting("--model-id", str(reciting_model)) as server:
        server.wait_until_ready()
        # The answer has some 60 bytes for each token; the system takes 128 KiB of them.
        long = {"inputs": "a" * 200_000}
        expected = server.client.post("/tokenize", json=long).content
        async with connect(server, "/tokenize", long) as connection:
            async with asyncio.timeout(60):
                received = await connection.some(65536)
                server.process.send_signal(signal.SIGTERM)
                began = time.monotonic()
                while not received.endswith(expected):
                    received += await connection.some(len(expected) // 100)
                    await asyncio.sleep(0.07)
            took_s = time.monotonic() - began
        assert server.end() == 0
        assert took_s > 5
        record_property("seen", f"all of {len(received):,} bytes in {took_s:.0f} s, exit 0")


@fault("F15", "a proxy resets 5 % of connections, garbles 5 %, delays all by 200 ms", "an end for every request")
async def test_a_bad_network(long_llama: Path, record_property: Record) -> None:
    with serving("--model-id", str(long_llama)) as server:
        chaos = Chaos(seed=1, latency_s=0.2, resets=0.05, garbage=0.05)
        async with chaos_proxy(chaos, address_of(server)) as url, ledger(url) as books:
            for number in range(200):
                books.send(body(f"request {number}", max_new_tokens=20), stream=number % 2 == 0)
                await asyncio.sleep(0.01)
            await books.ended()
        assert chaos.num_disturbed > 0
        broken = sum(count for end, count in books.ends.items() if end != End.OK)
        assert "hung" not in books.ends
        assert broken <= chaos.num_disturbed
        wait_until_idle(server)
        record_property("seen", f"{books.ends}, {chaos.num_disturbed} connections disturbed")


@fault("L5", "40 clients that never read", "others are answered; all is free when they go")
async def test_clients_that_do_not_read(reciting_model: Path, record_property: Record) -> None:
    with serving("--model-id", str(reciting_model)) as server:
        sockets = []
        try:
            for _ in range(40):
                sock = socket.socket()
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
                sock.connect(address_of(server))
                sock.sendall(_long_stream())
                sockets.append(sock)
            async with ledger(server) as books:
                for number in range(8):
                    books.send(body("a", max_new_tokens=20), stream=number % 2 == 0)
                await books.ended()
            assert books.ends == {"ok": 8}
        finally:
            for sock in sockets:
                sock.close()
        values = wait_until_idle(server)
        assert values["tgi_request_cancelled"] == 40
        record_property("seen", f"others meanwhile {books.ends}, 40 given up")


@fault("F25", "SIGSTOP of the launcher, which reads the logs", "requests are answered")
async def test_a_launcher_that_reads_no_log(reciting_model: Path, record_property: Record) -> None:
    with serving("--model-id", str(reciting_model)) as server:
        server.process.send_signal(signal.SIGSTOP)
        try:
            async with ledger(server) as books:
                for number in range(600):  # each is a line of some 500 bytes; a pipe takes 64 KiB
                    books.send(body("a", max_new_tokens=2), stream=number % 2 == 0)
                    if number % 50 == 49:
                        await books.ended()
            assert books.ends == {"ok": 600}
            assert server.client.get("/health").status_code == 200
        finally:
            server.process.send_signal(signal.SIGCONT)
        wait_until_idle(server)
        record_property("seen", books.ends)


def _long_stream() -> bytes:
    return message("/generate_stream", body("A", max_new_tokens=4000, top_n_tokens=5))


@fault("F21", "the router has no descriptors left", "503 or no answer for new ones, old ones go on; it recovers")
async def test_no_descriptors_are_left(long_llama: Path, record_property: Record) -> None:
    with serving("--model-id", str(long_llama)) as server:
        router = server.processes()["router"]
        _, hard = router.rlimit(psutil.RLIMIT_NOFILE)
        async with ledger(server) as books:
            for number in range(8):
                books.send(body(f"stream {number}", max_new_tokens=800))
            await books.begun()
            router.rlimit(psutil.RLIMIT_NOFILE, (router.num_fds() + 4, hard))
            idle = []
            for _ in range(30):
                sock = socket.socket()
                sock.setblocking(False)
                await asyncio.get_running_loop().sock_connect(sock, address_of(server))
                idle.append(sock)
            await books.ended()
            assert books.ends == {"ok": 8}
            for sock in idle:
                sock.close()
            router.rlimit(psutil.RLIMIT_NOFILE, (hard, hard))
        async with ledger(server) as later:
            for number in range(4):
                later.send(body(f"later {number}", max_new_tokens=5))
            await later.ended()
        assert later.ends == {"ok": 4}
        wait_until_idle(server)
        record_property("seen", f"{books.ends} meanwhile, {later.ends} after it")
