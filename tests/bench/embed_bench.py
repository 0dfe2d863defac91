"""Texts embedded through the API against `encode` of sentence-transformers, on the same cores.

    python tests/bench/embed_bench.py --model DIR [--texts 10000 --rounds 3]

DIR is a sentence-transformers folder. In every round the server embeds all texts, and then, while it is stopped, a
process of sentence-transformers does, of the same environment; both are warmed up with some of them first. The client
sends requests of ``--per-request`` texts, a few at a time, and the time is until the last byte is here. The vectors of
both are compared.
"""

import argparse
import asyncio
import base64
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import uvloop

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.compare import hardware
from bench.servers import HOST, end_cleanly_on_sigterm, running
from text_generation_launcher.benchmark.http_client import ask

LAUNCHER = str(Path(sys.executable).with_name("text-generation-launcher"))
WARM_UP = 256
WORDS = [
    "a",
    "the",
    "of",
    "to",
    "and",
    "in",
    "that",
    "is",
    "for",
    "on",
    "with",
    "as",
    "was",
    "at",
    "by",
    "from",
    "they",
    "we",
    "you",
    "not",
    "what",
    "all",
    "when",
    "can",
    "more",
    "river",
    "mountain",
    "city",
    "people",
    "water",
    "music",
    "number",
    "letter",
    "morning",
    "house",
    "garden",
    "answer",
    "question",
    "history",
    "science",
    "market",
    "paper",
    "train",
]
PEER = """
import json, sys, time
from sentence_transformers import SentenceTransformer
texts = json.load(sys.stdin)
model = SentenceTransformer(sys.argv[1], device="cpu")
model.encode(texts[: int(sys.argv[2])])
started = time.perf_counter()
vectors = model.encode(texts)
seconds = time.perf_counter() - started
vectors.astype("<f4").tofile(sys.argv[3])
print(json.dumps(seconds))
"""


def short_texts(count: int) -> list[str]:
    """Of three to twenty words."""
    choice = random.Random(0)
    return [" ".join(choice.choices(WORDS, k=choice.randint(3, 20))) for _ in range(count)]


async def embed(url: str, texts: list[str], per_request: int, at_once: int) -> tuple[float, np.ndarray]:
    """Seconds, and the vectors."""
    places = asyncio.Semaphore(at_once)

    async def one(start: int) -> bytes:
        async with places:
            body = {"input": texts[start : start + per_request], "encoding_format": "base64"}
            answer = await ask(url, "/v1/embeddings", body, limit_s=600)
            assert answer.status == 200, answer.body[:1000]
            return answer.body

    started = time.perf_counter()
    bodies = await asyncio.gather(*(one(start) for start in range(0, len(texts), per_request)))
    seconds = time.perf_counter() - started
    rows = [item["embedding"] for body in bodies for item in json.loads(body)["data"]]
    return seconds, np.stack([np.frombuffer(base64.b64decode(row), "<f4") for row in rows])


def ours(model: Path, texts: list[str], arguments: argparse.Namespace) -> tuple[float, np.ndarray]:
    argv = [LAUNCHER, "--model-id", str(model), "--hostname", HOST, "--port", str(arguments.port)]
    with running(argv, arguments.port, {}) as server:
        uvloop.run(embed(server.url, texts[:WARM_UP], arguments.per_request, arguments.at_once))
        return uvloop.run(embed(server.url, texts, arguments.per_request, arguments.at_once))


def theirs(model: Path, texts: list[str], scratch: Path) -> tuple[float, np.ndarray]:
    argv = [sys.executable, "-c", PEER, str(model), str(WARM_UP), str(scratch)]
    run = subprocess.run(argv, input=json.dumps(texts), capture_output=True, text=True, check=True)
    vectors = np.fromfile(scratch, "<f4").reshape(len(texts), -1)
    scratch.unlink()
    return float(json.loads(run.stdout.splitlines()[-1])), vectors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--per-request", type=int, default=500)
    parser.add_argument("--at-once", type=int, default=4)
    parser.add_argument("--port", type=int, default=18_250)
    arguments = parser.parse_args()
    end_cleanly_on_sigterm()
    model = arguments.model.absolute()
    texts = short_texts(arguments.texts)
    seconds: dict[str, list[float]] = {"ours": [], "sentence-transformers": []}
    for number in range(arguments.rounds):
        spent, vectors = ours(model, texts, arguments)
        seconds["ours"].append(spent)
        spent, expected = theirs(model, texts, Path(f"embed_bench-{number}.f32").absolute())
        seconds["sentence-transformers"].append(spent)
        distance = float(np.abs(vectors - expected).max())
        print(f"round {number}: {seconds['ours'][-1]:.2f} s, {spent:.2f} s, largest difference {distance:.1e}")
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    machine = hardware()
    print(
        f"{machine['cpu']}, {machine['cores']} cores; {model.name}, {len(texts):,} texts; "
        f"medians of {arguments.rounds} rounds."
    )
    for name, value in middle.items():
        print(f"{name}: {value:.2f} s, {len(texts) / value:,.0f} texts/s")
    print(f"ours / theirs: {middle['sentence-transformers'] / middle['ours']:.2f} times the texts a second")


if __name__ == "__main__":
    main()
