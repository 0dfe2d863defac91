"""`bench.tables`: medians, ratios and what is said beside them."""

import json
from pathlib import Path
from typing import Any

import pytest
from bench.tables import advantage, markdown, medians_of, write_results

NAME = "benchmark-peers"


def report(server: str, tokens_per_s: float, **fields: Any) -> dict[str, Any]:
    latencies = {"ttft_ms": {"p50": 100, "p99": 150}, "itl_ms": {"p50": 10, "p99": 20}}
    defaults = {"concurrency": 8, "round": 0, "errors": {}, **latencies}
    return {"server": server, "tokens_per_s": tokens_per_s, **defaults, **fields}


def run_of(*reports: dict[str, Any]) -> dict[str, Any]:
    servers = list(dict.fromkeys(one["server"] for one in reports))
    start = {"round": 0, "ready_s": 5.0, "first_answer_s": 6.0, "rss_mb": 900, "machine_busy_before_percent": 1.0}
    return {
        "command": "python tests/bench/compare.py --rounds 1",
        "model": "a small model",
        "workload": {"concurrency": [8], "prompt_tokens": 128, "output_tokens": 64, "rounds": 1},
        "versions": {server: "1.0" for server in servers},
        "hardware": {"cpu": "a CPU", "cores": 2, "instructions": ["avx2"], "memory_gib": 24, "python": "3.11"},
        "starts": [{"server": server, **start} for server in servers],
        "reports": list(reports),
        "failures": [],
    }


def test_medians_are_taken_over_rounds() -> None:
    rounds = [report("ours", value, round=i) for i, value in enumerate([90, 100, 500])]
    assert medians_of(list(rounds))["ours", 8]["tokens_per_s"] == 100


def test_above_one_is_better_for_throughput_and_latency() -> None:
    ours, peer = medians_of([report("ours", 200), report("vllm", 100, ttft_ms={"p50": 300, "p99": 300})]).values()
    assert advantage(ours, peer, "tokens_per_s") == "2.00"
    assert advantage(ours, peer, "ttft_p50") == "3.00"


def test_the_table_has_the_ratio_in_the_peers_row() -> None:
    text = markdown(run_of(report("ours", 200), report("vllm", 100)), NAME)
    assert "| 8 | ours | 200 | 100 | 150 | 10.0 | 20.0 |  |  |  |  |  |" in text
    assert "| 8 | vllm | 100 | 100 | 150 | 10.0 | 20.0 | 2.00 | 1.00 | 1.00 | 1.00 | 1.00 |" in text
    assert "Trouble" not in text


def test_each_metric_is_compared_with_the_peer_that_is_best_at_it() -> None:
    quick = {"p50": 50, "p99": 300}
    text = markdown(run_of(report("ours", 200), report("vllm", 160), report("llama.cpp", 100, ttft_ms=quick)), NAME)
    best = "1.25 (vllm) | 0.50 (llama.cpp) | 1.00 (vllm) | 1.00 (vllm) | 1.00 (vllm)"
    assert f"| 8 | {best} | 1.00 (vllm) |" in text


@pytest.mark.parametrize(
    ("peers", "rows"),
    [
        pytest.param(["llama.cpp"], ["2.00 (llama.cpp)", "| - |"], id="without vLLM there is nothing to say of it"),
        pytest.param([], [], id="without peers there is no row"),
    ],
)
def test_rows_of_best_peers(peers: list[str], rows: list[str]) -> None:
    text = markdown(run_of(report("ours", 200), *[report(peer, 100) for peer in peers]), NAME)
    best = text.partition("against the best peer")[2].partition("start to ready")[0]
    assert all(row in best for row in rows)
    assert best.count("\n| 8 |") == bool(rows)


def test_command_and_model_stand_above_the_table() -> None:
    head, _, _ = markdown(run_of(report("ours", 200)), NAME).partition("| streams")
    assert "--rounds 1" in head
    assert "a small model" in head


def test_failed_requests_are_shown() -> None:
    assert "conn_error: gone" in markdown(run_of(report("vllm", 100, errors={"conn_error: gone": 2})), NAME)


def test_table_plot_and_raw_numbers_are_written(tmp_path: Path) -> None:
    run = run_of(report("ours", 200), report("vllm", 100))
    write_results(run, tmp_path, NAME)
    assert json.loads((tmp_path / "benchmark-peers.json").read_text()) == run
    assert (tmp_path / "benchmark-peers.png").read_bytes().startswith(b"\x89PNG")
