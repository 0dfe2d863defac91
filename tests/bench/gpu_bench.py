"""Everything that is promised of a GPU, measured by one command; JSON and a Markdown table.

    python tests/bench/gpu_bench.py --work DIR --output DIR [--vllm VENV] [--transformers VENV]

Copy bandwidth of the device; the error of the attention kernels against the reference, on fresh random inputs; a
decode step of one row against the time that reading the weights takes at that bandwidth; the gap in which the device
idles between steps; tokens per second of some requests at once, beside transformers' continuous batching and vLLM.
The model has the shape of Llama-3.1-8B and random weights, made into `--work` on the first run (16 GB).

`--device cpu --tiny` does the same with a model of two layers, in Triton's interpreter: it shows that the program runs,
and its numbers mean nothing.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

NAME = "benchmark-gpu"
MOST_ERROR = 1e-2
LEAST_BANDWIDTH_SHARE = 0.8
MOST_IDLE_SHARE = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    device: str
    shape: str
    dtype: str
    attention: str
    prompt_tokens: int
    output_tokens: int
    concurrency: list[int]
    cuda_graphs: tuple[int, ...]
    copied_bytes: int
    kernel_widths: list[int]
    longest_row: int


FULL = Settings(
    device="cuda", shape="llama-3.1-8b", dtype="bfloat16", attention="triton", prompt_tokens=512, output_tokens=256,
    concurrency=[1, 16, 64, 256], cuda_graphs=(1, 2, 4, 8, 16, 32, 64, 128, 256), copied_bytes=2**32,
    kernel_widths=[64, 80, 96, 128, 256], longest_row=4000,
)  # fmt: skip
TINY = Settings(
    device="cpu", shape="tiny", dtype="float32", attention="triton", prompt_tokens=20, output_tokens=4,
    concurrency=[1, 2], cuda_graphs=(1, 2), copied_bytes=2**24, kernel_widths=[16], longest_row=40,
)  # fmt: skip


@dataclass(slots=True)
class Record:
    """All that was measured, as it goes into the JSON file."""

    settings: dict[str, Any]
    versions: dict[str, str]
    device: str
    copy_bytes_per_s: float = 0.0
    kernels: list[dict[str, Any]] = field(default_factory=list)
    decode: dict[str, Any] = field(default_factory=dict)
    throughput: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def copy_bandwidth(settings: Settings) -> float:
    """Bytes read and written a second by a copy on the device; the best of 10."""
    import torch

    source = torch.ones(settings.copied_bytes, dtype=torch.uint8, device=settings.device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(10):
        synchronize(settings.device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(settings.device)
        best = max(best, 2 * settings.copied_bytes / (time.perf_counter() - start))
    return best


def synchronize(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def kernel_errors(settings: Settings, seed: int) -> list[dict[str, Any]]:
    """Of attention over decode rows and prompt chunks, all memory being not-a-number before."""
    import random

    import torch
    from paged_attention import attended
    from text_generation_server.attention.interface import LayerSpec
    from text_generation_server.attention.triton_paged import TritonPaged

    rows = []
    rng = random.Random(seed)
    for width in settings.kernel_widths:
        for window, chunk in ((0, 0), (100, 0), (0, 100)):
            layer = LayerSpec(query_heads=8, kv_heads=2, key_dim=width, value_dim=width, window=window, chunk=chunk)
            decode = [(rng.randint(1, settings.longest_row), 1) for _ in range(4)]
            chunks = [(rng.randint(0, settings.longest_row // 8), rng.randint(2, settings.longest_row // 8))]
            out, expected = attended(
                TritonPaged, layer, decode + chunks, block_size=16, scaling=width**-0.5, poisoned=True,
                dtype=getattr(torch, settings.dtype), device=settings.device, seed=seed,
            )  # fmt: skip
            error = float((out.float() - expected).norm() / expected.norm())
            rows.append(
                {
                    "width": width, "window": window, "chunk": chunk, "relative_error": error,
                    "every_element_written": bool(out.isfinite().all()),
                }
            )  # fmt: skip
    return rows


def measure_engine(settings: Settings, folder: Path, record: Record, seed: int) -> None:
    from bench.engine_runs import engine_over
    from text_generation_server.config import Dtype

    with engine_over(
        folder, device=settings.device, dtype=Dtype(settings.dtype), attention=settings.attention,
        max_tokens=settings.prompt_tokens + settings.output_tokens, max_sequences=max(settings.concurrency),
        cuda_graphs=settings.cuda_graphs,
    ) as engines:  # fmt: skip
        lengths = settings.prompt_tokens, settings.output_tokens
        engines.generate(max(settings.concurrency), *lengths, seed)  # warm
        for concurrency in settings.concurrency:
            start = time.perf_counter()
            timed = engines.generate(concurrency, *lengths, seed + concurrency)
            rate = concurrency * settings.output_tokens / (time.perf_counter() - start)
            steps = [each for each in timed if not each.result.timings.num_prefill_tokens]
            spans = [after.at_s - before.at_s for before, after in itertools.pairwise(steps)]
            step_s = statistics.median(spans)
            idle_s = statistics.median(each.result.timings.idle_ns for each in steps[1:]) * 1e-9
            record.throughput.append(
                {
                    "server": "ours", "concurrency": concurrency, "tokens_per_s": round(rate, 1),
                    "decode_step_ms": step_s * 1e3, "idle_ms": idle_s * 1e3, "idle_share": idle_s / step_s,
                }
            )  # fmt: skip
            print(f"ours x{concurrency}: {rate:.1f} tokens/s, {step_s * 1e3:.2f} ms a step", flush=True)
        weights = weight_bytes(engines.runner.model)
        step_s = record.throughput[0]["decode_step_ms"] * 1e-3
        record.decode = {
            "attention": engines.runner.info.attention,
            "weight_bytes": weights,
            "step_ms": step_s * 1e3,
            "reading_weights_ms": weights / record.copy_bytes_per_s * 1e3,
            "bandwidth_share": weights / record.copy_bytes_per_s / step_s,
            "idle_share": record.throughput[0]["idle_share"],
            "busy_share_by_profiler": profiled_busy_share(engines, settings, seed),
        }


def weight_bytes(model: Any) -> int:
    """What a step of one row reads: all parameters but an embedding that does not compute the logits as well."""
    embedding = model.get_input_embeddings().weight
    output = model.get_output_embeddings()
    is_tied = output is not None and output.weight.data_ptr() == embedding.data_ptr()
    held = {parameter.data_ptr(): parameter.nbytes for parameter in model.parameters()}
    if not is_tied:
        held.pop(embedding.data_ptr(), None)
    return sum(held.values())


def profiled_busy_share(engines: Any, settings: Settings, seed: int) -> float | None:
    """Part of the time in which some kernel or copy runs on the device, in decode steps of one row; None on a CPU.

    The prompt is one token, so that its step is one of the same kind.
    """
    if settings.device != "cuda":
        return None
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        engines.generate(1, 1, 64, seed)
        torch.cuda.synchronize()
    ranges = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profile.events() or ()
        if event.device_type == torch._C._autograd.DeviceType.CUDA
    )
    ranges = ranges[len(ranges) // 4 :]  # what comes first is the prompt's step, and the profiler's own start
    first = end = float(ranges[0][0])
    busy = 0.0
    for start, stop in ranges:
        busy += max(0.0, stop - max(start, end))
        end = max(end, float(stop))
    return busy / (end - first)


def measure_peer(name: str, python: Path, settings: Settings, folder: Path, record: Record) -> None:
    argv = [
        str(python), str(Path(__file__).with_name("peer_runs.py")), name, "--model", str(folder),
        "--device", settings.device, "--dtype", settings.dtype,
        "--concurrency", ",".join(map(str, settings.concurrency)),
        "--prompt-tokens", str(settings.prompt_tokens), "--output-tokens", str(settings.output_tokens),
    ]  # fmt: skip
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(argv, capture_output=True, text=True, check=False, env=environ | {"HF_HUB_OFFLINE": "1"})
    for line in run.stdout.splitlines():
        if line.startswith("{"):
            record.throughput.append({"server": name, **json.loads(line)})
    if run.returncode:
        print(run.stderr[-3000:], file=sys.stderr)
        record.failures.append(f"{name}: {(run.stderr.strip().splitlines() or ['no word'])[-1][:200]}")


def versions() -> dict[str, str]:
    from importlib import metadata

    found = {"python": platform.python_version()}
    for package in ("torch", "triton", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else f"{platform.processor() or 'a processor'}, no GPU"


def markdown(record: Record) -> str:
    settings, decode = record.settings, record.decode
    parts = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    lines = [f"{record.device}; {parts}; shape {settings['shape']}, {settings['dtype']}."]
    if settings["device"] != "cuda":
        lines += ["", "**Not a measurement**: without a GPU this shows only that the program runs."]
    lines += ["", "| what | found | wanted |", "|---|---:|---:|"]
    lines.append(f"| copy bandwidth | {record.copy_bytes_per_s / 1e9:.0f} GB/s | |")
    if record.kernels:
        worst = max(row["relative_error"] for row in record.kernels)
        written = all(row["every_element_written"] for row in record.kernels)
        lines.append(f"| largest relative error of attention | {worst:.1e} | at most {MOST_ERROR:.0e} |")
        lines.append(f"| every element written | {'yes' if written else 'no'} | yes |")
    if decode:
        lines += [
            f"| decode step of one row, attention {decode['attention']} | {decode['step_ms']:.2f} ms | |",
            f"| reading {decode['weight_bytes'] / 1e9:.2f} GB of weights at that bandwidth | "
            f"{decode['reading_weights_ms']:.2f} ms | |",
            f"| part of that bandwidth | {decode['bandwidth_share']:.1%} | at least {LEAST_BANDWIDTH_SHARE:.0%} |",
            f"| gap between steps | {decode['idle_share']:.1%} of a step | at most {MOST_IDLE_SHARE:.0%} |",
        ]
        busy = decode["busy_share_by_profiler"]
        if busy is not None:
            lines.append(
                f"| time without any kernel, by the profiler | {1 - busy:.1%} | at most {MOST_IDLE_SHARE:.0%} |"
            )
    lines += [
        "",
        f"{settings['prompt_tokens']} tokens in, {settings['output_tokens']} out, greedy, all requests at once:",
        "",
        "| requests | server | tokens/s |",
        "|---:|---|---:|",
    ]
    for row in sorted(record.throughput, key=lambda row: row["concurrency"]):
        lines.append(f"| {row['concurrency']} | {row['server']} | {row['tokens_per_s']:.1f} |")
    if record.failures:
        lines += ["", "Failed:", "", *(f"- {failure}" for failure in record.failures)]
    return "\n".join(lines) + "\n"


def write(record: Record, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{NAME}.json").write_text(json.dumps(asdict(record), indent=2) + "\n")
    (output / f"{NAME}.md").write_text(markdown(record))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of two layers: whether the program runs")
    parser.add_argument("--work", type=Path, default=Path(".bench"), help="folder for the model, kept between runs")
    parser.add_argument("--output", type=Path, default=Path("docs"), help=f"folder for {NAME}.md and {NAME}.json")
    parser.add_argument("--vllm", type=Path, help="virtual environment of vLLM; without it vLLM is left out")
    parser.add_argument("--transformers", type=Path, help="virtual environment of transformers; default: this one")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--attention", help="another back end than triton")
    arguments = parser.parse_args()
    chosen = TINY if arguments.tiny else FULL
    changes = {"device": arguments.device, "attention": arguments.attention or chosen.attention}
    settings = Settings(**{**asdict(chosen), **changes})
    if settings.device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before anybody imports triton
    from bench.make_model import SHAPES, make_model

    seed = time.time_ns() % 2**31
    record = Record(asdict(settings) | {"seed": seed}, versions(), device_name(settings.device))
    folder = arguments.work / settings.shape
    if not (folder / "generation_config.json").is_file():  # what is written last
        make_model(folder, SHAPES[settings.shape], device=settings.device)
    record.copy_bytes_per_s = copy_bandwidth(settings)
    record.kernels = kernel_errors(settings, seed)
    measure_engine(settings, folder, record, seed)
    write(record, arguments.output)
    if not arguments.no_peers:
        peers = {"transformers": arguments.transformers, "vllm": arguments.vllm}
        for name, home in peers.items():
            if home is not None or name == "transformers":
                python = Path(sys.executable) if home is None else home / "bin" / "python"
                measure_peer(name, python, settings, folder.absolute(), record)
                write(record, arguments.output)
    print(markdown(record))
    sys.exit(1 if record.failures else 0)


if __name__ == "__main__":
    main()
