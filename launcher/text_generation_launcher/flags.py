"""The launcher's command line, as one dataclass: each flag with its type, default, environment variable and help.

A flag ``--max-total-tokens`` also reads ``MAX_TOTAL_TOKENS``, and before it ``TGI_MAX_TOTAL_TOKENS``
(``environment.py``). None means "not given"; ``config.py`` derives what is then used.
"""

from __future__ import annotations

import dataclasses
import enum
from functools import cache
from types import NoneType
from typing import Annotated, Any, get_args, get_type_hints

import typer
from typer.models import OptionInfo

NOT_YET = "(not supported yet)"

OTLP_SERVICE_NAME = "text-generation-inference.router"
"""TGI's default."""


def option(*names: str, help: str, env: bool = True, **settings: Any) -> Any:
    """A Typer option that reads the environment variable of its first name, unless ``env`` is false."""
    variable = names[0].removeprefix("--").replace("-", "_").upper()
    return typer.Option(*names, help=help, envvar=variable if env else None, **settings)


def number(*names: str, help: str, min: float = 0, max: float | None = None) -> Any:
    """A number that is not negative."""
    return option(*names, help=help, min=min, max=max, metavar="N")


def later(name: str, help: str) -> Any:
    return option(name, help=f"{help} {NOT_YET}", metavar="VALUE")


class Switch(enum.StrEnum):
    """A boolean that takes a value on the command line, as TGI's ``--sharded`` does."""

    TRUE = "true"
    FALSE = "false"


class Dtype(enum.StrEnum):
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


class KvCacheDtype(enum.StrEnum):
    FP8_E4M3FN = "fp8_e4m3fn"
    FP8_E5M2 = "fp8_e5m2"


