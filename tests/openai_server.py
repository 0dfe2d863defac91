"""A small server of OpenAI's API over real HTTP: one token a character, as fast as they are read."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

OLDEST_FIELDS = {"model", "prompt", "messages", "max_tokens", "temperature", "top_p", "stream", "logprobs"}


@dataclass
class OpenAIServer:
    """Attributes are knobs for tests; set them before or while it runs."""

    routes: tuple[str, ...] = ("/v1/completions", "/v1/chat/completions")
    model: dict[str, Any] | None = field(default_factory=lambda: {"id": "tiny"})
    """The one that it lists; None: it has no list."""
    known: set[str] | None = None
    """Fields that it takes; others are a 400. None: all."""
    counts: bool = True
    """Sends usage when it is asked to."""
    ends_after: int | None = None
    """Tokens behind which a sequence ends, unless `ignore_eos`."""
    fails: bool = False
    """Streams end with an error."""
    capacity: int | None = None
    """Requests at one time; more are a 429."""
    api_key: str | None = None
    line_end: str = "\n"
    gate: asyncio.Event | None = None
    """Streams wait for it behind their first token."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    running: int = 0
    most: int = 0

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            method, path, _ = head.split(" ", 2)
            headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in head.split("\r\n")[1:])}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            if self.api_key is not None and headers.get("authorization") != f"Bearer {self.api_key}":
                _reply(writer, 401, {"error": "no key"})
            elif (method, path) == ("GET", "/v1/models") and self.model is not None:
                _reply(writer, 200, {"object": "list", "data": [self.model]})
            elif (method, path) == ("GET", "/version"):
                _reply(writer, 200, {"version": "0.1"})
            elif method == "POST" and path in self.routes:
                await self._generate(json.loads(body), writer, is_chat="chat" in path)
            else:
                _reply(writer, 404, {"error": "not found"})
            await writer.drain()
        writer.close()

    async def _generate(self, body: dict[str, Any], writer: asyncio.StreamWriter, *, is_chat: bool) -> None:
        unknown = set(body) - (self.known if self.known is not None else set(body))
        if unknown:
            return _reply(writer, 400, {"error": f"unknown fields {sorted(unknown)}"})
        if self.capacity is not None and self.running >= self.capacity:
            return _reply(writer, 429, {"error": "too many"})
        self.bodies.append(body)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self._stream(body, writer, is_chat=is_chat)
        finally:
            self.running -= 1

    async def _stream(self, body: dict[str, Any], writer: asyncio.StreamWriter, *, is_chat: bool) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\nconnection: close\r\n\r\n")
        prompt = body["messages"][0]["content"] if is_chat else body["prompt"]
        length = body["max_tokens"]
        if self.ends_after is not None and not body.get("ignore_eos"):
            length = min(length, self.ends_after)
        if is_chat:
            self._event(writer, {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
        for number in range(length):
            reason = "length" if number == length - 1 else None
            content = {"delta": {"content": "x"}} if is_chat else {"text": "x"}
            self._event(writer, {"choices": [{**content, "finish_reason": reason}]})
            await writer.drain()
            await asyncio.sleep(0.001)
            if self.gate is not None:
                await self.gate.wait()
        if self.fails:
            return self._event(writer, {"error": {"message": "out of luck"}})
        if self.counts and body.get("stream_options"):
            counts = {"prompt_tokens": len(prompt), "completion_tokens": length}
            self._event(writer, {"choices": [], "usage": counts})
        writer.write(f"data: [DONE]{self.line_end * 2}".encode())

    def _event(self, writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
        writer.write(f"data: {json.dumps(event)}{self.line_end * 2}".encode())


def _reply(writer: asyncio.StreamWriter, status: int, content: dict[str, Any]) -> None:
    body = json.dumps(content).encode()
    head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)


@contextlib.asynccontextmanager
async def serving_openai(server: OpenAIServer) -> AsyncIterator[str]:
    """The address of a running ``server``."""
    answering: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(server.answer(reader, writer))
        answering.add(task)
        task.add_done_callback(answering.discard)

    listening = await asyncio.start_server(accept, "127.0.0.1", 0)
    async with listening:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        for task in answering:
            task.cancel()
        await asyncio.gather(*answering, return_exceptions=True)
