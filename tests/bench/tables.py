"""What `compare.py` measured, as a Markdown table of ratios, a JSON file and a plot.

python tests/bench/tables.py docs/benchmark-peers.json      writes table and plot again from the raw numbers
"""

import argparse
import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

NAME = "benchmark-peers"
OURS = "ours"

Record = Mapping[str, Any]
METRICS: dict[str, Callable[[Record], float]] = {
    "tokens_per_s": lambda report: report["tokens_per_s"],
    "ttft_p50": lambda report: report["ttft_ms"]["p50"],
    "itl_p50": lambda report: report["itl_ms"]["p50"],
    "itl_p99": lambda report: report["itl_ms"]["p99"],
}
Medians = dict[tuple[str, int], dict[str, float]]


def medians_of(reports: list[Record]) -> Medians:
    """Median over the rounds of each metric, by server and concurrency."""
    groups: dict[tuple[str, int], list[Record]] = {}
    for report in reports:
        groups.setdefault((report["server"], report["concurrency"]), []).append(report)
    return {
        key: {name: statistics.median(map(metric, group)) for name, metric in METRICS.items()}
        for key, group in groups.items()
    }


def advantage(ours: Mapping[str, float], peer: Mapping[str, float], metric: str) -> str:
    """How many times better we are; above 1 is better for throughput and latency alike."""
    better, worse = (ours, peer) if metric == "tokens_per_s" else (peer, ours)
    return f"{better[metric] / worse[metric]:.2f}" if worse[metric] else "-"


def markdown(run: Record) -> str:
    work, hardware = run["workload"], run["hardware"]
    lines = [
        f"{hardware['cpu']}, {hardware['cores']} cores ({', '.join(hardware['instructions'])}), "
        f"{hardware['memory_gib']} GiB; {work['prompt_tokens']} tokens in, {work['output_tokens']} out, greedy; "
        f"medians of {work['rounds']} rounds, one server alive at a time.",
        "",
        *throughput_table(medians_of(run["reports"])),
        "",
        *start_table(run),
        "",
        f"![throughput and time to first token]({NAME}.png)",
    ]
    lines += trouble(run)
    return "\n".join(lines) + "\n"


def throughput_table(medians: Medians) -> list[str]:
    lines = [
        "| streams | server | tokens/s | TTFT p50 ms | ITL p50 ms | ITL p99 ms "
        "| ours is better by: throughput | TTFT | ITL p50 | ITL p99 |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for server, concurrency in sorted(medians, key=lambda key: key[1]):  # stable: servers stay in their order
        row = medians[server, concurrency]
        ours = medians.get((OURS, concurrency))
        ratios = (
            ["", "", "", ""] if server == OURS or not ours else [advantage(ours, row, metric) for metric in METRICS]
        )
        cells = [
            f"{row['tokens_per_s']:.0f}",
            f"{row['ttft_p50']:.0f}",
            f"{row['itl_p50']:.1f}",
            f"{row['itl_p99']:.1f}",
        ]
        lines.append(f"| {' | '.join([str(concurrency), server, *cells, *ratios])} |")
    return lines


def start_table(run: Record) -> list[str]:
    lines = [
        "| server | version | start to ready, s | start to first answer, s | memory, MB |",
        "|---|---|---:|---:|---:|",
    ]
    for server, version in run["versions"].items():
        starts = [start for start in run["starts"] if start["server"] == server]
        if starts:
            cells = [statistics.median(s[name] for s in starts) for name in ("ready_s", "first_answer_s", "rss_mb")]
            lines.append(f"| {server} | {version} | {cells[0]:.1f} | {cells[1]:.1f} | {cells[2]:.0f} |")
    return lines


def trouble(run: Record) -> list[str]:
    """What keeps the numbers from being what they seem: failed requests, failed servers, a busy machine."""
    lines = [
        f"- {report['server']} at {report['concurrency']} streams, round {report['round']}: {report['errors']}"
        for report in run["reports"]
        if report["errors"]
    ]
    lines += [f"- {failure}" for failure in run["failures"]]
    busy = max((start["machine_busy_before_percent"] for start in run["starts"]), default=0)
    if busy > 10:
        lines.append(f"- other programs used up to {busy:.0f} % of the processor before a server was started")
    return ["", "Trouble:", "", *lines] if lines else []


def plot(run: Record, path: Path) -> None:
    medians = medians_of(run["reports"])
    servers = list(dict.fromkeys(server for server, _ in medians))
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.2))
    titles = {"tokens_per_s": "output tokens per second", "ttft_p50": "time to first token, p50, ms"}
    for panel, (metric, title) in zip(panels, titles.items(), strict=True):
        for server in servers:
            streams = sorted(concurrency for name, concurrency in medians if name == server)
            panel.plot(streams, [medians[server, count][metric] for count in streams], marker="o", label=server)
        panel.set(title=title, xlabel="concurrent streams", xscale="log", ylim=(0, None))
        panel.set_xticks(streams, [str(count) for count in streams])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write_results(run: Record, output: Path) -> None:
    """`run` is the JSON form of `compare.Run`."""
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{NAME}.json").write_text(json.dumps(run, indent=1) + "\n")
    if run["reports"]:
        (output / f"{NAME}.md").write_text(markdown(run))
        plot(run, output / f"{NAME}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path)
    arguments = parser.parse_args()
    write_results(json.loads(arguments.raw.read_text()), arguments.raw.parent)


if __name__ == "__main__":
    main()
