"""How long two tenants wait, when one of them floods the server: a simulation of the scheduler, without a model.

    python tests/bench/fairness.py --output docs/

The scheduler, the queue, the permits and the block allocator are the server's own. What a step takes is computed
instead of measured, so that hours pass in seconds and the same every time.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from text_generation_router.admission import Permit, Permits
from text_generation_router.errors import Overloaded
from text_generation_router.scheduling.blocks import BlockAllocator
from text_generation_router.scheduling.budget import BatchLimits
from text_generation_router.scheduling.leases import Leases
from text_generation_router.scheduling.requests import QueuedRequest, Sampling, ValidRequest
from text_generation_router.scheduling.steps import StepPlan, StepScheduler

A, B = b"a", b"b"
STEP_S, ROW_S, TOKEN_S = 0.02, 0.001, 0.0002
"""What a step takes by itself, for each decode row, and for each token of a prompt."""
PROMPT_TOKENS, OUTPUT_TOKENS = 64, 64
BLOCK_SIZE, NUM_BLOCKS = 16, 512
BATCH_SIZE = 32
PERMITS = 256
SHARE_PER_S = 4.0
"""Requests of one tenant that take half of such a server."""
SMALL_PER_S = 3.0
FLOOD = 10
"""Times its share that the other tenant asks for."""


@dataclass(slots=True)
class Seen:
    """Of one tenant."""

    first_token_s: list[float] = field(default_factory=list)
    """From its arrival to its first token, of every request that got in."""
    num_refused: int = 0
    num_tokens: int = 0

    def percentile(self, share: float) -> float:
        ordered = sorted(self.first_token_s)
        return ordered[min(int(len(ordered) * share), len(ordered) - 1)]


def arrivals(rates: dict[bytes, float], duration_s: float, seed: int) -> list[tuple[float, bytes]]:
    """Times and tenants, of a Poisson process for each; those of one tenant do not depend on the others' rates."""
    times = []
    for tenant, rate in rates.items():
        clock, choice = 0.0, random.Random(f"{seed} {tenant!r}")
        while (clock := clock + choice.expovariate(rate)) < duration_s:
            times.append((clock, tenant))
    return sorted(times)


def simulate(
    rates: dict[bytes, float], *, fair_shares: bool, duration_s: float = 300.0, seed: int = 0
) -> dict[bytes, Seen]:
    """Serve tenants that send so many requests a second."""
    scheduler = StepScheduler(
        BatchLimits(max_batch_prefill_tokens=512, max_batch_size=BATCH_SIZE),
        Leases(BlockAllocator(NUM_BLOCKS, BLOCK_SIZE), prefix_caching=False),
        fair_shares=fair_shares,
    )
    permits = Permits(PERMITS, tuple(rates) if fair_shares else ())
    seen = {tenant: Seen() for tenant in rates}
    inside: dict[QueuedRequest, tuple[float, Permit]] = {}
    coming = arrivals(rates, duration_s, seed)
    now, place = 0.0, 0
    while now < duration_s:
        while place < len(coming) and coming[place][0] <= now:
            time, tenant = coming[place]
            place += 1
            try:
                permit = permits.take(tenant)
            except Overloaded:
                seen[tenant].num_refused += 1
                continue
            queued = _request(tenant, place)
            inside[queued] = time, permit
            scheduler.waiting.append(queued)
        plan = scheduler.plan(num_in_flight=0)
        if plan is None:
            if place == len(coming):
                break
            now = coming[place][0]
            continue
        work = plan.work
        now += STEP_S + ROW_S * work.num_decodes + TOKEN_S * work.num_prompt_tokens
        for sequence in _with_token(plan):
            queued = sequence.queued
            queued.output_ids.append(1)
            scheduler.took_token(sequence)
            of_tenant = seen[queued.request.tenant]
            of_tenant.num_tokens += 1
            time, permit = inside[queued]
            if len(queued.output_ids) == 1:
                of_tenant.first_token_s.append(now - time)
            if len(queued.output_ids) == OUTPUT_TOKENS:
                scheduler.finish(sequence)
                del inside[queued]
                permit.release()
    return seen


def _request(tenant: bytes, number: int) -> QueuedRequest:
    request = ValidRequest(
        inputs="",
        input_ids=[number] * PROMPT_TOKENS,
        sampling=Sampling(),
        max_new_tokens=OUTPUT_TOKENS,
        tenant=tenant,
    )
    return QueuedRequest(request, validation_s=0.0)


def _with_token(plan: StepPlan) -> list[Any]:
    """Sequences that get a token of the step."""
    return [*plan.decodes, *(sequence for sequence, _ in plan.chunks if not sequence.num_unsent)]


def runs(duration_s: float, seed: int) -> dict[str, dict[bytes, Seen]]:
    """The small tenant beside one that keeps to its share, and beside a flood with and without fair shares."""
    small = {B: SMALL_PER_S}
    options: dict[str, Any] = {"duration_s": duration_s, "seed": seed}
    return {
        "A keeps to its share": simulate({A: SHARE_PER_S, **small}, fair_shares=True, **options),
        "A floods, fair shares": simulate({A: FLOOD * SHARE_PER_S, **small}, fair_shares=True, **options),
        "A floods, first come first served": simulate({A: FLOOD * SHARE_PER_S, **small}, fair_shares=False, **options),
    }


def table(results: dict[str, dict[bytes, Seen]], duration_s: float) -> str:
    base = results["A keeps to its share"][B].percentile(0.99)
    lines = [
        f"Two tenants, {duration_s:g} s of simulated time: B sends {SMALL_PER_S:g} requests a second, A sends "
        f"{SHARE_PER_S:g}, which is its share, or {FLOOD * SHARE_PER_S:g}; {PROMPT_TOKENS} tokens in, {OUTPUT_TOKENS} "
        f"out; {PERMITS} permits.",
        "",
        "```",
        "python tests/bench/fairness.py --output docs",
        "```",
        "",
        "| | B: TTFT p50 ms | p99 ms | p99 against A within its share | B refused | tokens of A | tokens of B |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, seen in results.items():
        small, other = seen[B], seen[A]
        p99 = small.percentile(0.99)
        lines.append(
            f"| {name} | {small.percentile(0.5) * 1e3:.0f} | {p99 * 1e3:.0f} | {p99 / base:.2f} | {small.num_refused} "
            f"| {other.num_tokens:,} | {small.num_tokens:,} |"
        )
    return "\n".join([*lines, "", "![waiting times of both tenants](fairness.png)", ""])


def plot(results: dict[str, dict[bytes, Seen]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(12, 4), sharey=True)
    for axis, (name, seen) in zip(axes, results.items(), strict=True):
        for tenant, label in ((A, "A"), (B, "B")):
            times = sorted(seen[tenant].first_token_s)
            axis.plot(times, [100 * (index + 1) / len(times) for index in range(len(times))], label=label)
        axis.set(title=name, xlabel="time to first token, s", xscale="log")
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0].set_ylabel("share of requests, %")
    figure.tight_layout()
    figure.savefig(file, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--duration", type=float, default=600.0, help="simulated seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    results = runs(arguments.duration, arguments.seed)
    text = table(results, arguments.duration)
    (arguments.output / "fairness.md").write_text(text)
    plot(results, arguments.output / "fairness.png")
    print(text)


if __name__ == "__main__":
    main()
