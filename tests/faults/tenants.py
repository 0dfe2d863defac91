"""Two tenants on a real server: what one of them waits when the other floods it, with fair shares and without.

    python tests/faults/tenants.py --model DIR --seconds 60

A has half of the places as clients, which is its share, or ten times as many; B has a few. B waits from when it first
asks, also while it is refused. Medians of repetitions.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.load import prompts_of
from faults.load import INPUT_TOKENS, LIMIT, Clients, Level, percentile
from integration.launched import starting

SHARE = LIMIT // 2
FLOOD = 10
B_CLIENTS = 6
MODES = {
    "A keeps to its share": (SHARE, "true"),
    "A floods, fair shares": (FLOOD * SHARE, "true"),
    "A floods, first come first served": (FLOOD * SHARE, "false"),
}


def measure(model: Path, seconds: float, num_clients: int, fair_shares: str, seed: int) -> tuple[Level, Level]:
    """What A and B see."""
    source = prompts_of(model / "tokenizer.json", INPUT_TOKENS, seed)
    prompts = [next(source) for _ in range(300)]
    a, b = Level(), Level()
    arguments = ("--model-id", str(model), "--max-concurrent-requests", str(LIMIT), "--api-key", "key-a,key-b")
    with starting(*arguments, "--fair-shares", fair_shares, environ={}) as server:
        server.wait_until_ready()

        async def run() -> None:
            flooding = Clients(server, prompts, Level(), key="key-a")
            await flooding.run(SHARE, 5.0)
            await asyncio.gather(
                Clients(server, prompts, a, key="key-a").run(num_clients, seconds),
                Clients(server, prompts, b, key="key-b").run(B_CLIENTS, seconds),
            )

        asyncio.run(run())
        assert server.stop() == 0
    a.seconds = b.seconds = seconds
    return a, b


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    seen: dict[str, list[tuple[Level, Level]]] = {mode: [] for mode in MODES}
    for seed in range(arguments.repetitions):
        for mode, (num_clients, fair_shares) in MODES.items():
            seen[mode].append(measure(arguments.model, arguments.seconds, num_clients, fair_shares, seed))
    print("| | B: TTFT p50 ms | p99 ms | against A within its share | B refused | tokens/s of A | of B |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    base = 0.0
    for mode, pairs in seen.items():
        p50, p99 = (statistics.median(percentile(b.waited_s, share) for _, b in pairs) * 1e3 for share in (0.5, 0.99))
        base = base or p99
        refused = sum(b.statuses[429] for _, b in pairs)
        rates = [statistics.median(pair[place].tokens_per_s for pair in pairs) for place in (0, 1)]
        print(f"| {mode} | {p50:.0f} | {p99:.0f} | {p99 / base:.2f} | {refused} | {rates[0]:.0f} | {rates[1]:.0f} |")


if __name__ == "__main__":
    main()
