"""Everything that was measured, as JSON: raw values, their statistics, and what they were measured with."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from text_generation_launcher.benchmark.config import BenchmarkConfig
from text_generation_launcher.benchmark.measurements import BatchResult, summarise
from text_generation_launcher.benchmark.tables import LATENCIES, RATES
from text_generation_launcher.benchmark.target import Description, Surprises

SCHEMA = 1
"""Raised when a field changes its meaning or goes away."""


def record(
    config: BenchmarkConfig,
    description: Description,
    surprises: Surprises,
    results: Sequence[BatchResult],
    *,
    is_complete: bool,
) -> dict[str, Any]:
    """What `--json` writes. Times are seconds, rates tokens a second."""
    return {
        "schema": SCHEMA,
        "is_complete": is_complete,
        "ended_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": machine(),
        "target": asdict(description),
        "parameters": {
            "tokenizer_name": config.tokenizer_name,
            "revision": config.revision,
            "batch_sizes": list(config.batch_sizes),
            "sequence_length": config.sequence_length,
            "decode_length": config.decode_length,
            "runs": config.runs,
            "warmups": config.warmups,
            **asdict(config.sampling),
        },
        "streams": {
            "sent": surprises.num_streams,
            "ended_early": surprises.num_short,
            "prompt_tokens": sorted(surprises.prompt_tokens),
        },
        "batches": [_batch(result) for result in results],
    }


def versions() -> dict[str, str]:
    """Of this tool and what it measures with."""
    names = ("text-generation-inference", "grpcio", "tokenizers")
    return {name: version(name) for name in names} | {"python": platform.python_version()}


def machine(cpu_info: Path = Path("/proc/cpuinfo")) -> dict[str, Any]:
    """This tool's; a server behind `--url` may have another."""
    name = platform.processor() or platform.machine()
    if cpu_info.is_file():
        fields = (line.partition(":") for line in cpu_info.read_text(encoding="utf-8", errors="replace").splitlines())
        name = next((value.strip() for key, _, value in fields if key.strip() == "model name"), name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": name, "cores": cores, "system": platform.platform()}


def _batch(result: BatchResult) -> dict[str, Any]:
    return {
        "batch_size": result.batch_size,
        "latency_s": {step: _summary(values(result)) for step, values in LATENCIES.items()},
        "throughput": {step: _summary(values(result)) for step, values in RATES.items()},
        "runs": [asdict(run) for run in result.runs],
    }


def _summary(values: Sequence[float]) -> dict[str, float] | None:
    summary = summarise(values)
    return None if summary is None else asdict(summary)
