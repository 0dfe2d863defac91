"""Bodies that nobody would send on purpose, by the hundred thousand, to a real server.

    python tests/faults/fuzz.py --bodies 100000

Valid bodies of every route are changed in random places: values of other types and sizes, fields that are missing,
doubled, nested or unknown, bytes that are flipped or cut off. No answer may be a 5xx, the shard may not be started
again, no callback of the router's event loop may use more than 50 ms of its thread's processor time, and everything
is free at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from integration.asking import address_of, raw_message, wait_until_idle
from integration.launched import ONE_THREAD, Launched, message_of, starting

CONNECTIONS = 16
MAX_CALLBACK_S = 0.05
WITHIN_S = 60.0
SHORT = ("--max-input-tokens", "96", "--max-total-tokens", "104")
"""Room for all of the valid bodies, and few tokens for those that ask for as many as there may be."""
CHAT = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
VALID: list[tuple[str, dict[str, Any]]] = [
    ("/", {"inputs": "hi", "parameters": {"max_new_tokens": 2}, "stream": False}),
    ("/generate", {"inputs": "hi", "parameters": {"max_new_tokens": 2, "details": True, "top_n_tokens": 2}}),
    ("/generate", {"inputs": "hi", "parameters": {"max_new_tokens": 2, "stop": ["a", "b"], "seed": 7, "top_p": 0.5}}),
    (
        "/generate",
        {"inputs": "hi", "parameters": {"max_new_tokens": 2, "grammar": {"type": "regex", "value": "[ab]{1,4}"}}},
    ),
    ("/generate_stream", {"inputs": "hi", "parameters": {"max_new_tokens": 2, "do_sample": True, "best_of": 1}}),
    ("/tokenize", {"inputs": "hi", "add_special_tokens": True}),
    ("/v1/completions", {"prompt": ["hi", "ho"], "max_tokens": 2, "logprobs": 1, "n": 1, "logit_bias": {"5": 1.0}}),
    ("/v1/chat/completions", {"messages": CHAT, "max_tokens": 2, "stream": True, "stream_options": {}}),
    ("/v1/chat/completions", {"messages": CHAT, "max_tokens": 2, "tools": [TOOL], "tool_choice": "auto"}),
    (
        "/v1/chat/completions",
        {
            "messages": CHAT,
            "max_tokens": 2,
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
        },
    ),
    ("/v1/responses", {"input": "hi", "max_output_tokens": 2, "instructions": "be", "text": {"format": None}}),
    ("/v1/messages", {"model": "tgi", "messages": CHAT, "max_tokens": 2, "system": "be", "tools": []}),
    ("/v1/embeddings", {"input": ["hi", "ho"], "encoding_format": "float", "dimensions": 4}),
    ("/embed", {"inputs": ["hi", "ho"], "normalize": True, "truncate": True}),
    ("/chat_tokenize", {"messages": CHAT}),
    ("/vertex", {"instances": [{"inputs": "hi", "parameters": {"max_new_tokens": 2}}]}),
    ("/invocations", {"inputs": "hi", "parameters": {"max_new_tokens": 2}}),
]
WILD: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**31 - 1, -(2**31), 2**53, 2**63, 2**64, -(2**63), 1e308, -1e308, 1e-308, 0.1,
    1.0, "", "5", "\x00", "\ud800", "\uffff", "a" * 5000, "🦊" * 500, "</s>", "<|im_end|>", [], {}, [[]], [None],
    [1, "a"], {"a": {"b": {"c": []}}}, {"type": "json", "value": {}}, {"type": "regex", "value": "(((((("}, ["a"] * 300,
]  # fmt: skip
NAMES = (
    "n",
    "seed",
    "stop",
    "stream",
    "model",
    "inputs",
    "prompt",
    "messages",
    "temperature",
    "top_k",
    "priority",
    "x",
)
RAW = ["NaN", "Infinity", "-Infinity", "1e400", "01", "1.", "0x10", "'a'", '"\\ud800"', '"\\x"', "[" * 200, "1" * 5000]
"""What stands where a value was, and is no JSON, or more of it than anybody wants."""
MARK = "@@raw@@"


def huge() -> Iterator[tuple[str, dict[str, Any]]]:
    """Bodies as large as they may be, in every direction."""
    text = "the quick brown fox " * 90_000
    parts = [{"type": "text", "text": "a"}] * 50_000
    many = {str(number): number for number in range(100_000)}
    yield "/generate", {"inputs": text}
    yield "/generate_stream", {"inputs": "a" * 1_900_000}
    yield "/tokenize", {"inputs": text}
    yield "/generate", {"inputs": "x", "parameters": {"stop": ["ab"] * 300_000}}
    yield "/generate", {"inputs": "x", "parameters": {"grammar": {"type": "regex", "value": "(ab?)" * 200_000}}}
    yield "/generate", {"inputs": "x", "parameters": {"grammar": {"type": "json", "value": {"enum": list(many)}}}}
    yield "/generate", {"inputs": "x", "unknown": many}
    yield "/v1/completions", {"prompt": list(range(250)) * 1000}
    yield "/v1/completions", {"prompt": ["a b c"] * 200_000}
    yield "/v1/completions", {"prompt": "x", "logit_bias": many}
    yield "/v1/completions", {"prompt": "x", "stop": ["ab"] * 300_000}
    yield "/v1/chat/completions", {"messages": CHAT * 40_000}
    yield "/v1/chat/completions", {"messages": CHAT * 1024, "max_tokens": 1}
    yield "/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}
    yield "/v1/chat/completions", {"messages": [{"role": "user", "content": parts}]}
    yield "/v1/chat/completions", {"messages": CHAT, "tools": [TOOL] * 10_000}
    yield "/v1/chat/completions", {"messages": CHAT, "chat_template_kwargs": many}
    yield "/v1/chat/completions", {"messages": CHAT, "response_format": {"type": "json_schema", "json_schema": many}}
    yield "/chat_tokenize", {"messages": CHAT * 1024}
    yield "/v1/responses", {"input": CHAT * 40_000}
    yield "/v1/responses", {"input": [{"role": "user", "content": parts}]}
    yield "/v1/responses", {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": ""}] * 25_000}
    yield "/v1/responses", {"input": "x", "metadata": {name: name for name in many}}
    yield "/v1/messages", {"model": "tgi", "messages": CHAT * 40_000, "max_tokens": 1}
    yield "/v1/messages", {"model": "tgi", "messages": [{"role": "user", "content": parts}], "max_tokens": 1}
    results = [{"type": "tool_result", "tool_use_id": "t", "content": "a"}] * 25_000
    yield "/v1/messages", {"model": "tgi", "messages": [{"role": "user", "content": results}], "max_tokens": 1}
    yield "/v1/embeddings", {"input": ["a b c"] * 2048}
    yield "/v1/embeddings", {"input": ["a"] * 300_000}
    yield "/embed", {"inputs": [[1, 2, 3]] * 100_000}
    yield "/vertex", {"instances": [{"inputs": "x"}] * 100_000}


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict):
        for name, each in value.items():
            yield from nodes(each, (*path, name))
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from nodes(each, (*path, index))


def mutated(body: dict[str, Any], choice: random.Random) -> bytes:
    changed = copy.deepcopy(body)
    for _ in range(choice.choice((1, 1, 1, 2, 3))):
        places = [path for path in nodes(changed) if path]
        if not places:
            break
        *path, last = choice.choice(places)
        parent: Any = changed
        for step in path:
            parent = parent[step]
        kind = choice.random()
        if kind < 0.55:
            parent[last] = copy.deepcopy(choice.choice(WILD))
        elif kind < 0.65:
            parent[last] = MARK
        elif kind < 0.75 and isinstance(parent, dict):
            del parent[last]
        elif kind < 0.85 and isinstance(parent, dict):
            parent[choice.choice(NAMES)] = copy.deepcopy(choice.choice(WILD))
        else:
            parent[last] = [copy.deepcopy(parent[last])] * choice.choice((1, 2, 50))
    # Surrogates go out as escapes.
    content = json.dumps(changed).replace(f'"{MARK}"', choice.choice(RAW)).encode()
    if choice.random() < 0.15:
        content = bytes_mutated(content, choice)
    return content


def bytes_mutated(content: bytes, choice: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(choice.choice((1, 2, 8))):
        place = choice.randrange(len(changed) + 1)
        kind = choice.random()
        if kind < 0.4:
            changed[place : place + 1] = bytes([choice.randrange(256)])
        elif kind < 0.6:
            del changed[place : place + choice.randrange(20)]
        elif kind < 0.8:
            changed[place:place] = changed[:place][-20:]
        else:
            del changed[place:]
        if not changed:
            break
    return bytes(changed)


async def client(server: Launched, number: int, count: int, statuses: Counter[str], wrong: list[str]) -> None:
    choice = random.Random(number)
    streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
    for _ in range(count):
        path, valid = choice.choice(VALID)
        content = mutated(valid, choice)
        if streams is None:
            streams = await asyncio.open_connection(*address_of(server))
        reader, writer = streams
        try:
            writer.write(raw_message(path, content))
            async with asyncio.timeout(WITHIN_S):
                status, keeps = await read_answer(reader)
        except (OSError, asyncio.IncompleteReadError, TimeoutError, ValueError) as error:
            wrong.append(f"{type(error).__name__} on {path}: {content[:2000]!r}")
            status, keeps = 0, False
        statuses[f"{status}"] += 1
        if status >= 500:
            wrong.append(f"{status} on {path}: {content[:2000]!r}")
        if not keeps:
            writer.transport.abort()
            streams = None
    if streams is not None:
        streams[1].transport.abort()


async def ask_once(server: Launched, path: str, content: bytes) -> int:
    """Status of the answer on a connection of its own, 0 if there is none."""
    reader, writer = await asyncio.open_connection(*address_of(server))
    try:
        writer.write(raw_message(path, content))
        async with asyncio.timeout(WITHIN_S):
            return (await read_answer(reader))[0]
    except (OSError, asyncio.IncompleteReadError, TimeoutError, ValueError):
        return 0
    finally:
        writer.transport.abort()


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """Status, and whether the connection stays open; the body is read and thrown away."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    if b"transfer-encoding: chunked" in head:
        while size := int(await reader.readline(), 16):
            await reader.readexactly(size + 2)
        await reader.readline()
    else:
        await reader.readexactly(int(head.partition(b"content-length: ")[2].split(b"\r\n")[0] or 0))
    return int(head.split()[1]), b"connection: close" not in head


