"""Everything at once, for a long time: load, clients that leave, bad input, shards that are killed.

    python tests/faults/soak.py --minutes 30

While it runs no request may hang, and none may end in a way that nobody asked for; at the end everything that requests
held has to be free again. The exit code says whether that was so.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from faults.ledger import End, Entry, Ledger
from integration.asking import address_of, body, connect, metrics, raw_message, wait_until_idle
from integration.launched import ONE_THREAD, Launched, starting
from tiny_models import make_tiny_model

CLIENTS = 48
"""That ask again as soon as they are answered."""
KILL_EVERY_S = 240.0
"""Three restarts within ten minutes are allowed."""
IDLE_S = 11.0
"""After it idle connections are closed, and what is left of them with it."""
MAX_GROWTH_MIB = 20
"""Of the router, from after the first minute to the end."""
BAD_BODIES = (
    b"",
    b"{",
    b"[]",
    b'{"inputs": 1}',
    b'{"inputs": "x", "parameters": {"temperature": -1}}',
    b'{"inputs": "x", "parameters": {"grammar": {"type": "regex", "value": "("}}}',
    b'{"inputs": "x", "parameters": {"stop": ["1", "2", "3", "4", "5"]}}',
    b"[" * 100_000,
    b'{"inputs": "' + b"x" * 1_500_000 + b'"}',
)


@dataclass(slots=True)
class Seen:
    ends: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    """What may not happen."""
    num_left: int = 0
    num_killed: int = 0
    num_tokens: int = 0


def request(choice: random.Random) -> dict[str, Any]:
    size = int(2 ** choice.uniform(0, 9))
    parameters: dict[str, Any] = {"max_new_tokens": int(2 ** choice.uniform(0, 8))}
    if choice.random() < 0.4:
        parameters |= {"do_sample": True, "seed": choice.randrange(2**32), "top_p": 0.9}
    if choice.random() < 0.1:
        parameters["grammar"] = {"type": "regex", "value": "[a-z ]{1,100}"}
    return body("x" * size, **parameters)


async def client(server: Launched, number: int, until: float, seen: Seen) -> None:
    choice = random.Random(number)
    while time.monotonic() < until:
        kind = choice.random()
        if kind < 0.2:
            await leave(server, request(choice), choice)
            seen.num_left += 1
        elif kind < 0.25:
            seen.statuses[await send_bad(server, choice.choice(BAD_BODIES))] += 1
        else:
            books = Ledger(server)
            entry = books.send(request(choice), stream=choice.random() < 0.7)
            await books.ended()
            await books.close()
            judge(entry, seen)


def judge(entry: Entry, seen: Seen) -> None:
    end = "hung" if entry.end is None else entry.end.value
    seen.ends[end] += 1
    seen.num_tokens += len(entry.token_ids)
    if entry.end is End.OK or entry.status == 429:
        return
    if entry.status == 422 and "less than" in json.dumps(entry.error):
        return
    seen.wrong.append(f"{end}: {entry.status} {entry.error} to {entry.request['parameters']}")


async def leave(server: Launched, asked: dict[str, Any], choice: random.Random) -> None:
    with contextlib.suppress(OSError, AssertionError):
        async with connect(server, "/generate_stream", asked) as connection:
            await asyncio.sleep(choice.uniform(0.0, 0.3))
            if choice.random() < 0.5:
                connection.reset()


async def send_bad(server: Launched, content: bytes) -> int:
    """The status of the answer."""
    reader, writer = await asyncio.open_connection(*address_of(server))
    try:
        writer.write(raw_message("/generate", content))
        async with asyncio.timeout(60):
            return int((await reader.readline()).split()[1])
    finally:
        writer.transport.abort()


async def kill(server: Launched, until: float, seen: Seen) -> None:
    while (left_s := until - time.monotonic()) > KILL_EVERY_S / 4:
        await asyncio.sleep(min(KILL_EVERY_S / 2, left_s / 2))
        shard = server.processes().get("shard 0")
        if shard is not None:
            shard.kill()
            seen.num_killed += 1
        await asyncio.sleep(min(KILL_EVERY_S / 2, max(until - time.monotonic(), 0)))


def used(router: psutil.Process, tasks: Path) -> dict[str, float]:
    return {
        "descriptors": router.num_fds(),
        "threads": router.num_threads(),
        "tasks": int(tasks.read_text()),
        "memory_mib": round(router.memory_info().rss / 2**20, 1),
    }


async def soak(server: Launched, minutes: float, tasks: Path) -> list[str]:
    """What went wrong. ``tasks``: see `loop_watch`."""
    router = server.processes()["router"]
    seen = Seen()
    warm_up = time.monotonic() + min(60.0, minutes * 15)
    await asyncio.gather(*(client(server, -number - 1, warm_up, seen) for number in range(CLIENTS)))
    wait_until_idle(server)
    await asyncio.sleep(IDLE_S)
    before = used(router, tasks)
    until = time.monotonic() + minutes * 60
    clients = [client(server, number, until, seen) for number in range(CLIENTS)]
    await asyncio.gather(*clients, kill(server, until, seen))
    values = await asyncio.to_thread(wait_until_idle, server)
    await asyncio.sleep(IDLE_S)
    after = used(router, tasks)
    wrong = list(seen.wrong)
    if any(status >= 500 for status in seen.statuses):
        wrong.append(f"bad input was answered with {dict(seen.statuses)}")
    if any(after[what] > before[what] + more for what, more in (("descriptors", 2), ("threads", 1), ("tasks", 0))):
        wrong.append(f"left behind: {before} before, {after} after")
    if after["memory_mib"] > before["memory_mib"] + MAX_GROWTH_MIB:
        wrong.append(f"the router has grown from {before['memory_mib']} to {after['memory_mib']} MiB")
    report = {
        "minutes": minutes,
        "ends": dict(seen.ends),
        "bad input": dict(seen.statuses),
        "left": seen.num_left,
        "shards killed": seen.num_killed,
        "tokens": seen.num_tokens,
        "replayed": values["tgi_request_replay_count"],
        "router before": before,
        "router after": after,
    }
    print(json.dumps(report, indent=2))
    return wrong


def run(minutes: float) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_model("llama", Path(folder, "model"), max_position_embeddings=2048)
        tasks, longest = Path(folder, "tasks"), Path(folder, "longest")
        watch = {
            "PYTHONPATH": str(Path(__file__).with_name("loop_watch")),
            "LOOP_WATCH": str(longest),
            "LOOP_TASKS": str(tasks),
        }
        arguments = ("--model-id", str(model), "--max-concurrent-requests", "32")
        with starting(*arguments, environ={**ONE_THREAD, **watch}) as server:
            server.wait_until_ready()
            longest.write_text("0")
            wrong = asyncio.run(soak(server, minutes, tasks))
            print(
                f"longest callback of the router's event loop: {float(longest.read_text()) * 1e3:.0f} ms of its thread"
            )
            values = metrics(server)
            if values["tgi_kv_cache_usage"]:
                wrong.append(f"{values['tgi_kv_cache_usage']:.1%} of the KV cache is not free")
            if server.stop() != 0:
                wrong.append("the server did not end well")
            return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    wrong = run(parser.parse_args().minutes)
    for line in wrong[:50]:
        print(line, file=sys.stderr)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
