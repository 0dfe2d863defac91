"""How cost grows: a decode step against batch and context, a prefill against length, and what explains the growth.

    python tests/bench/growth.py --model DIR --output docs/ [--batches 1,8,64] [--contexts 128,4096]

Starts one shard as the launcher does and talks to it alone: one step per unary call, by the shard's own clock and by
ours. The shard's cache really holds what a step reads: other memory would be faster than what a server sees.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc
import matplotlib
import numpy
import torch

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import LogFormatter
from text_generation_launcher.plan import tunables
from text_generation_proto.v1 import generate_pb2 as pb
from text_generation_proto.v1.generate_pb2_grpc import TextGenerationStub

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.compare import command_line, describe_model, hardware
from bench.load import numbers
from bench.servers import end_cleanly_on_sigterm, package_version

NAME = "benchmark-growth"
PAGE_BYTES = 4096
GREEDY = pb.SamplingParameters(temperature=1, top_p=1, typical_p=1, repetition_penalty=1)
START_WITHIN_S = 300
STEP_WITHIN_S = 600


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What a step has to compute and to read, from config.json."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> "ModelSize":
        return cls(
            config["num_hidden_layers"],
            config["hidden_size"],
            config["num_attention_heads"],
            config["num_key_value_heads"],
            config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            config["intermediate_size"],
            config["vocab_size"],
        )

    @property
    def layer_weights(self) -> int:
        """Of all layers' products."""
        projections = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (projections + 3 * self.hidden * self.intermediate)

    @property
    def head_weights(self) -> int:
        return self.hidden * self.vocabulary

    @property
    def weight_bytes(self) -> int:
        """What every step reads, in bfloat16."""
        return 2 * (self.layer_weights + self.head_weights)

    @property
    def slots_per_page(self) -> int:
        """Tokens of one head's keys, in bfloat16, that share a page of memory."""
        return max(1, PAGE_BYTES // (2 * self.head_dim))

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim

    def prefill_flops(self, num_tokens: int) -> int:
        """Products of all tokens, causal attention (half of the square), and the head for the last token alone."""
        attention = 2 * self.layers * self.heads * self.head_dim * num_tokens * (num_tokens + 1)
        return 2 * self.layer_weights * num_tokens + attention + 2 * self.head_weights


@dataclass(frozen=True, slots=True)
class Timing:
    forward_ms: float
    sample_ms: float
    total_ms: float
    round_trip_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Medians at one place of the grid."""

    batch: int
    tokens: int
    """Context of each sequence, or the length of the prompt."""
    timing: Timing
    steps: int


class Shard:
    """Steps one by one, and the blocks of a cache that fits the largest of them."""

    def __init__(self, url: str, batch: int, context: int) -> None:
        self._stub = TextGenerationStub(grpc.insecure_channel(url))  # type: ignore[no-untyped-call]
        self._step_ids = itertools.count(1)
        self._sequence_ids = itertools.count(1)
        self._info = self._stub.Info(pb.InfoRequest(), timeout=START_WITHIN_S, wait_for_ready=True)
        self.block_size = self._info.block_size
        self._blocks_each = -(-context // self.block_size)
        self._batch = batch
        self._num_blocks = batch * self._blocks_each
        limits = pb.WarmupRequest(
            max_batch_prefill_tokens=context,
            max_batch_total_tokens=self._num_blocks * self.block_size,
            max_batch_size=batch,
            max_total_tokens=context,
            max_concurrent_requests=batch,
        )
        self._stub.Warmup(limits, timeout=STEP_WITHIN_S)

    def tables(self, batch: int) -> list[range]:
        """Blocks for sequences of the largest context, each in its own part of the cache."""
        return [range(1 + row * self._blocks_each, 1 + (row + 1) * self._blocks_each) for row in range(batch)]

    def fill_cache(self, slots_per_page: int) -> None:
        """Write every page once: memory never written is one page of zeros for all, and reading that costs nothing."""
        every = min(slots_per_page, self.block_size)
        blocks = range(1, self._num_blocks + 1)
        for first in range(0, len(blocks), self._batch):
            tables = [range(block, block + 1) for block in blocks[first : first + self._batch]]
            for num_tokens in range(every, self.block_size + 1, every):
                self.drop(self.start(tables, num_tokens, num_cached=num_tokens - 1)[0])

    def start(self, tables: list[range], num_tokens: int, num_cached: int) -> tuple[list[int], Timing]:
        """A sequence of `num_tokens` for each table, of which the first `num_cached` are taken as computed."""
        ids = [next(self._sequence_ids) for _ in tables]
        prefill = pb.Prefill()
        for sequence_id, blocks in zip(ids, tables, strict=True):
            prefill.new_sequences.add(
                sequence_id=sequence_id,
                token_ids=[(sequence_id + i) % self._info.vocab_size for i in range(num_tokens)],
                num_prompt_tokens=num_tokens,
                blocks=blocks,
                num_cached_tokens=num_cached,
                sampling=GREEDY,
            )
            prefill.chunks.add(sequence_id=sequence_id, num_tokens=num_tokens - num_cached)
        return ids, self._timed("Prefill", pb.PrefillRequest(step_id=next(self._step_ids), prefill=prefill))

    def decode(self, ids: list[int]) -> Timing:
        decode = pb.Decode(sequence_ids=ids)
        return self._timed("Decode", pb.DecodeRequest(step_id=next(self._step_ids), decode=decode))

    def drop(self, ids: list[int]) -> None:
        self._timed("Decode", pb.DecodeRequest(step_id=next(self._step_ids), drops=ids))

    def _timed(self, call: str, request: pb.PrefillRequest | pb.DecodeRequest) -> Timing:
        start = time.perf_counter()
        result: pb.StepResult = getattr(self._stub, call)(request, timeout=STEP_WITHIN_S)
        round_trip_ms = (time.perf_counter() - start) * 1000
        if result.HasField("failure") or result.failures:
            raise RuntimeError(f"a step failed: {result.failure.message or result.failures[0].message}")
        clock = result.timings
        return Timing(clock.forward_ns / 1e6, clock.sample_ns / 1e6, clock.total_ns / 1e6, round_trip_ms)


@contextmanager
def shard_process(model: Path) -> Iterator[str]:
    """Its gRPC target. Memory is handed out as under the launcher, which makes a tenth of a step."""
    command = str(Path(sys.executable).with_name("text-generation-server"))
    with tempfile.TemporaryDirectory(prefix="growth-") as folder, open(Path(folder) / "log", "wb") as log:
        socket = Path(folder) / "shard"
        process = subprocess.Popen(
            [command, "serve", str(model), "--dtype", "bfloat16", "--uds-path", str(socket)],
            env={**os.environ, "HF_HUB_OFFLINE": "1", **tunables(os.environ)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            yield f"unix://{socket}-0"
        except grpc.RpcError as error:
            raise SystemExit(f"{error}\n{(Path(folder) / 'log').read_text()[-3000:]}") from error
        finally:
            process.terminate()
            process.wait()


def median(timings: list[Timing]) -> Timing:
    columns = zip(*(asdict(timing).values() for timing in timings), strict=True)
    return Timing(*(round(statistics.median(column), 3) for column in columns))


def measure_decodes(shard: Shard, batches: list[int], contexts: list[int], rounds: int, steps: int) -> list[Point]:
    """In every round the whole grid, so that a slow minute of the machine does not fall on one point."""
    timings: dict[tuple[int, int], list[Timing]] = {}
    for _ in range(rounds):
        for context in contexts:
            ids, _ = shard.start(shard.tables(max(batches)), context, num_cached=context - 1)
            for batch in batches:
                shard.decode(ids[:batch])  # the first of a shape is not counted
                timings.setdefault((batch, context), []).extend(shard.decode(ids[:batch]) for _ in range(steps))
            shard.drop(ids)
    return [
        Point(batch=batch, tokens=context, timing=median(found), steps=len(found))
        for (batch, context), found in timings.items()
    ]


def measure_prefills(shard: Shard, lengths: list[int], rounds: int) -> list[Point]:
    timings: dict[int, list[Timing]] = {length: [] for length in lengths}
    for round_number in range(rounds + 1):
        for length, found in timings.items():
            ids, timing = shard.start(shard.tables(1), length, num_cached=0)
            shard.drop(ids)
            if round_number:  # the first is not counted
                found.append(timing)
    return [Point(batch=1, tokens=length, timing=median(found), steps=len(found)) for length, found in timings.items()]


def read_bandwidth(size_bytes: int = 2**30, repeats: int = 7) -> float:
    """Bytes a second of one sum over more memory than any cache holds, on all cores: the best of some."""
    values = torch.ones(size_bytes // 4)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        values.sum()
        seconds.append(time.perf_counter() - start)
    return size_bytes / min(seconds)


def fit(rows: list[list[float]], values: list[float]) -> list[float]:
    """Coefficients with the least sum of squared relative errors: else the largest point alone would decide."""
    weights = 1 / numpy.array(values)
    solution = numpy.linalg.lstsq(numpy.array(rows) * weights[:, None], numpy.ones(len(values)), rcond=None)[0]
    return [float(coefficient) for coefficient in solution]


def explain(decodes: list[Point], prefills: list[Point], size: ModelSize, bandwidth: float) -> dict[str, Any]:
    """Decode ms = step + row x batch + context x thousands of tokens in all contexts; prefill ms = a + b n + c n^2."""
    rows = [[1, point.batch, point.batch * point.tokens / 1000] for point in decodes]
    step_ms, row_ms, context_ms = fit(rows, [point.timing.total_ms for point in decodes])
    kv_bytes_per_s = size.kv_bytes_per_token * 1000 / (context_ms / 1000)
    lengths = [point.tokens for point in prefills]
    prefill_ms = [point.timing.total_ms for point in prefills]
    start_ms, token_ms, square_ms = fit([[1, n / 1000, (n / 1000) ** 2] for n in lengths], prefill_ms)
    return {
        "decode_ms_per_step": round(step_ms, 2),
        "decode_ms_per_sequence": round(row_ms, 3),
        "decode_ms_per_1000_context_tokens": round(context_ms, 3),
        "weights_gb": round(size.weight_bytes / 1e9, 3),
        "kv_bytes_per_token": size.kv_bytes_per_token,
        "memory_read_gb_per_s": round(bandwidth / 1e9, 1),
        "ms_to_read_weights": round(size.weight_bytes / bandwidth * 1000, 2),
        "kv_read_gb_per_s": round(kv_bytes_per_s / 1e9, 2),
        "kv_read_share_of_bandwidth": round(kv_bytes_per_s / bandwidth, 3),
        "prefill_ms_per_prompt": round(start_ms, 2),
        "prefill_ms_per_1000_tokens": round(token_ms, 1),
        "prefill_ms_per_1000_tokens_squared": round(square_ms, 2),
        "prefill_gflop_per_s": [
            round(size.prefill_flops(n) / ms / 1e6, 1) for n, ms in zip(lengths, prefill_ms, strict=True)
        ],
    }


def markdown(run: dict[str, Any]) -> str:
    found, machine = run["explained"], run["hardware"]
    contexts = sorted({point["tokens"] for point in run["decodes"]})
    cells = {(point["batch"], point["tokens"]): point["timing"] for point in run["decodes"]}
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores ({', '.join(machine['instructions'])}), "
        f"{machine['memory_gib']} GiB; {run['version']}; medians, one step per call, the shard's own clock.",
        "",
        f"The model: {run['model']}.",
        "",
        *("```", run["command"], "```"),
        "",
        f"| decode, ms a step: batch | {' | '.join(f'context {n:,}' for n in contexts)} | call beside the step, ms |",
        f"|---:|{'---:|' * (len(contexts) + 1)}",
    ]
    for batch in sorted({batch for batch, _ in cells}):
        row = [cells[batch, context] for context in contexts]
        outside = statistics.median(timing["round_trip_ms"] - timing["total_ms"] for timing in row)
        lines.append(f"| {batch} | {' | '.join(format(timing['total_ms'], '.1f') for timing in row)} | {outside:.2f} |")
    lines += ["", "| prompt, tokens | prefill, ms | tokens/s | GFLOP/s |", "|---:|---:|---:|---:|"]
    for point, flops in zip(run["prefills"], found["prefill_gflop_per_s"], strict=True):
        ms, tokens = point["timing"]["total_ms"], point["tokens"]
        lines.append(f"| {tokens:,} | {ms:.1f} | {tokens / ms * 1000:.0f} | {flops:.0f} |")
    lines += [
        "",
        f"- A decode step takes {found['decode_ms_per_step']} ms, and {found['decode_ms_per_sequence']} ms for each "
        f"sequence in it. Its weights are {found['weights_gb']} GB; reading them takes "
        f"{found['ms_to_read_weights']} ms at the {found['memory_read_gb_per_s']} GB/s that this machine reads memory "
        "with, measured in the same run.",
        f"- 1,000 tokens of context, whosever they are, add {found['decode_ms_per_1000_context_tokens']} ms: at "
        f"{found['kv_bytes_per_token']:,} bytes a token that is {found['kv_read_gb_per_s']} GB/s of cached keys and "
        f"values, {100 * found['kv_read_share_of_bandwidth']:.0f} % of what memory gives.",
        f"- A prompt of n thousand tokens takes {found['prefill_ms_per_prompt']} + "
        f"{found['prefill_ms_per_1000_tokens']} n + {found['prefill_ms_per_1000_tokens_squared']} n² ms; the square is "
        "attention.",
        "",
        f"![decode and prefill time]({NAME}.png)",
    ]
    return "\n".join(lines) + "\n"


def plot(run: dict[str, Any], path: Path) -> None:
    figure, (decode, prefill) = pyplot.subplots(1, 2, figsize=(11, 4.4))
    for context in sorted({point["tokens"] for point in run["decodes"]}):
        points = sorted((p["batch"], p["timing"]["total_ms"]) for p in run["decodes"] if p["tokens"] == context)
        decode.plot(*zip(*points, strict=True), marker="o", label=f"context {context:,}")
    prefill.plot(*zip(*((p["tokens"], p["timing"]["total_ms"]) for p in run["prefills"]), strict=True), marker="o")
    decode.set(title="decode, ms a step", xlabel="sequences in the batch")
    prefill.set(title="prefill of one prompt, ms", xlabel="tokens in the prompt")
    decode.legend()
    for panel in (decode, prefill):
        panel.set(xscale="log", yscale="log")
        ticks = sorted({x for line in panel.get_lines() for x in line.get_xdata()})
        panel.set_xticks(ticks, [f"{int(tick):,}" for tick in ticks])
        panel.xaxis.minorticks_off()
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.4)))  # as numbers, where there is room
        panel.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder that make_model.py wrote")
    parser.add_argument("--batches", type=numbers, default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--contexts", type=numbers, default=[128, 512, 1024, 2048, 4096])
    parser.add_argument("--lengths", type=numbers, default=[64, 128, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="decode steps of each point in a round")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder for the three files")
    arguments = parser.parse_args()
    end_cleanly_on_sigterm()
    model = arguments.model.absolute()
    size = ModelSize.of(json.loads((model / "config.json").read_text()))
    batches = sorted(arguments.batches)
    # A sequence of a round takes a step and the counted ones in every batch that it is part of.
    room = max(max(arguments.contexts) + (arguments.steps + 1) * len(batches) + 1, max(arguments.lengths) + 1)
    bandwidth = read_bandwidth()
    with shard_process(model) as url:
        shard = Shard(url, max(batches), room)
        shard.fill_cache(size.slots_per_page)
        decodes = measure_decodes(shard, batches, arguments.contexts, arguments.rounds, arguments.steps)
        prefills = measure_prefills(shard, arguments.lengths, arguments.rounds)
    run = {
        "command": command_line(sys.argv),
        "model": describe_model(model),
        "version": package_version(sys.executable, "text-generation-inference"),
        "hardware": hardware(),
        "explained": explain(decodes, prefills, size, bandwidth),
        "decodes": [asdict(point) for point in decodes],
        "prefills": [asdict(point) for point in prefills],
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    text = markdown(run)
    print(text)
    (arguments.output / f"{NAME}.json").write_text(json.dumps(run, indent=1) + "\n")
    (arguments.output / f"{NAME}.md").write_text(text)
    plot(run, arguments.output / f"{NAME}.png")


if __name__ == "__main__":
    main()
