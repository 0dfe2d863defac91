"""`bench.tables`: medians, ratios and what is said beside them."""

import json
from pathlib import Path
from typing import Any

from bench.tables import advantage, markdown, medians_of, write_results


def report(server: str, tokens_per_s: float, **fields: Any) -> dict[str, Any]:
    defaults = {"concurrency": 8, "round": 0, "errors": {}, "ttft_ms": {"p50": 100}, "itl_ms": {"p50": 10, "p99": 20}}
    return {"server": server, "tokens_per_s": tokens_per_s, **defaults, **fields}


def run_of(*reports: dict[str, Any]) -> dict[str, Any]:
    servers = list(dict.fromkeys(one["server"] for one in reports))
    start = {"round": 0, "ready_s": 5.0, "first_answer_s": 6.0, "rss_mb": 900, "machine_busy_before_percent": 1.0}
    return {
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
    ours, peer = medians_of([report("ours", 200), report("vllm", 100, ttft_ms={"p50": 300})]).values()
    assert advantage(ours, peer, "tokens_per_s") == "2.00"
    assert advantage(ours, peer, "ttft_p50") == "3.00"


def test_the_table_has_the_ratio_in_the_peers_row() -> None:
    text = markdown(run_of(report("ours", 200), report("vllm", 100)))
    assert "| 8 | ours | 200 | 100 | 10.0 | 20.0 |  |  |  |  |" in text
    assert "| 8 | vllm | 100 | 100 | 10.0 | 20.0 | 2.00 | 1.00 | 1.00 | 1.00 |" in text
    assert "Trouble" not in text


def test_failed_requests_are_shown() -> None:
    assert "conn_error: gone" in markdown(run_of(report("vllm", 100, errors={"conn_error: gone": 2})))


def test_table_plot_and_raw_numbers_are_written(tmp_path: Path) -> None:
    run = run_of(report("ours", 200), report("vllm", 100))
    write_results(run, tmp_path)
    assert json.loads((tmp_path / "benchmark-peers.json").read_text()) == run
    assert (tmp_path / "benchmark-peers.png").read_bytes().startswith(b"\x89PNG")
