"""Shard configuration: resolved once by the command line, then frozen."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

DEFAULT_BLOCK_SIZE = 16
"""Tokens of a block of KV cache."""
DEFAULT_CONCURRENT_REQUESTS = 128
"""The router's, for a shard that nobody told."""


class ConfigError(ValueError):
    """The shard cannot be started as asked; the text says why and what to change, in one line."""


class Dtype(enum.StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class KvCacheDtype(enum.StrEnum):
    FP8_E4M3FN = "fp8_e4m3fn"
    FP8_E5M2 = "fp8_e5m2"


CUDA_GRAPHS = (1, 2, 4, 8, 16, 32, 64, 128)
"""TGI's sizes of decode steps, and two more: it served 128 requests at a time and captured up to 32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardConfig:
    model_id: str
    """As given on the launcher's command line; shown to clients."""
    revision: str | None = None
    dtype: Dtype | None = None
    """None: the checkpoint's own, or float32 where the device has no instructions for it."""
    kv_cache_dtype: KvCacheDtype | None = None
    """None: that of the weights."""
    trust_remote_code: bool = False
    uds_path: Path
    """Socket of rank r: ``{uds_path}-{r}``."""
    attention: str | None = None
    """Name in the attention registry; None picks by device."""
    block_size: int = DEFAULT_BLOCK_SIZE
    prefill_logprobs: bool = False
    max_input_tokens: int | None = None
    max_total_tokens: int | None = None
    """Both are the router's, which refuses what is longer; here they are compared with the model's positions."""
    max_batch_prefill_tokens: int | None = None
    max_batch_total_tokens: int | None = None
    max_batch_size: int | None = None
    max_concurrent_requests: int = DEFAULT_CONCURRENT_REQUESTS
    """These too: a shard for which they are too much says so before it loads."""
    cuda_graphs: tuple[int, ...] = CUDA_GRAPHS
    """Rows of the decode steps that are captured; without effect on a CPU."""
    cuda_memory_fraction: float = 1.0
    swaps: bool = True
    """Replace modules by their faster equals; off runs the library's own modules (for tests and for diagnosis)."""
    watermark_gamma: float = 0.5
    """Share of the vocabulary that a watermark prefers."""
    watermark_delta: float = 2.0
    """How much, in logits."""
    launcher_nonce: str = ""
    incarnation: int = 1
    pipeline_tag: str = ""
    """The hub's, as the launcher's download has learnt it: no file of the cache has it."""
    rank: int = 0
    world_size: int = 1
    master_addr: str = "localhost"
    master_port: int = 29500


EMBEDDED_MODEL = "embedded"
"""The model id of the small model that ships with this package."""

BLOCK_SIZES = {"flash-attn": 256, "varlen": 256}
"""Tokens of a block for the attention back ends whose kernels want more than 16; when they are asked for by name."""

OTLP_SERVICE_NAME = "text-generation-inference.server"

MAX_LIMIT = 2**31
"""Of tokens and requests: what the contract's fields hold, with room to add up."""

MAX_SOCKET_PATH_BYTES = 107
"""Of a unix socket on Linux, without the closing zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeFlags:
    """The arguments of ``serve`` as given; None where an option was not."""

    model_id: str
    revision: str | None = None
    sharded: bool = False
    quantize: str | None = None
    speculate: int | None = None
    dtype: str | None = None
    kv_cache_dtype: str | None = None
    trust_remote_code: bool = False
    uds_path: Path = Path("/tmp/text-generation-server")
    otlp_endpoint: str | None = None
    otlp_service_name: str = OTLP_SERVICE_NAME
    max_input_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFlags:
    """The arguments of ``plan`` as given; None where an option was not."""

    model_id: str
    revision: str | None = None
    dtype: str | None = None
    kv_cache_dtype: str | None = None
    trust_remote_code: bool = False
    num_shard: int = 1
    cuda_memory_fraction: float = 1.0
    enable_prefill_logprobs: bool = False
    max_input_tokens: int | None = None
    max_total_tokens: int | None = None
    max_batch_prefill_tokens: int | None = None
    max_batch_total_tokens: int | None = None
    max_batch_size: int | None = None
    max_concurrent_requests: int = DEFAULT_CONCURRENT_REQUESTS


def resolve(flags: ServeFlags, env: Mapping[str, str]) -> ShardConfig:
    """Flags and environment -> configuration. Raises: ConfigError naming the flag or variable."""
    _refuse_unsupported(flags, env)
    rank, world_size, master_addr, master_port = _ranks(env) if flags.sharded else (0, 1, "localhost", 29500)
    uds_path = flags.uds_path.absolute()
    if len(f"{uds_path}-{rank}".encode()) > MAX_SOCKET_PATH_BYTES:
        raise ConfigError(f"`--uds-path {uds_path}` is longer than a unix socket's path may be; choose a shorter one")
    if flags.max_input_tokens is not None and flags.max_input_tokens < 1:
        raise ConfigError(f"`--max-input-tokens` must be at least 1, got {flags.max_input_tokens}")
    attention = env.get("ATTENTION") or None
    return ShardConfig(
        model_id=flags.model_id,
        revision=flags.revision,
        dtype=_dtype(flags.dtype),
        kv_cache_dtype=_kv_cache_dtype(flags.kv_cache_dtype),
        trust_remote_code=flags.trust_remote_code,
        uds_path=uds_path,
        attention=attention,
        block_size=_block_size(attention),
        prefill_logprobs=_boolean(env, "REQUEST_LOGPROBS", default=False),
        max_input_tokens=flags.max_input_tokens,
        max_total_tokens=_limit(env, "MAX_TOTAL_TOKENS"),
        max_batch_prefill_tokens=_limit(env, "MAX_BATCH_PREFILL_TOKENS"),
        max_batch_total_tokens=_limit(env, "MAX_BATCH_TOTAL_TOKENS"),
        max_batch_size=_limit(env, "MAX_BATCH_SIZE"),
        max_concurrent_requests=_limit(env, "MAX_CONCURRENT_REQUESTS") or DEFAULT_CONCURRENT_REQUESTS,
        cuda_graphs=_cuda_graphs(env),
        cuda_memory_fraction=_fraction(env, "CUDA_MEMORY_FRACTION"),
        swaps=_boolean(env, "TGI_SWAPS", default=True),
        watermark_gamma=_number(env, "WATERMARK_GAMMA", 0.5, above=0, below=1),
        watermark_delta=_number(env, "WATERMARK_DELTA", 2.0, above=-100, below=100),
        launcher_nonce=env.get("TGI_LAUNCHER_NONCE", ""),
        incarnation=_integer(env, "TGI_INCARNATION", default=1, least=1),
        pipeline_tag=env.get("TGI_PIPELINE_TAG", ""),
        rank=rank,
        world_size=world_size,
        master_addr=master_addr,
        master_port=master_port,
    )


def resolve_plan(flags: PlanFlags, env: Mapping[str, str]) -> ShardConfig:
    """The configuration of the shard that is planned. Raises: ConfigError naming the flag."""
    limits = {
        "max_input_tokens": flags.max_input_tokens,
        "max_total_tokens": flags.max_total_tokens,
        "max_batch_prefill_tokens": flags.max_batch_prefill_tokens,
        "max_batch_total_tokens": flags.max_batch_total_tokens,
        "max_batch_size": flags.max_batch_size,
        "max_concurrent_requests": flags.max_concurrent_requests,
        "num_shard": flags.num_shard,
    }
    for name, value in limits.items():
        if value is not None and not 1 <= value < MAX_LIMIT:
            raise ConfigError(f"`--{name.replace('_', '-')}` must be at least 1 and below 2**31, got {value}")
    if not 0 < flags.cuda_memory_fraction <= 1:
        raise ConfigError(f"`--cuda-memory-fraction` must be in (0, 1], got {flags.cuda_memory_fraction:g}")
    attention = env.get("ATTENTION") or None
    return ShardConfig(
        model_id=flags.model_id,
        revision=flags.revision,
        dtype=_dtype(flags.dtype),
        kv_cache_dtype=_kv_cache_dtype(flags.kv_cache_dtype),
        trust_remote_code=flags.trust_remote_code,
        uds_path=Path(),
        attention=attention,
        block_size=_block_size(attention),
        prefill_logprobs=flags.enable_prefill_logprobs,
        max_input_tokens=flags.max_input_tokens,
        max_total_tokens=flags.max_total_tokens,
        max_batch_prefill_tokens=flags.max_batch_prefill_tokens,
        max_batch_total_tokens=flags.max_batch_total_tokens,
        max_batch_size=flags.max_batch_size,
        max_concurrent_requests=flags.max_concurrent_requests,
        cuda_graphs=_cuda_graphs(env),
        cuda_memory_fraction=flags.cuda_memory_fraction,
        swaps=_boolean(env, "TGI_SWAPS", default=True),
        world_size=flags.num_shard,
    )


def _refuse_unsupported(flags: ServeFlags, env: Mapping[str, str]) -> None:
    """Refuse by name what would otherwise be ignored."""
    wanted: dict[str, object] = {
        "--quantize": flags.quantize,
        "--speculate": flags.speculate,
        "--otlp-endpoint": flags.otlp_endpoint,
        "--otlp-service-name": flags.otlp_service_name if flags.otlp_service_name != OTLP_SERVICE_NAME else None,
    }
    wanted |= {name: env.get(name) for name in ("LORA_ADAPTERS", "ROPE_SCALING", "ROPE_FACTOR")}
    for name, value in wanted.items():
        if value not in (None, "", 0, "none", "off"):
            raise ConfigError(f"`{name} {value}` is not supported yet; leave `{name}` out")


def _ranks(env: Mapping[str, str]) -> tuple[int, int, str, int]:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if not env.get(name):
            raise ConfigError(f"{name} must be set when sharded is True")
    world_size = _integer(env, "WORLD_SIZE", default=1, least=1)
    rank = _integer(env, "RANK", default=0, least=0)
    if rank >= world_size:
        raise ConfigError(f"RANK must be below WORLD_SIZE={world_size}, got {rank}")
    return rank, world_size, env["MASTER_ADDR"], _integer(env, "MASTER_PORT", default=29500, least=1)


def _dtype(name: str | None) -> Dtype | None:
    if name is None:
        return None
    try:
        return Dtype(name)
    except ValueError:
        raise ConfigError(f"`--dtype` must be one of {', '.join(Dtype)}, got {name}") from None


def _block_size(attention: str | None) -> int:
    return BLOCK_SIZES.get(attention or "", DEFAULT_BLOCK_SIZE)


def _kv_cache_dtype(name: str | None) -> KvCacheDtype | None:
    if name in (None, "", "auto"):
        return None
    try:
        return KvCacheDtype(name)
    except ValueError:
        raise ConfigError(f"`--kv-cache-dtype` must be auto or one of {', '.join(KvCacheDtype)}, got {name}") from None


def _cuda_graphs(env: Mapping[str, str]) -> tuple[int, ...]:
    text = env.get("CUDA_GRAPHS")
    if not text:
        return CUDA_GRAPHS
    try:
        return tuple(sorted({size for size in map(int, text.split(",")) if size > 0}))
    except ValueError:
        raise ConfigError(f"CUDA_GRAPHS must be numbers with commas between, got {text!r}") from None


def _boolean(env: Mapping[str, str], name: str, *, default: bool) -> bool:
    value = env.get(name, "").strip().lower()
    if value in ("", "0", "false", "no", "off", "1", "true", "yes", "on"):
        return value in ("1", "true", "yes", "on") if value else default
    raise ConfigError(f"{name} must be true or false, got {value!r}")


def _integer(env: Mapping[str, str], name: str, *, default: int, least: int) -> int:
    text = env.get(name) or str(default)
    try:
        value = int(text)
    except ValueError:
        raise ConfigError(f"{name} must be an integer, got {text!r}") from None
    if value < least:
        raise ConfigError(f"{name} must be at least {least}, got {value}")
    return value


def _limit(env: Mapping[str, str], name: str) -> int | None:
    """A limit of the router's; None where it is not set."""
    return _integer(env, name, default=1, least=1) if env.get(name) else None


def _number(env: Mapping[str, str], name: str, default: float, *, above: float, below: float) -> float:
    text = env.get(name) or str(default)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not above < value < below:
        raise ConfigError(f"{name} must be a number between {above} and {below}, got {text!r}")
    return value


def _fraction(env: Mapping[str, str], name: str) -> float:
    text = env.get(name) or "1.0"
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise ConfigError(f"{name} must be a number in (0, 1], got {text!r}")
    return value
