"""`bench.load` against a server that plays a recorded answer."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from itertools import islice
from pathlib import Path

import pytest
from bench.apis import APIS
from bench.load import closed_loop, measure, prompts_of
from bench.make_model import train_tokenizer
from bench.report import WrongLength
from text_generation_launcher.benchmark.apis import Usage
from text_generation_launcher.benchmark.outcome import End, send
from tokenizers import Tokenizer

NATIVE = APIS["native"]
HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(event: dict[str, object]) -> bytes:
    data = f"data: {json.dumps(event)}\n\n".encode()
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def tokens(count: int) -> list[bytes]:
    details = {"input_length": 8, "generated_tokens": count}
    return [chunk({"index": i, "token": {}, "details": details if i == count else None}) for i in range(1, count + 1)]


@asynccontextmanager
async def playing(*parts: bytes, hang_up: bool = True) -> AsyncIterator[str]:
    """The address of a server that answers every request with `parts` and hangs up, or waits for the client to."""

    answering: list[asyncio.Task[None]] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            writer.writelines(parts)
            await writer.drain()
            if not hang_up:
                await reader.read()
            writer.close()
            await writer.wait_closed()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answering.append(asyncio.create_task(answer(reader, writer)))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        await asyncio.gather(*answering)


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(iter(["def main(self):\n    return None\n" * 3, "import os\n"]), vocab_size=300).save(str(path))
    return path


async def test_an_answer_is_timed_and_counted() -> None:
    async with playing(HEAD, *tokens(3), b"0\r\n\r\n") as url:
        outcome = await send(url, NATIVE, "prompt", 3)
    assert (outcome.kind, outcome.usage) == (End.OK, Usage(8, 3))
    assert len(outcome.token_times) == 3
    assert 0 < outcome.ttft_s <= outcome.end - outcome.start


@pytest.mark.parametrize(
    ("parts", "kind"),
    [
        pytest.param([b"HTTP/1.1 429 No\r\ncontent-length: 4\r\n\r\nbusy"], End.HTTP_ERROR, id="a refusal"),
        pytest.param([HEAD, *tokens(2), chunk({"error": "x"}), b"0\r\n\r\n"], End.SSE_ERROR, id="an error event"),
        pytest.param([HEAD, *tokens(3)[:2]], End.CONN_ERROR, id="a stream that breaks off"),
        pytest.param([], End.CONN_ERROR, id="no answer"),
        pytest.param([b"nonsense\r\n\r\n"], End.CONN_ERROR, id="no HTTP"),
    ],
)
async def test_bad_ends_are_told_apart(parts: list[bytes], kind: End) -> None:
    async with playing(*parts) as url:
        assert (await send(url, NATIVE, "prompt", 3)).kind is kind


async def test_nobody_listening_is_a_connection_error() -> None:
    async with playing() as url:
        pass
    assert (await send(url, NATIVE, "prompt", 3)).kind is End.CONN_ERROR


async def test_a_silent_server_is_given_up() -> None:
    async with playing(HEAD, hang_up=False) as url:
        outcome = await send(url, NATIVE, "prompt", 3, limit_s=0.05)
    assert outcome.kind is End.CONN_ERROR
    assert "Timeout" in outcome.detail


async def test_the_loop_keeps_its_concurrency() -> None:
    now, most = 0, 0

    async def one(prompt: str) -> str:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0)
        now -= 1
        return prompt

    answers = await closed_loop([str(i) for i in range(20)], 4, one)
    assert sorted(answers) == sorted(str(i) for i in range(20))
    assert most == 4


async def test_a_wrong_length_fails_loudly() -> None:
    async with playing(HEAD, *tokens(2), b"0\r\n\r\n") as url:
        with pytest.raises(WrongLength):
            await measure(url, NATIVE, iter(map(str, range(99))), 1, 8, 3)


def test_prompts_are_distinct_exact_and_repeatable(tokenizer_json: Path) -> None:
    prompts = list(islice(prompts_of(tokenizer_json, 24, seed=1), 20))
    encodings = Tokenizer.from_file(str(tokenizer_json)).encode_batch(prompts)
    assert [len(encoding.ids) for encoding in encodings] == [24] * 20
    assert len(set(prompts)) == 20
    assert prompts == list(islice(prompts_of(tokenizer_json, 24, seed=1), 20))
