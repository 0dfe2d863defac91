"""The router put together, in front of a shard without a model: start, answers, drain, exit codes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
from builders import byte_tokenizer
from fake_shard import FakeShard, serve_fake_shards
from text_generation_router.backend import StartError
from text_generation_router.config import RouterFlags
from text_generation_router.draining import Shutdown
from text_generation_router.listening import BindError, bind
from text_generation_router.serving import serve

BODY = {"inputs": "hi", "parameters": {"max_new_tokens": 3}}


def shard(folder: Path, **options: Any) -> FakeShard:
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return FakeShard(tokenizer_path=str(folder), eos_token_ids=(256,), **options)


def command(path: str, *flags: str) -> list[str]:
    return [sys.executable, "-m", "text_generation_router", "--master-shard-uds-path", path, *flags]


def is_bound(port: int) -> bool:
    with socket.socket() as sock:
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


class RouterProcess:
    def __init__(self, process: Process) -> None:
        self.process = process
        self.lines: list[dict[str, Any]] = []
        self.base = ""

    async def read_until_ready(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.lines.append(json.loads(line))
            if self.lines[-1].get("event") == "ready":
                self.base = "http://" + self.lines[-1]["address"]
                return
        raise AssertionError(self.lines)

    async def exit(self) -> int:
        assert self.process.stderr is not None
        async with asyncio.timeout(20):
            async for line in self.process.stderr:
                self.lines.append(json.loads(line))
            return await self.process.wait()

    def messages(self) -> list[str]:
        return [str(line["message"]) for line in self.lines]


@asynccontextmanager
async def process(path: str, *flags: str, env: dict[str, str] | None = None) -> AsyncIterator[RouterProcess]:
    running = await asyncio.create_subprocess_exec(
        *command(path, "--hostname", "127.0.0.1", *flags),
        stderr=PIPE, stdout=DEVNULL, env={**os.environ, "TGI_LAUNCHER_NONCE": "nonce", **(env or {})},
    )  # fmt: skip
    try:
        yield RouterProcess(running)
    finally:
        if running.returncode is None:
            running.kill()
            await running.wait()


async def test_from_start_to_drain(tmp_path: Path) -> None:
    async with (
        serve_fake_shards(tmp_path, shard(tmp_path, step_s=0.1)) as path,
        process(
            path, "--port", "0", "--prometheus-port", "0", env={"API_KEY": "k", "COMPUTE_TYPE": "1-fake"}
        ) as router,
    ):
        await router.read_until_ready()
        assert set(router.lines[-1]["seconds"]) == {"connect", "warmup", "tokenizer", "grammars"}
        headers = {"authorization": "Bearer k"}
        async with httpx2.AsyncClient(base_url=router.base, headers=headers, timeout=20) as client:
            answer = await client.post("/generate", json=BODY)
            assert (answer.status_code, answer.json()) == (200, {"generated_text": "hih"})
            assert answer.headers["x-compute-type"] == "1-fake"
            info = (await client.get("/info")).json()
            assert (info["model_id"], info["max_total_tokens"]) == ("fake/echo", 512)
            assert (await client.get("/health", headers={"authorization": ""})).status_code == 200
            [metrics_address] = [
                m.removeprefix("Metrics on ") for m in router.messages() if m.startswith("Metrics on ")
            ]
            metrics = (await client.get(f"http://{metrics_address}/metrics")).text
            assert "\ntgi_request_success 1\n" in metrics
            assert "\ntgi_kv_cache_blocks_total 256\n" in metrics
            assert (await client.get(f"http://{metrics_address}/generate")).status_code == 404
            long = {"inputs": "hi", "parameters": {"max_new_tokens": 40}}
            async with client.stream("POST", "/generate_stream", json=long) as response:
                lines = response.aiter_lines()
                await anext(lines)
                router.process.send_signal(signal.SIGTERM)
                async with httpx2.AsyncClient(base_url=router.base, headers=headers) as other:
                    while (await other.get("/health")).status_code != 503:  # noqa: ASYNC110
                        await asyncio.sleep(0.02)
                    refused = await other.post("/generate", json=BODY)
                    assert (refused.status_code, refused.headers["connection"]) == (503, "close")
                    assert (await other.get("/live")).status_code == 200
                rest = [line async for line in lines if line]
        assert '"generated_text":"' in rest[-1], "what ran was finished"
        assert await router.exit() == 0
    assert "Success" in router.messages()
    assert any(message.startswith("Shutting down: 1 request") for message in router.messages())


@pytest.mark.parametrize("second_signal", [None, signal.SIGTERM, signal.SIGINT])
async def test_what_does_not_end_in_time_ends_with_an_error(
    tmp_path: Path, second_signal: signal.Signals | None
) -> None:
    grace = "60" if second_signal else "1"
    async with (
        serve_fake_shards(tmp_path, shard(tmp_path, step_s=0.5)) as path,
        process(path, "--port", "0", "-g", grace) as router,
    ):
        await router.read_until_ready()
        long = {"inputs": "hi", "parameters": {"max_new_tokens": 400}}
        async with (
            httpx2.AsyncClient(base_url=router.base, timeout=30) as client,
            client.stream("POST", "/generate_stream", json=long) as response,
        ):
            lines = response.aiter_lines()
            await anext(lines)
            router.process.send_signal(signal.SIGTERM)
            if second_signal is not None:
                async with httpx2.AsyncClient(base_url=router.base) as other:
                    while (await other.get("/health")).status_code != 503:  # noqa: ASYNC110
                        await asyncio.sleep(0.02)
                router.process.send_signal(second_signal)
            rest = [line async for line in lines if line]
        assert "error_type" in json.loads(rest[-1][5:])
        assert await router.exit() == (128 + second_signal if second_signal else 0)


async def test_a_router_whose_shards_will_not_be_started_again(tmp_path: Path) -> None:
    async with contextlib.AsyncExitStack() as stack:
        path = await stack.enter_async_context(serve_fake_shards(tmp_path, shard(tmp_path, step_s=0.1)))
        router = await stack.enter_async_context(process(path, "--port", "0", "--max-shard-restarts", "1"))
        await router.read_until_ready()
        client = await stack.enter_async_context(httpx2.AsyncClient(base_url=router.base, timeout=30))
        long = {"inputs": "hi", "parameters": {"max_new_tokens": 400}}
        async with client.stream("POST", "/generate_stream", json=long) as response:
            lines = response.aiter_lines()
            await anext(lines)
            router.process.send_signal(signal.SIGUSR1)
            rest = [line async for line in lines if line]
        assert json.loads(rest[-1][5:])["error_type"] == "generation"
        refused = await client.post("/generate", json=BODY)
        assert (refused.status_code, refused.json()["error_type"]) == (424, "generation")
        router.process.send_signal(signal.SIGTERM)
        assert await router.exit() == 0


async def test_a_signal_while_the_shards_load(tmp_path: Path) -> None:
    with bind("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
    async with process(str(tmp_path / "nobody"), "--port", str(port)) as router, asyncio.timeout(30):
        while not is_bound(port):  # noqa: ASYNC110 - bound once its signal handlers are set
            await asyncio.sleep(0.02)
        router.process.send_signal(signal.SIGTERM)
        assert await router.exit() == 0


async def test_an_address_in_use_is_one_line_and_exit_1(tmp_path: Path) -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        async with process(str(tmp_path / "nobody"), "--port", str(port)) as router:
            assert await router.exit() == 1
        [line] = router.lines
        assert line["message"] == f"Failed to bind to 127.0.0.1:{port}: Address already in use"
        assert line["level"] == "ERROR"


@pytest.mark.parametrize(
    ("flags", "options", "message"),
    [
        pytest.param(
            RouterFlags(launcher_nonce="other"), {}, "Backend failed: the shard behind", id="another launcher's shard"
        ),
        pytest.param(
            RouterFlags(max_total_tokens=513),
            {},
            "Argument validation error: `max_total_tokens` must be <= the 512 positions",
            id="more than the model can",
        ),
        pytest.param(
            RouterFlags(max_total_tokens=50),
            {"num_blocks": 10},
            "Argument validation error: `max_total_tokens` must be <= `max_batch_total_tokens`. Given: 50 and 40",
            id="more than fits",
        ),
        pytest.param(
            RouterFlags(), {"tokenizer_path": "/nowhere"}, "WebServer error: Tokenizer error: Unable", id="no tokenizer"
        ),
    ],
)
async def test_a_failed_start_says_why(
    tmp_path: Path, flags: RouterFlags, options: dict[str, Any], message: str
) -> None:
    fake = shard(tmp_path)
    for name, value in options.items():
        setattr(fake, name, value)
    async with serve_fake_shards(tmp_path, fake) as path:
        flags = replace(flags, master_shard_uds_path=path, hostname="127.0.0.1", port=0)
        with pytest.raises(StartError) as error:
            await serve(flags, Shutdown())
    assert str(error.value).startswith(message)


async def test_an_empty_key_is_no_key_but_a_mistake() -> None:
    with pytest.raises(StartError, match="`api_key` must not be empty"):
        await serve(RouterFlags(api_key=" \n", hostname="127.0.0.1", port=0), Shutdown())


def test_addresses() -> None:
    for hostname, expected in (("localhost", "127.0.0.1"), ("4f3c2d1e0b", "0.0.0.0"), ("::1", "::1"), ("[::1]", "::1")):
        with bind(hostname, 0) as sock:
            assert sock.getsockname()[0] == expected
    with pytest.raises(BindError, match=r"^Failed to bind to 192\.0\.2\.1:1: "):
        bind("192.0.2.1", 1)
