"""`text-generation-benchmark`: Typer reads `Flags`; decides nothing.

Every flag that TGI's tool has reads the environment as well, but for --batch-size: the flag's name in upper snake case.
"""

from __future__ import annotations

import dataclasses
import inspect
from importlib.metadata import version as installed_version
from typing import Annotated, Any, get_type_hints

import typer

from text_generation_launcher.benchmark.config import Flags

NAME = "text-generation-benchmark"
SUMMARY = """Measure latency and throughput by batch size: of a shard (its socket), or of any server (--url).

Progress is shown on standard error; tables of Markdown go to standard output at the end, also after Ctrl-C.
"""
EXIT_CODES = "Exit codes: 0 complete, 1 an error, 2 wrong usage, 130 stopped by Ctrl-C or q."

HELP = {
    "tokenizer_name": "Folder with a tokenizer.json, or a model of the hub. Default: what is measured says it.",
    "revision": "Of the tokenizer, on the hub.",
    "batch_size": "Sequences at once; repeatable. Default: 1, 2, 4, 8, 16, 32.",
    "sequence_length": "Tokens of each prompt.",
    "decode_length": "Tokens that each sequence generates.",
    "runs": "Batches that are measured at each batch size.",
    "warmups": "Batches before these that are not.",
    "master_shard_uds_path": "Socket of the shard with rank 0. Default: /tmp/text-generation-server-0, else that of "
    "the one server that is launched here.",
    "url": "Measure this server instead, TGI's API or OpenAI's: http://127.0.0.1:3000.",
    "api": "Its routes. Default: the first of these that it has.",
    "model": "One of the models that an OpenAI server lists. Default: the first.",
    "api_key": "Key of that server. Better in the environment: argv is readable by all users.",
    "json": "Write all raw values to FILE; - is standard output, in place of the tables.",
    "plot": "Draw the results into FILE.png (or .svg, .pdf). Needs matplotlib, the extra `benchmark`.",
    "temperature": "Of sampling.",
    "top_k": "Sample among so many tokens.",
    "top_p": "Sample among tokens of this share of the probability.",
    "typical_p": "Sample among typical tokens of this share.",
    "repetition_penalty": "1 is none.",
    "frequency_penalty": "0 is none.",
    "watermark": "Watermark the text (servers of --url that can).",
    "do_sample": "Sample; without it, and without the flags above, greedy.",
    "top_n_tokens": "Report so many likely tokens with each generated one.",
}
SHORT = {
    "tokenizer_name": "-t",
    "batch_size": "-b",
    "sequence_length": "-s",
    "decode_length": "-d",
    "runs": "-r",
    "warmups": "-w",
    "master_shard_uds_path": "-m",
}
NOT_IN_ENVIRONMENT = ("batch_size", "url", "api", "model", "json", "plot")
METAVARS = {"json": "FILE", "plot": "FILE", "url": "URL", "model": "NAME", "api_key": "KEY"}


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"{NAME} {installed_version('text-generation-inference')}")
        raise typer.Exit


def _command(version: bool, **flags: Any) -> None:
    from text_generation_launcher.benchmark.report import benchmark  # grpc and rich: --help needs none

    raise typer.Exit(benchmark(Flags(**flags)))


def _parameter(field: dataclasses.Field[Any], hint: Any) -> inspect.Parameter:
    names = ["--" + field.name.replace("_", "-"), *([SHORT[field.name]] if field.name in SHORT else [])]
    option = typer.Option(
        *names,
        envvar=None if field.name in NOT_IN_ENVIRONMENT else field.name.upper(),
        help=HELP[field.name],
        metavar=METAVARS.get(field.name),
    )
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(field.name, keyword, default=field.default, annotation=Annotated[hint, option])


def _make_app() -> typer.Typer:
    # Typer reads a function's signature: this one's are the fields of `Flags`, so that a flag is written down once.
    hints = get_type_hints(Flags)
    show_version = typer.Option("--version", "-V", callback=_print_version, is_eager=True, help="Print the version.")
    parameters = [
        *(_parameter(field, hints[field.name]) for field in dataclasses.fields(Flags)),
        inspect.Parameter(
            "version", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, show_version]
        ),
    ]
    _command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    _command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    typer_app = typer.Typer(
        name=NAME,
        add_completion=False,
        rich_markup_mode=None,  # boxes cut long flags short
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )
    typer_app.command(help=SUMMARY, epilog=EXIT_CODES)(_command)
    return typer_app


app = _make_app()
