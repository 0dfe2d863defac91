"""`text-generation-router`: Typer reads `RouterFlags`; decides nothing.

The launcher starts the router with these flags. Started by hand it reads TGI's environment variables as well: the
flag's name in upper snake case. Flags of TGI's router that make no sense here are refused by name, with the reason.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from importlib.metadata import version as installed_version
from typing import Annotated, Any, get_args, get_type_hints

import typer

from text_generation_router.chat.reasoning import REASONING_MARKS
from text_generation_router.chat.tools import FORMATS, ToolFormat
from text_generation_router.config import RouterFlags

NAME = "text-generation-router"


def _listed(forms: Sequence[ToolFormat]) -> str:
    return ", ".join(form.name for form in forms)


HELP = {
    "max_concurrent_requests": "Requests inside the server at one time; more are answered with 429.",
    "max_best_of": "Largest best_of of a request.",
    "max_stop_sequences": "Longest list of stop sequences of a request.",
    "max_top_n_tokens": "Largest top_n_tokens of a request.",
    "max_input_tokens": "Longest prompt. Default: max-total-tokens - 1.",
    "max_total_tokens": "Prompt and output of one request. Default: what fits, and the model's positions allow.",
    "waiting_served_ratio": "Hold admission until so many wait for each that runs. Default: admit at once.",
    "max_batch_prefill_tokens": "Tokens of prompt in one step. Default: 4096, on a CPU 512.",
    "max_batch_total_tokens": "Tokens of KV cache for all running requests. Default: what fits.",
    "max_waiting_tokens": "Steps after which that hold ends. Default: admit at once.",
    "max_batch_size": "Running requests. Default: as many as fit.",
    "hostname": "IP address to listen on.",
    "port": "Port to listen on; 0 is any free one.",
    "prometheus_port": "Serve /metrics on this port too. Default: on no other port.",
    "tls_cert": "Certificate chain in PEM: serve HTTPS. Needs --tls-key.",
    "tls_key": "Its private key in PEM.",
    "master_shard_uds_path": "Unix socket of the shard with rank 0.",
    "validation_workers": "Tokenizer threads.",
    "tokenizer_config_path": "tokenizer_config.json or .jinja file with the chat template. Default: the model's.",
    "tool_call_parser": f"How the model writes calls of tools: {_listed(FORMATS)}. Default: by its chat template.",
    "reasoning_parser": f"How it marks its reasoning: {', '.join(REASONING_MARKS)}. Default: it is content.",
    "safe_special_tokens": "In chats, special tokens that somebody has written into a message stay text.",
    "api_key": "Keys of which clients must send one, with commas. Better in the environment: argv is readable by all.",
    "json_output": "JSON logs. The router writes no others, the launcher turns them into text.",
    "cors_allow_origin": "Origin that browsers may call from; may be repeated. Default: any.",
    "max_client_batch_size": "Prompts in one request.",
    "payload_limit": "Largest body of a request in bytes.",
    "disable_grammar_support": "Refuse requests with a grammar.",
    "graceful_termination_timeout": "Seconds that running requests get when the server is told to stop.",
    "max_inter_token_latency_ms": "Cut prompts so that running streams wait no longer for a token, if they can.",
    "max_shard_restarts": "How often the launcher restarts shards that fail; 0: not at all, their requests fail.",
    "stall_timeout": "Seconds without progress in a step after which a shard counts as hung.",
    "fair_shares": "Share the server between API keys by the tokens of their requests.",
    "max_queue_size": "Requests that wait; more are answered with 429. Default: max-concurrent-requests is the limit.",
    "prefix_caching": "Compute equal beginnings of prompts once.",
}
"""The flags that people give. Fields of `RouterFlags` that are missing here are for the launcher and are not shown."""

SHORT = {"port": "-p", "graceful_termination_timeout": "-g"}
MAXIMA = {"port": 65535, "prometheus_port": 65535}
ENVIRONMENT = {"launcher_nonce": "TGI_LAUNCHER_NONCE"}
"""Names other than the field's in upper case."""

_BY_SHARD = "the shards tell the router which model they serve, and where its files are"
_NOT_YET = "it is not there yet"
_NGROK = "it never worked in TGI, which panics when it is used"
REFUSED = {
    "print-schema": _NOT_YET,
    "--tokenizer-name": _BY_SHARD,
    "--revision": _BY_SHARD,
    "--trust-remote-code": "the router runs no code of a model",
    "--otlp-endpoint": _NOT_YET,
    "--otlp-service-name": _NOT_YET,
    "--ngrok": _NGROK,
    "--ngrok-authtoken": _NGROK,
    "--ngrok-edge": _NGROK,
    "--usage-stats": "nothing is ever reported to anybody",
    "--max-image-fetch-size": "image inputs are not supported",
}


def parse(argv: Sequence[str]) -> RouterFlags:
    """The flags as given. Prints and raises SystemExit for --help, --version and wrong usage (exit code 2)."""
    for word in argv:
        name = word.partition("=")[0]
        if name in REFUSED:
            typer.echo(f"Error: {NAME} does not support {name}: {REFUSED[name]}.", err=True)
            raise SystemExit(2)
    parsed: list[RouterFlags] = []
    try:
        app(args=list(argv), prog_name=NAME, obj=parsed)
    except SystemExit:
        if not parsed:
            raise
    return parsed[0]


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"{NAME} {installed_version('text-generation-inference')}")
        raise typer.Exit


def _command(context: typer.Context, version: bool, **flags: Any) -> None:
    origins = tuple(flags.pop("cors_allow_origin") or ())
    context.obj.append(RouterFlags(cors_allow_origin=origins, **flags))


def _parameter(field: dataclasses.Field[Any], hint: Any) -> inspect.Parameter:
    """The command-line option for one field of `RouterFlags`."""
    is_list = field.name == "cors_allow_origin"
    name = field.name.replace("_", "-")
    option = typer.Option(
        f"--{name}/--no-{name}" if field.default is True else f"--{name}",
        *([SHORT[field.name]] if field.name in SHORT else []),
        envvar=ENVIRONMENT.get(field.name, field.name.upper()),
        help=HELP.get(field.name),
        hidden=field.name not in HELP,
        min=0 if {int, float} & set(get_args(hint) or (hint,)) else None,
        max=MAXIMA.get(field.name),
    )
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None if is_list else field.default,
        annotation=Annotated[list[str] | None if is_list else hint, option],
    )


def _make_app() -> typer.Typer:
    # Typer reads a function's signature: this one's are the fields of `RouterFlags`, written down once.
    hints = get_type_hints(RouterFlags)
    keyword = inspect.Parameter.KEYWORD_ONLY
    show_version = typer.Option("--version", "-V", callback=_print_version, is_eager=True, help="Print the version.")
    parameters = [
        inspect.Parameter("context", keyword, annotation=typer.Context),
        *(_parameter(field, hints[field.name]) for field in dataclasses.fields(RouterFlags)),
        inspect.Parameter("version", keyword, default=False, annotation=Annotated[bool, show_version]),
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
    typer_app.command(help="Serve HTTP in front of the shards of one model.")(_command)
    return typer_app


app = _make_app()