class UsageStats(enum.StrEnum):
    ON = "on"
    OFF = "off"
    NO_STACK = "no-stack"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Flags:
    """The command line as given, environment included."""

    model_id: Annotated[
        str,
        option(
            "--model-id",
            help="Hub id, local folder, or `embedded`: the small model that ships inside the package (offline, "
            "starts in seconds).",
        ),
    ] = "embedded"
    revision: Annotated[str | None, option("--revision", help="Commit, branch or `refs/pr/N` on the hub.")] = None
    dtype: Annotated[
        Dtype | None, option("--dtype", help="Number type of the weights; default: the checkpoint's own.")
    ] = None
    kv_cache_dtype: Annotated[
        KvCacheDtype | None,
        option("--kv-cache-dtype", help="Number type of the KV cache, of 8 bits; default: that of the weights."),
    ] = None
    trust_remote_code: Annotated[
        bool, option("--trust-remote-code", help="Run code that comes with the model. Pin --revision.")
    ] = False
    huggingface_hub_cache: Annotated[
        str | None, option("--huggingface-hub-cache", help="Folder of the hub's cache.")
    ] = None
    weights_cache_override: Annotated[
        str | None,
        option("--weights-cache-override", help="Flat folder with the weights, instead of the cache."),
    ] = None

    sharded: Annotated[
        Switch | None,
        option("--sharded", help="Whether to spread the model over all devices (or --num-shard)."),
    ] = None
    num_shard: Annotated[int | None, number("--num-shard", help="Tensor-parallel degree: one process per shard.")] = (
        None
    )
    attention: Annotated[
        str | None, option("--attention", help="Attention back end; default: the best for the device.")
    ] = None
    disable_custom_kernels: Annotated[
        bool,
        option("--disable-custom-kernels", help="PyTorch's own operators only: --attention torch."),
    ] = False
    cuda_graphs: Annotated[
        str | None,
        option(
            "--cuda-graphs",
            help="Sizes of decode steps to capture, with commas between; 0: none. On a CPU there are none.",
            metavar="N,N",
        ),
    ] = None
    cuda_memory_fraction: Annotated[
        float,
        number("--cuda-memory-fraction", help="Share of the device's memory to use.", max=1.0),
    ] = 1.0
    shard_uds_path: Annotated[
        str | None,
        option(
            "--shard-uds-path",
            help="Socket of shard r is PATH-r; default: in a fresh private folder, removed at exit.",
        ),
    ] = None
    master_addr: Annotated[str, option("--master-addr", help="Where the shards of one model find each other.")] = (
        "localhost"
    )
    master_port: Annotated[
        int | None,
        number(
            "--master-port",
            help="Port of that meeting point; default: a free one.",
            max=65535,
        ),
    ] = None

    max_concurrent_requests: Annotated[
        int, number("--max-concurrent-requests", help="More are answered with 429 at once.")
    ] = 128
    max_best_of: Annotated[int, number("--max-best-of", help="Largest `best_of`.")] = 2
    max_stop_sequences: Annotated[int, number("--max-stop-sequences", help="Most `stop` sequences of a request.")] = 4
    max_top_n_tokens: Annotated[int, number("--max-top-n-tokens", help="Largest `top_n_tokens`.")] = 5
    max_input_tokens: Annotated[
        int | None,
        number("--max-input-tokens", help="Longest prompt; default: --max-total-tokens - 1."),
    ] = None
    max_input_length: Annotated[int | None, number("--max-input-length", help="Old name of --max-input-tokens.")] = None
    max_total_tokens: Annotated[
        int | None,
        number(
            "--max-total-tokens",
            help="Prompt plus output of one request; default: what the model and the memory allow.",
        ),
    ] = None
    waiting_served_ratio: Annotated[
        float | None,
        number(
            "--waiting-served-ratio",
            help="Pause running requests only when waiting/running reaches this; default: waiting ones enter at once.",
        ),
    ] = None
    max_batch_prefill_tokens: Annotated[
        int | None,
        number("--max-batch-prefill-tokens", help="Prompt tokens in one step; default: 4096, on a CPU 512."),
    ] = None
    max_batch_total_tokens: Annotated[
        int | None,
        number("--max-batch-total-tokens", help="Tokens of the KV cache; default: what fits."),
    ] = None
    max_waiting_tokens: Annotated[
        int | None,
        number(
            "--max-waiting-tokens",
            help="Longest wait, in steps of the running requests; default: none, waiting requests enter at once.",
        ),
    ] = None
    max_batch_size: Annotated[int | None, number("--max-batch-size", help="Most requests in one batch.")] = None
    max_inter_token_latency_ms: Annotated[
        int | None,
        number(
            "--max-inter-token-latency-ms",
            help="Cut prompts so that running streams wait no longer than this for a token, as far as decoding alone "
            "leaves room; default: long prompts are cut so that it takes less than three times what it takes without "
            "them.",
        ),
    ] = None
    max_client_batch_size: Annotated[
        int, number("--max-client-batch-size", help="Most prompts in one /v1/completions.")
    ] = 4
    payload_limit: Annotated[int, number("--payload-limit", help="Largest request body, in bytes.")] = 2_000_000
    enable_prefill_logprobs: Annotated[
        bool, option("--enable-prefill-logprobs", help="Let requests ask for the prompt's logprobs.")
    ] = False
    disable_grammar_support: Annotated[
        bool, option("--disable-grammar-support", help="Refuse `grammar` and `response_format`.")
    ] = False
    validation_workers: Annotated[int, number("--validation-workers", help="Tokenizer threads of the router.")] = 2

    hostname: Annotated[str, option("--hostname", help="IP address to listen on, or localhost.")] = "0.0.0.0"
    port: Annotated[int, number("--port", "-p", help="Port to listen on.", max=65535)] = 3000
    prometheus_port: Annotated[
        int | None,
        number("--prometheus-port", help="Serve /metrics on this port too; default: on --port alone.", max=65535),
    ] = None
    tls_cert: Annotated[
        str | None, option("--tls-cert", help="Certificate chain in PEM: serve HTTPS. Needs --tls-key.")
    ] = None
    tls_key: Annotated[str | None, option("--tls-key", help="Its private key in PEM.")] = None
    cors_allow_origin: Annotated[
        list[str] | None, option("--cors-allow-origin", help="Repeatable; default: any origin.")
    ] = None
    api_key: Annotated[
        str | None,
        option("--api-key", help="Keys that `Authorization: Bearer KEY` may name, with commas. Safer by environment."),
    ] = None

    json_output: Annotated[bool, option("--json-output", help="Logs as JSON lines.")] = False
    env: Annotated[bool, option("--env", "-e", help="Print what runs here, then start.", env=False)] = False
    plan: Annotated[
        bool,
        option("--plan", help="Print what fits into the memory, without loading the model, and end.", env=False),
    ] = False
    plan_device: Annotated[
        str | None,
        option(
            "--plan-device",
            help="What --plan is for: `cpu`, a GPU by name (L4, H100) or by memory (24GiB); default: this machine.",
            env=False,
        ),
    ] = None
    graceful_termination_timeout: Annotated[
        int,
        number(
            "--graceful-termination-timeout",
            "-g",
            help="Seconds that running requests get to finish after SIGTERM.",
        ),
    ] = 90
    max_shard_restarts: Annotated[
        int,
        number(
            "--max-shard-restarts",
            help="How often, within 10 minutes, shards that crash or hang are started again, while requests wait and "
            "go on from where they were; 0: the first crash ends the server.",
        ),
    ] = 3
    stall_timeout: Annotated[
        float,
        number(
            "--stall-timeout",
            help="Seconds without progress in a step after which a shard counts as hung.",
        ),
    ] = 60.0
    fair_shares: Annotated[
        Switch,
        option("--fair-shares", help="Share the server between API keys by the tokens of their requests."),
    ] = Switch.TRUE
    max_queue_size: Annotated[
        int | None,
        number(
            "--max-queue-size",
            help="Most requests that wait; more are answered with 429; default: as --max-concurrent-requests.",
        ),
    ] = None
    usage_stats: Annotated[
        UsageStats, option("--usage-stats", help="Accepted for compatibility: nothing is ever sent.")
    ] = UsageStats.ON

    quantize: Annotated[str | None, later("--quantize", "Quantisation scheme.")] = None
    speculate: Annotated[str | None, later("--speculate", "Speculated ids; 0 is accepted.")] = None
    prefix_caching: Annotated[
        str | None,
        option("--prefix-caching", help="Compute equal beginnings of prompts once; on unless 0.", metavar="BOOL"),
    ] = None
    rope_scaling: Annotated[str | None, later("--rope-scaling", "Linear or dynamic position scaling.")] = None
    rope_factor: Annotated[str | None, later("--rope-factor", "Its factor.")] = None
    otlp_endpoint: Annotated[str | None, later("--otlp-endpoint", "Collector for traces.")] = None
    otlp_service_name: Annotated[str, later("--otlp-service-name", "Service name in traces.")] = OTLP_SERVICE_NAME
    tokenizer_config_path: Annotated[
        str | None,
        option("--tokenizer-config-path", help="tokenizer_config.json or .jinja file with another chat template."),
    ] = None
    tool_call_parser: Annotated[
        str | None,
        option("--tool-call-parser", help="How the model writes calls of tools. By default its chat template says it."),
    ] = None
    reasoning_parser: Annotated[
        str | None, option("--reasoning-parser", help="How the model marks its reasoning: think, mistral, ...")
    ] = None
    safe_special_tokens: Annotated[
        bool,
        option("--safe-special-tokens", help="In chats, special tokens written into a message stay text."),
    ] = False
    lora_adapters: Annotated[str | None, later("--lora-adapters", "Adapters to serve beside the model.")] = None
    watermark_gamma: Annotated[
        float | None,
        number("--watermark-gamma", help="Share of the vocabulary that a watermark prefers; default: 0.5.", max=1.0),
    ] = None
    watermark_delta: Annotated[
        float | None,
        option("--watermark-delta", help="How much it does, in logits; default: 2.", metavar="N"),
    ] = None
    ngrok: Annotated[bool, option("--ngrok", help=f"Tunnel through ngrok. {NOT_YET}")] = False
    ngrok_authtoken: Annotated[str | None, later("--ngrok-authtoken", "Its token.")] = None
    ngrok_edge: Annotated[str | None, later("--ngrok-edge", "Its edge.")] = None


@dataclasses.dataclass(frozen=True, slots=True)
class FlagInfo:
    """What the environment code needs to know of one flag."""

    name: str
    """Field of `Flags`."""
    variable: str
    """Its environment variable."""
    kind: type
    """bool, int, float, str, list, or an enumeration."""
    minimum: float | None
    maximum: float | None


@cache
def flag_table() -> tuple[FlagInfo, ...]:
    """All flags that read the environment, in the order of `Flags`."""
    table = []
    for name, hint in get_type_hints(Flags, include_extras=True).items():
        annotation, info = get_args(hint)
        assert isinstance(info, OptionInfo)
        if info.envvar is None:
            continue
        assert isinstance(info.envvar, str)
        kinds = [kind for kind in get_args(annotation) or (annotation,) if kind is not NoneType]
        kind = list if annotation == list[str] | None else kinds[0]
        table.append(FlagInfo(name, info.envvar, kind, info.min, info.max))
    return tuple(table)
