"""TGI's ``text-generation-server`` command line: parses, decides nothing, and imports no torch: help is quick."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from text_generation_proto.logs import configure_logging

from text_generation_server import config

app = typer.Typer(name="text-generation-server", no_args_is_help=True, add_completion=False, rich_markup_mode=None)
logger = logging.getLogger("text_generation_server")

Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
LoggerLevel = Annotated[str, typer.Option(help="trace, debug, info, warn or error; LOG_LEVEL wins when set.")]
JsonOutput = Annotated[bool, typer.Option("--json-output", help="Accepted as by TGI; the log is JSON lines always.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run the model repository's own code.")]


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"text-generation-server {version('text-generation-inference')}")
        raise typer.Exit


@app.callback()
def main(
    _version: Annotated[
        bool, typer.Option("--version", "-V", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Load a model and compute its tokens for the router, which does all the rest."""


@app.command()
def serve(
    model_id: Annotated[str, typer.Argument(help="Hub id, local folder, or `embedded`.")],
    revision: Revision = None,
    sharded: Annotated[
        bool, typer.Option("--sharded/--no-sharded", help="One of several ranks: RANK, WORLD_SIZE, MASTER_* are set.")
    ] = False,
    quantize: Annotated[str | None, typer.Option(help="Not supported yet.")] = None,
    speculate: Annotated[int | None, typer.Option(help="Not supported yet.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; unset: the checkpoint's own.")
    ] = None,
    kv_cache_dtype: Annotated[
        str | None, typer.Option(help="fp8_e4m3fn, fp8_e5m2, or auto: that of the weights.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    uds_path: Annotated[Path, typer.Option(help="Socket of rank r: this path with `-r` behind it.")] = Path(
        "/tmp/text-generation-server"
    ),
    logger_level: LoggerLevel = "INFO",
    json_output: JsonOutput = False,
    otlp_endpoint: Annotated[str | None, typer.Option(help="Not supported yet.")] = None,
    otlp_service_name: Annotated[str, typer.Option(help="Not supported yet.")] = config.OTLP_SERVICE_NAME,
    max_input_tokens: Annotated[int | None, typer.Option(help="Longest prompt; the router enforces it.")] = None,
) -> None:
    """Serve one shard of a model over gRPC on a unix socket."""
    with _reported(logger_level):
        shard_config = config.resolve(
            config.ServeFlags(
                model_id=model_id,
                revision=revision,
                sharded=sharded,
                quantize=quantize,
                speculate=speculate,
                dtype=dtype,
                kv_cache_dtype=kv_cache_dtype,
                trust_remote_code=trust_remote_code,
                uds_path=uds_path,
                otlp_endpoint=otlp_endpoint,
                otlp_service_name=otlp_service_name,
                max_input_tokens=max_input_tokens,
            ),
            os.environ,
        )
        from text_generation_server.serve import serve as serve_shard

        serve_shard(shard_config, os.environ)


@app.command()
def download_weights(
    model_id: Annotated[str, typer.Argument(help="Hub id, local folder, or `embedded`.")],
    revision: Revision = None,
    extension: Annotated[str, typer.Option(help="Only `.safetensors`.")] = ".safetensors",
    auto_convert: Annotated[
        bool, typer.Option("--auto-convert/--no-auto-convert", help="Accepted as by TGI; pickled weights are refused.")
    ] = True,
    logger_level: LoggerLevel = "INFO",
    json_output: JsonOutput = False,
    trust_remote_code: TrustRemoteCode = False,
    merge_lora: Annotated[bool, typer.Option("--merge-lora", help="Not supported yet.")] = False,
) -> None:
    """Download a model's safetensors, configuration and tokenizer into the hub cache."""
    with _reported(logger_level):
        if extension != ".safetensors":
            raise config.ConfigError(f"`--extension {extension}` is not supported: only .safetensors files are loaded")
        if merge_lora:
            raise config.ConfigError("`--merge-lora` is not supported yet; merge the adapter and give the result's id")
        from text_generation_server.weights.hub import download_and_report

        download_and_report(model_id, revision, os.environ, trust_remote_code=trust_remote_code)


@app.command()
def plan(
    model_id: Annotated[str, typer.Argument(help="Hub id, local folder, or `embedded`.")],
    revision: Revision = None,
    device: Annotated[
        str | None,
        typer.Option(help="`cpu`, a GPU by name (L4) or by memory (24GiB); unset: what this machine has."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="As of `serve`.")] = None,
    kv_cache_dtype: Annotated[str | None, typer.Option(help="As of `serve`.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    num_shard: Annotated[int, typer.Option(help="Shards that the model is split over.")] = 1,
    cuda_memory_fraction: Annotated[float, typer.Option(help="Share of the GPU's memory to use.")] = 1.0,
    enable_prefill_logprobs: Annotated[bool, typer.Option("--enable-prefill-logprobs")] = False,
    max_input_tokens: Annotated[int | None, typer.Option(help="This and the next: as of the router.")] = None,
    max_total_tokens: Annotated[int | None, typer.Option()] = None,
    max_batch_prefill_tokens: Annotated[int | None, typer.Option()] = None,
    max_batch_total_tokens: Annotated[int | None, typer.Option()] = None,
    max_batch_size: Annotated[int | None, typer.Option()] = None,
    max_concurrent_requests: Annotated[int, typer.Option()] = 128,
    logger_level: LoggerLevel = "INFO",
    json_output: Annotated[bool, typer.Option("--json-output", help="One JSON object instead of a table.")] = False,
) -> None:
    """Print what fits, without loading the model: exit code 0 if it does, 1 if not."""
    with _reported(logger_level):
        shard_config = config.resolve_plan(
            config.PlanFlags(
                model_id=model_id,
                revision=revision,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                kv_cache_dtype=kv_cache_dtype,
                num_shard=num_shard,
                cuda_memory_fraction=cuda_memory_fraction,
                enable_prefill_logprobs=enable_prefill_logprobs,
                max_input_tokens=max_input_tokens,
                max_total_tokens=max_total_tokens,
                max_batch_prefill_tokens=max_batch_prefill_tokens,
                max_batch_total_tokens=max_batch_total_tokens,
                max_batch_size=max_batch_size,
                max_concurrent_requests=max_concurrent_requests,
            ),
            os.environ,
        )
        from text_generation_server.memory_report import run

        run(shard_config, device, os.environ, as_json=json_output)


# TGI's options are not declared one by one: all of them get the one answer.
@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def quantize(
    model_id: Annotated[str, typer.Argument()],
    output_dir: Annotated[Path, typer.Argument()],
    logger_level: LoggerLevel = "INFO",
    json_output: JsonOutput = False,
) -> None:
    """Not supported yet."""
    with _reported(logger_level):
        raise config.ConfigError("`quantize` is not supported yet; serve a checkpoint that is quantized already")


@contextlib.contextmanager
def _reported(level: str) -> Iterator[None]:
    """One error line and exit code 1 for what went wrong; the traceback only at debug level."""
    configure_logging(os.environ.get("LOG_LEVEL") or level)
    for library in ("asyncio", "filelock", "grpc", "httpcore", "httpx", "httpx2", "urllib3"):
        logging.getLogger(library).setLevel(logging.WARNING)  # what they say below that is not about this server
    try:
        yield
    except config.ConfigError as error:
        _fail(str(error), error)
    except Exception as error:
        # Not foreseen, so its class is part of the cause.
        first_line = next(iter(str(error).strip().splitlines()), "")
        _fail(f"{type(error).__name__}: {first_line}; LOG_LEVEL=debug shows the traceback", error)


def _fail(message: str, error: Exception) -> NoReturn:
    logger.error("%s", message)
    logger.debug("traceback", exc_info=error)
    raise typer.Exit(1)
