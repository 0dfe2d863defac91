"""CPU time of the router for one streamed token: event -> JSON -> frame -> uvicorn -> socket. No model, no gRPC.

    python tests/bench/router_stream.py [--streams 128] [--tokens 400]

The batcher is played by a loop that gives every stream one token a step, so that each token is a wake-up, a frame and
a write of its own, as with a real model. Clients run in another process. Prints microseconds of this process's CPU
for a token: all of it, and what is left without HTTP (the events taken off the streams and encoded, but not sent).
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import uvloop

sys.path.insert(0, str(Path(__file__).parent.parent))

import scripted
from text_generation_router.api.sse import NativeFrames
from text_generation_router.scheduling.requests import EventStream, QueuedRequest, Token, TokenEvent

CLIENT = """
import selectors, socket, sys
host, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
body = b'{"inputs":"hi","parameters":{"max_new_tokens":100000}}'
lines = b"POST /generate_stream HTTP/1.1", b"host: x", b"content-type: application/json", b"content-length: %d"
request = b"\\r\\n".join((*lines, b"", b""))
selector = selectors.DefaultSelector()
for _ in range(count):
    sock = socket.create_connection((host, port))
    sock.sendall(request % len(body) + body)
    sock.setblocking(False)
    selector.register(sock, selectors.EVENT_READ)
while selector.get_map():
    for key, _ in selector.select():
        data = key.fileobj.recv(65536)
        if not data or data.endswith(b"0\\r\\n\\r\\n"):
            selector.unregister(key.fileobj)
            key.fileobj.close()
"""


def token_event(index: int) -> TokenEvent:
    return TokenEvent(index, Token(1000 + index, " word", -0.12345678, special=False), None)


async def over_http(streams: int, tokens: int) -> float:
    async with scripted.running(
        script=scripted.silence,
        over_socket=True,
        max_concurrent_requests=streams,
        max_input_tokens=100,
        max_total_tokens=200_000,
    ) as router:
        base = router.client.base_url
        clients = await asyncio.create_subprocess_exec(
            sys.executable, "-c", CLIENT, base.host, str(base.port), str(streams)
        )
        while len(router.batcher.running) < streams:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        running = list(router.batcher.running)
        await step(running, 1)
        await asyncio.sleep(0.2)
        started = time.process_time()
        for index in range(2, tokens + 2):
            await step(running, index)
        spent = time.process_time() - started
        for queued in running:
            event = token_event(tokens + 2)
            event.finished = scripted.finished("", tokens, queued)
            queued.stream.put(event)
            queued.stream.close()
        await router.idle()
        await clients.wait()
        return spent / (streams * tokens)


async def step(running: Sequence[QueuedRequest], index: int) -> None:
    for queued in running:
        queued.stream.put(token_event(index))
    # Two turns of the loop: the streams wake up and write.
    await asyncio.sleep(0)
    await asyncio.sleep(0.001)


async def without_http(streams: int, tokens: int) -> float:
    async def consume(stream: EventStream) -> None:
        frames = NativeFrames()
        while events := await stream.get_all():
            frames(events)

    all_streams = [EventStream() for _ in range(streams)]
    tasks = [asyncio.create_task(consume(stream)) for stream in all_streams]
    await asyncio.sleep(0)
    started = time.process_time()
    for index in range(1, tokens + 1):
        for stream in all_streams:
            stream.put(token_event(index))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    spent = time.process_time() - started
    for stream in all_streams:
        stream.close()
    await asyncio.gather(*tasks)
    return spent / (streams * tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=400)
    options = parser.parse_args()
    for name, measure in (("over HTTP", over_http), ("without HTTP", without_http)):
        seconds = [uvloop.run(measure(options.streams, options.tokens)) for _ in range(3)]
        print(f"{name:13} {min(seconds) * 1e6:6.1f} us a token (best of {len(seconds)}, {options.streams} streams)")


if __name__ == "__main__":
    main()
