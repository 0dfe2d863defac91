"""The GPU benchmark runs from end to end where there is no GPU, and says that its numbers mean nothing there."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from bench import gpu_bench
from bench.engine_runs import engine_over
from bench.gpu_bench import FULL, TINY, Record, markdown
from bench.make_model import SHAPES, make_weights
from text_generation_server.config import Dtype

PROGRAM = Path(__file__).with_name("gpu_bench.py")


def record(device: str = "cuda") -> Record:
    return Record(
        settings=asdict(FULL) | {"device": device},
        versions={"torch": "2.13.0"},
        device="a device",
        copy_bytes_per_s=3e12,
        kernels=[
            {"width": 64, "window": 0, "chunk": 0, "relative_error": 2e-3, "every_element_written": True},
            {"width": 80, "window": 0, "chunk": 0, "relative_error": 4e-3, "every_element_written": True},
        ],
        decode={
            "attention": "triton", "weight_bytes": 15e9, "step_ms": 6.0, "reading_weights_ms": 5.0,
            "bandwidth_share": 0.8333, "idle_share": 0.013, "busy_share_by_profiler": 0.97,
        },
        throughput=[
            {"server": "ours", "concurrency": 1, "tokens_per_s": 160.0},
            {"server": "ours", "concurrency": 16, "tokens_per_s": 2000.0},
            {"server": "vllm", "concurrency": 1, "tokens_per_s": 150.0},
        ],
        failures=["transformers: it did not start"],
    )  # fmt: skip


def test_the_table_has_what_was_promised_beside_what_was_found() -> None:
    text = markdown(record())
    assert "| copy bandwidth | 3000 GB/s | |" in text
    assert "| largest relative error of attention | 4.0e-03 | at most 1e-02 |" in text
    assert "| every element written | yes | yes |" in text
    assert "| part of that bandwidth | 83.3% | at least 80% |" in text
    assert "| gap between steps | 1.3% of a step | at most 5% |" in text
    assert "| time without any kernel, by the profiler | 3.0% | at most 5% |" in text
    assert text.index("| 1 | vllm | 150.0 |") < text.index("| 16 | ours | 2000.0 |")
    assert "- transformers: it did not start" in text
    assert "Not a measurement" not in text


def test_without_a_gpu_it_is_no_measurement() -> None:
    assert "**Not a measurement**" in markdown(record("cpu"))


def test_the_shape_is_the_one_that_is_promised() -> None:
    shape = SHAPES[FULL.shape]
    assert (shape.layers, shape.hidden, shape.heads, shape.kv_heads) == (32, 4096, 32, 8)
    assert (shape.intermediate, shape.vocab, shape.is_tied) == (14_336, 128_256, False)
    assert (FULL.prompt_tokens, FULL.output_tokens, FULL.concurrency) == (512, 256, [1, 16, 64, 256])


def test_the_engine_gives_every_sequence_its_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.engine_runs.PREFILL_TOKENS", 30)  # prompts are cut
    make_weights(SHAPES["tiny"], 0).save_pretrained(tmp_path)
    with engine_over(
        tmp_path, device="cpu", dtype=Dtype.FLOAT32, max_tokens=30, max_sequences=4, cuda_graphs=(), attention="torch"
    ) as engines:
        for seed in (1, 2):
            timed = engines.generate(4, 20, 6, seed)
            tokens: dict[int, int] = {}
            for each in timed:
                for generation in each.result.generations:
                    tokens[generation.sequence_id] = tokens.get(generation.sequence_id, 0) + len(generation.token_ids)
            assert tokens == dict.fromkeys(range(4), 6)
            assert sum(each.result.timings.num_prefill_tokens for each in timed) == 4 * 20
        model = engines.runner.model
        embedding = model.get_input_embeddings().weight.nbytes  # type: ignore[operator]
        total = sum(parameter.nbytes for parameter in model.parameters())
        assert gpu_bench.weight_bytes(model) == total - embedding


@pytest.mark.slow
def test_it_runs_from_end_to_end(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    argv = [
        sys.executable,
        str(PROGRAM),
        "--device",
        "cpu",
        "--tiny",
        "--work",
        str(tmp_path),
        "--output",
        str(tmp_path),
    ]
    environ = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(argv, capture_output=True, text=True, env=environ, timeout=290)
    assert run.returncode == 0, f"{run.stdout[-3000:]}\n{run.stderr[-3000:]}"
    made = json.loads((tmp_path / "benchmark-gpu.json").read_text())
    assert {(row["server"], row["concurrency"]) for row in made["throughput"]} == {
        (server, concurrency) for server in ("ours", "transformers") for concurrency in TINY.concurrency
    }
    assert all(row["relative_error"] < 1e-5 and row["every_element_written"] for row in made["kernels"])
    assert made["decode"]["bandwidth_share"] > 0
    assert "**Not a measurement**" in (tmp_path / "benchmark-gpu.md").read_text()
