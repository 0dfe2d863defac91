"""Our server and its peers on one machine, one model and the same requests, in one run: ratios, raw numbers, a plot.

    python tests/bench/compare.py --model DIR --peers DIR --servers ours,vllm,transformers --rounds 3 --output docs/

In every round each server is started, warmed up, measured at every concurrency and stopped; only one is alive at a
time. What is compared are medians over the rounds. `--peers` is the folder that `make_peers.py` wrote. Another model
goes into files of another name:

    python tests/bench/compare.py --model DIR-1B --concurrency 1,8 --name benchmark-peers-1b ...
"""

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import uvloop
from text_generation_launcher.benchmark.outcome import send

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.load import closed_loop, measure, numbers, prompts_of
from bench.report import Report, WrongLength
from bench.servers import KINDS, Places, Server, ServerFailed, ServerKind, end_cleanly_on_sigterm, running
from bench.tables import write_results

WARM_UP_S = 900


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    concurrency: list[int]
    prompt_tokens: int
    output_tokens: int
    rounds: int


def hardware() -> dict[str, Any]:
    cpu_info = Path("/proc/cpuinfo").read_text().splitlines()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in cpu_info)}
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    return {
        "cpu": fields.get("model name", platform.processor()),
        "cores": len(os.sched_getaffinity(0)),
        "instructions": [flag for flag in wanted if flag in fields.get("flags", "").split()],
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "python": platform.python_version(),
    }


def describe_model(model: Path) -> str:
    config = json.loads((model / "config.json").read_text())
    weights_bytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    heads = f"{config['num_attention_heads']} query and {config['num_key_value_heads']} key/value heads"
    return (
        f"{config['model_type']}, {config['num_hidden_layers']} layers, hidden size {config['hidden_size']}, {heads}, "
        f"intermediate size {config['intermediate_size']}, vocabulary {config['vocab_size']:,}, "
        f"{weights_bytes / 1e9:.2f} GB of {config['dtype']}"
    )


def command_line(argv: list[str]) -> str:
    """As it was given, but for the places on this machine, of which only the last part is anybody's business."""
    script, *shown = [Path(part).name if part.startswith("/") else part for part in argv]
    return shlex.join(["python", f"tests/bench/{Path(script).name}", *shown])


def heading(model: Path, measured: str, repetitions: int) -> list[str]:
    """What stands above a table: the machine, the model, what was done, and the command that did it."""
    machine = hardware()
    return [
        f"{machine['cpu']}, {machine['cores']} cores; {describe_model(model)}; {measured}; medians of {repetitions} "
        "repetitions.",
        "",
        *("```", command_line(sys.argv), "```"),
        "",
    ]


def visit(
    kind: ServerKind, server: Server, workload: Workload, model: Path, seed: int, started: float
) -> Iterator[Report]:
    """Warm a server up and measure it. No prompt comes twice: prefix caches have nothing to reuse."""
    prompts = prompts_of(model / "tokenizer.json", workload.prompt_tokens, seed)
    tokens = workload.prompt_tokens, workload.output_tokens

    async def warm_up() -> None:
        await send(server.url, kind.api, next(prompts), 1, WARM_UP_S)
        server.first_answer_s = round(time.perf_counter() - started, 2)
        busiest = max(workload.concurrency)
        chosen = [next(prompts) for _ in range(busiest)]
        await closed_loop(
            chosen, busiest, lambda prompt: send(server.url, kind.api, prompt, workload.output_tokens, WARM_UP_S)
        )

    uvloop.run(warm_up())
    for concurrency in workload.concurrency:
        yield uvloop.run(measure(server.url, kind.api, prompts, concurrency, *tokens))


@dataclass(slots=True)
class Run:
    """All that was measured, as it goes into the JSON file."""

    command: str
    model: str
    workload: Workload
    versions: dict[str, str]
    hardware: dict[str, Any]
    starts: list[dict[str, Any]]
    reports: list[dict[str, Any]]
    failures: list[str]


def run_round(run: Run, name: str, round_number: int, places: Places, port: int) -> None:
    kind = KINDS[name]
    kind.prepare(places)
    # What other programs take from the machine falsifies a row: it is on record beside it.
    busy_before = psutil.cpu_percent(interval=1)
    started = time.perf_counter()
    with running(kind.argv(places, port), port, kind.environment(places)) as server:
        for report in visit(kind, server, run.workload, places.model, round_number, started):
            run.reports.append({"server": name, "round": round_number, **asdict(report)})
            print(f"round {round_number} {name} x{report.concurrency}: {report.tokens_per_s} tokens/s", flush=True)
        run.starts.append(
            {
                "server": name,
                "round": round_number,
                "ready_s": server.ready_s,
                "first_answer_s": server.first_answer_s,
                "rss_mb": round(sum(process.memory_info().rss for process in server.tree()) / 1e6),
                "machine_busy_before_percent": busy_before,
            }
        )


def compare(names: list[str], workload: Workload, places: Places, port: int, output: Path, file_name: str) -> Run:
    versions = {name: KINDS[name].version(places) for name in names}
    command, model = command_line(sys.argv), describe_model(places.model)
    run = Run(command, model, workload, versions, hardware(), starts=[], reports=[], failures=[])
    for round_number in range(workload.rounds):
        # The order turns from round to round, so that none always comes first on a cool machine.
        shift = round_number % len(names)
        for name in names[shift:] + names[:shift]:
            try:
                run_round(run, name, round_number, places, port)
            except (ServerFailed, WrongLength) as error:
                print(f"round {round_number}, {name}: {error}", file=sys.stderr)
                # The server's log stays out of the record: it names places on this machine.
                run.failures.append(f"round {round_number}, {name}: {str(error).splitlines()[0]}")
            write_results(asdict(run), output, file_name)
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder that make_model.py wrote")
    parser.add_argument("--peers", type=Path, default=Path("peers"), help="folder that make_peers.py wrote")
    parser.add_argument("--servers", default="ours,vllm,transformers", help=f"any of {', '.join(KINDS)}")
    parser.add_argument("--concurrency", type=numbers, default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=18_200)
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder for the three files")
    parser.add_argument("--name", default="benchmark-peers", help="of those files, before .md, .json and .png")
    arguments = parser.parse_args()
    end_cleanly_on_sigterm()
    workload = Workload(
        concurrency=arguments.concurrency,
        prompt_tokens=arguments.prompt_tokens,
        output_tokens=arguments.output_tokens,
        rounds=arguments.rounds,
    )
    places = Places(model=arguments.model.absolute(), peers=arguments.peers.absolute())
    names = arguments.servers.split(",")
    run = compare(names, workload, places, arguments.port, arguments.output, arguments.name)
    sys.exit(1 if run.failures else 0)


if __name__ == "__main__":
    main()
