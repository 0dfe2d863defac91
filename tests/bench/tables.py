"""What `compare.py` measured, as Markdown tables of ratios, a JSON file and a plot.

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

OURS = "ours"
VLLM = "vllm"

Record = Mapping[str, Any]
METRICS: dict[str, Callable[[Record], float]] = {
    "tokens_per_s": lambda report: report["tokens_per_s"],
    "ttft_p50": lambda report: report["ttft_ms"]["p50"],
    "ttft_p99": lambda report: report["ttft_ms"]["p99"],
    "itl_p50": lambda report: report["itl_ms"]["p50"],
    "itl_p99": lambda report: report["itl_ms"]["p99"],
}
UNITS = {
    "tokens_per_s": "tokens/s",
    "ttft_p50": "TTFT p50 ms",
    "ttft_p99": "TTFT p99 ms",
    "itl_p50": "ITL p50 ms",
    "itl_p99": "ITL p99 ms",
}
SHORT = {
    "tokens_per_s": "throughput",
    "ttft_p50": "TTFT p50",
    "ttft_p99": "TTFT p99",
    "itl_p50": "ITL p50",
    "itl_p99": "ITL p99",
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


def markdown(run: Record, name: str) -> str:
    medians = medians_of(run["reports"])
    lines = [
        *conditions(run),
        "",
        *throughput_table(medians),
        "",
        *best_peer_table(medians),
        "",
        *start_table(run),
        "",
        f"![throughput, time to first token and inter-token latency]({name}.png)",
    ]
    lines += trouble(run)
    return "\n".join(lines) + "\n"


def conditions(run: Record) -> list[str]:
    """Where, on what, and with which command."""
    work, hardware = run["workload"], run["hardware"]
    lines = [
        f"{hardware['cpu']}, {hardware['cores']} cores ({', '.join(hardware['instructions'])}), "
        f"{hardware['memory_gib']} GiB; {work['prompt_tokens']} tokens in, {work['output_tokens']} out, greedy; "
        f"medians of {work['rounds']} rounds, one server alive at a time."
    ]
    # Records of before they were kept have neither.
    if "model" in run:
        lines += ["", f"The model: {run['model']}."]
    if "command" in run:
        lines += ["", "```", run["command"], "```"]
    return lines


def throughput_table(medians: Medians) -> list[str]:
    ratios = [f"ours is better by: {SHORT['tokens_per_s']}", *list(SHORT.values())[1:]]
    header = ["streams", "server", *UNITS.values(), *ratios]
    lines = [f"| {' | '.join(header)} |", f"|---:|---|{'---:|' * 2 * len(METRICS)}"]
    for server, concurrency in sorted(medians, key=lambda key: key[1]):  # stable: servers stay in their order
        row = medians[server, concurrency]
        ours = medians.get((OURS, concurrency))
        compared = ours if server != OURS else None
        cells = [f"{row[metric]:.1f}" if metric.startswith("itl") else f"{row[metric]:.0f}" for metric in METRICS]
        cells += [advantage(compared, row, metric) if compared else "" for metric in METRICS]
        lines.append(f"| {' | '.join([str(concurrency), server, *cells])} |")
    return lines


def best_peer_table(medians: Medians) -> list[str]:
    """Each metric against the peer that is best at it, which may be another in every column."""
    header = [*SHORT.values(), "TTFT p50 against vLLM"]
    lines = [f"| streams | ours against the best peer: {' | '.join(header)} |", f"|---:|{'---|' * len(header)}"]
    for concurrency in sorted({count for _, count in medians}):
        peers = {server: row for (server, count), row in medians.items() if count == concurrency}
        ours = peers.pop(OURS, None)
        if ours is None or not peers:
            continue
        cells = [against_best(ours, peers, metric) for metric in METRICS]
        rows_of_vllm = {server: row for server, row in peers.items() if server.startswith(VLLM)}
        cells.append(against_best(ours, rows_of_vllm, "ttft_p50"))
        lines.append(f"| {concurrency} | {' | '.join(cells)} |")
    return lines


def against_best(ours: Mapping[str, float], peers: Mapping[str, Mapping[str, float]], metric: str) -> str:
    if not peers:
        return "-"
    choose = max if metric == "tokens_per_s" else min
    best = choose(peers, key=lambda server: peers[server][metric])
    return f"{advantage(ours, peers[best], metric)} ({best})"


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
    streams = sorted({concurrency for _, concurrency in medians})
    figure, panels = pyplot.subplots(1, 3, figsize=(15, 4.4))
    shown = {
        "output tokens per second": ["tokens_per_s"],
        "time to first token, ms: p50, dashed p99": ["ttft_p50", "ttft_p99"],
        "inter-token latency, ms: p50, dashed p99": ["itl_p50", "itl_p99"],
    }
    for panel, (title, metrics) in zip(panels, shown.items(), strict=True):
        for number, server in enumerate(servers):
            counts = [count for count in streams if (server, count) in medians]
            for metric, style in zip(metrics, ["-", "--"], strict=False):
                values = [medians[server, count][metric] for count in counts]
                label = server if style == "-" else None
                panel.plot(counts, values, style, marker="o", color=f"C{number}", label=label)
        panel.set(title=title, xlabel="concurrent streams", xscale="log")
        if len(metrics) > 1:
            panel.set_yscale("log")  # a p99 may lie a hundred times above a p50
        else:
            panel.set_ylim(0, None)
        panel.set_xticks(streams, [str(count) for count in streams])
        panel.xaxis.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write_results(run: Record, output: Path, name: str) -> None:
    """`run` is the JSON form of `compare.Run`; `name` that of the files, without their endings."""
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{name}.json").write_text(json.dumps(run, indent=1) + "\n")
    if run["reports"]:
        (output / f"{name}.md").write_text(markdown(run, name))
        plot(run, output / f"{name}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path)
    raw: Path = parser.parse_args().raw
    write_results(json.loads(raw.read_text()), raw.parent, raw.stem)


if __name__ == "__main__":
    main()