def fuzz(num_bodies: int, seed: int = 0) -> tuple[dict[str, Any], list[str]]:
    """A report, and what went wrong."""
    statuses: Counter[str] = Counter()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        longest = Path(folder, "longest")
        watch = {
            "PYTHONPATH": str(Path(__file__).with_name("loop_watch")),
            "LOOP_WATCH": str(longest),
        }
        with starting(*SHORT, environ={**ONE_THREAD, **watch}) as server:
            server.wait_until_ready()
            longest.write_text("0")
            began = time.monotonic()

            async def run() -> None:
                for path, body in huge():
                    content = json.dumps(body, separators=(",", ":")).encode()
                    status = await ask_once(server, path, content)
                    statuses[f"{status}"] += 1
                    if status >= 500 or not status:
                        wrong.append(f"{status} on {path}: {content[:200]!r}, {len(content)} bytes")
                share = num_bodies // CONNECTIONS
                first = seed * CONNECTIONS
                clients = [client(server, first + number, share, statuses, wrong) for number in range(CONNECTIONS)]
                await asyncio.gather(*clients)

            asyncio.run(run())
            seconds = time.monotonic() - began
            wait_until_idle(server)
            wrong += [message_of(line) for line in server.lines if "Restarting the shards" in message_of(line)]
            wrong += [line for line in server.errors if "defect" in line]
            assert server.stop() == 0
        callback_s = float(longest.read_text())
    if callback_s > MAX_CALLBACK_S:
        wrong.append(f"a callback of the event loop took up to {callback_s * 1e3:.0f} ms of its thread")
    report = {
        "bodies": sum(statuses.values()),
        "seconds": round(seconds),
        "statuses": dict(sorted(statuses.items())),
        "longest_callback_ms": round(callback_s * 1e3, 1),
    }
    return report, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bodies", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    report, wrong = fuzz(arguments.bodies, arguments.seed)
    print(json.dumps(report, indent=2))
    for line in wrong[:50]:
        print(line, file=sys.stderr)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
