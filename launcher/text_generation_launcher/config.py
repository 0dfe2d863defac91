"""Launcher configuration: flags are checked and completed once, then frozen."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from pathlib import Path

from text_generation_launcher.devices import Devices
from text_generation_launcher.environment import FALSE, TRUE, address, invalid_hostname
from text_generation_launcher.errors import ArgumentValidation, NotEnoughCUDADevices
from text_generation_launcher.flags import OTLP_SERVICE_NAME, Flags, Switch

EMBEDDED = "embedded"

TGI_ATTENTION = frozenset({"paged", "flashdecoding", "flashdecoding-ipex", "flashinfer"})
"""TGI's back ends; ours have other names."""

REFUSED = {
    "quantize": (),
    "speculate": ("0",),
    "rope_scaling": (),
    "rope_factor": (),
    "otlp_endpoint": (),
    "otlp_service_name": (OTLP_SERVICE_NAME,),
    "lora_adapters": (),
    "ngrok": (),
    "ngrok_authtoken": (),
    "ngrok_edge": (),
}
"""Flags that cannot be honoured yet, and the values that ask for nothing."""

POSITIVE = (
    "validation_workers",
    "max_concurrent_requests",
    "max_batch_size",
    "max_inter_token_latency_ms",
    "max_queue_size",
    "max_batch_prefill_tokens",
    "max_batch_total_tokens",
    "master_port",
)
"""Flags for which 0 makes no sense."""


class ModelSource(enum.Enum):
    EMBEDDED = "embedded"
    FOLDER = "folder"
    HUB = "hub"


@dataclass(frozen=True, slots=True, kw_only=True)
class LauncherConfig:
    flags: Flags
    """As given, and checked. What is passed on unchanged is read from here; what is derived stands below."""
    source: ModelSource
    num_shard: int
    hostname: str
    """An IP address."""
    max_input_tokens: int | None
    attention: str | None
    cuda_graphs: tuple[int, ...] | None
    """Batch sizes, without zeros; None where none were given."""
    master_port: int | None
    """None where none was given; one shard alone needs none."""
    prefix_caching: bool
    compute_type: str
    """Of the header x-compute-type: ``{num_shard}-{card}``."""
    warnings: tuple[str, ...] = ()


def resolve(flags: Flags, devices: Devices) -> LauncherConfig:
    """Check ``flags`` and derive what they leave open.

    Raises: LauncherError, with TGI's texts where TGI has one.
    """
    _refuse_what_is_not_built(flags)
    # An empty variable means "not given" to the router: handed on, an empty key would open the server.
    if flags.api_key is not None and not all(key.strip() for key in flags.api_key.split(",")):
        raise ArgumentValidation("`api_key` must not be empty")
    if flags.plan_device is not None and not flags.plan:
        raise ArgumentValidation("`plan_device` is what `--plan` is for: give `--plan` too")
    max_input_tokens = _max_input_tokens(flags)
    _check_numbers(flags, max_input_tokens)
    num_shard = find_num_shard(flags.sharded, flags.num_shard, devices.count)
    hostname, warnings = _hostname(flags.hostname)
    return LauncherConfig(
        flags=flags,
        source=_source(flags.model_id),
        num_shard=num_shard,
        hostname=hostname,
        max_input_tokens=max_input_tokens,
        attention=_attention(flags),
        cuda_graphs=_cuda_graphs(flags.cuda_graphs),
        master_port=flags.master_port,
        prefix_caching=_prefix_caching(flags),
        compute_type=f"{num_shard}-{devices.card or 'cpu'}",
        warnings=warnings,
    )


def find_num_shard(sharded: Switch | None, num_shard: int | None, num_devices: int | None) -> int:
    """How many shards to start; ``num_devices`` is None when no environment variable names the devices."""
    if sharded is Switch.TRUE:
        if num_shard is None:
            if (num_devices or 0) <= 1:
                raise NotEnoughCUDADevices(f"`sharded` is true but only found {num_devices or 0} CUDA devices")
            return num_devices or 0
        if num_shard <= 1:
            raise ArgumentValidation("`sharded` is true but `num_shard` <= 1")
    if num_shard is None:
        return 1 if sharded is Switch.FALSE else max(num_devices or 1, 1)
    if num_shard < 1:
        raise ArgumentValidation("`num_shard` cannot be < 1")
    return num_shard


def _refuse_what_is_not_built(flags: Flags) -> None:
    for name, harmless in REFUSED.items():
        value = getattr(flags, name)
        if not value or str(value).strip().lower() in harmless:
            continue
        shown = "" if value is True or "token" in name else f" {value}"
        raise ArgumentValidation(f"`--{name.replace('_', '-')}{shown}` is not supported yet")


def _max_input_tokens(flags: Flags) -> int | None:
    if flags.max_input_tokens is not None and flags.max_input_length is not None:
        raise ArgumentValidation(
            f"Both `max_input_tokens` ({flags.max_input_tokens}) and `max_input_length` ({flags.max_input_length}) "
            "are set. Please define only `max_input_tokens` as `max_input_length is deprecated for naming consistency. "
        )
    return flags.max_input_length if flags.max_input_tokens is None else flags.max_input_tokens


def _check_numbers(flags: Flags, max_input_tokens: int | None) -> None:
    """What the router and the shards would refuse as well, but only once the model is loaded."""
    positive = {name: getattr(flags, name) for name in POSITIVE} | {"max_input_tokens": max_input_tokens}
    for name, value in positive.items():
        if value is not None and value < 1:
            raise ArgumentValidation(f"`{name}` must be > 0")
    max_total_tokens = flags.max_total_tokens
    if max_total_tokens is not None:
        if max_input_tokens is not None and max_input_tokens >= max_total_tokens:
            raise ArgumentValidation(
                f"`max_input_tokens`({max_input_tokens}) must be < `max_total_tokens`({max_total_tokens})"
            )
        if max_total_tokens < 2:
            raise ArgumentValidation(
                f"`max_total_tokens` must be > 1, one token of prompt and one of output. Given: {max_total_tokens}"
            )
    if flags.max_batch_total_tokens is not None:
        for name in ("max_batch_prefill_tokens", "max_total_tokens"):
            value = getattr(flags, name)
            if value is not None and value > flags.max_batch_total_tokens:
                raise ArgumentValidation(
                    f"`{name}` must be <= `max_batch_total_tokens`. Given: {value} and {flags.max_batch_total_tokens}"
                )
    # Comparisons with nan are false: the command line's own limits let it pass.
    if flags.waiting_served_ratio is not None and not 0 <= flags.waiting_served_ratio < math.inf:
        raise ArgumentValidation(f"`waiting_served_ratio` must be >= 0 and finite. Given: {flags.waiting_served_ratio}")
    if not 0 < flags.stall_timeout < math.inf:
        raise ArgumentValidation(f"`stall_timeout` must be > 0 and finite. Given: {flags.stall_timeout}")
    if flags.watermark_gamma is not None and not 0 < flags.watermark_gamma < 1:
        raise ArgumentValidation(f"`watermark_gamma` must be > 0 and < 1. Given: {flags.watermark_gamma}")
    if flags.watermark_delta is not None and not -100 < flags.watermark_delta < 100:
        raise ArgumentValidation(f"`watermark_delta` must be > -100 and < 100. Given: {flags.watermark_delta}")
    if (flags.tls_cert is None) != (flags.tls_key is None):
        raise ArgumentValidation("`tls_cert` and `tls_key` come together: give both, or none")
    if not 0 < flags.cuda_memory_fraction <= 1:
        raise ArgumentValidation(f"`cuda_memory_fraction` must be > 0 and <= 1. Given: {flags.cuda_memory_fraction}")


def _attention(flags: Flags) -> str | None:
    if flags.attention in TGI_ATTENTION:
        raise ArgumentValidation(
            f"`--attention {flags.attention}` is not supported yet; without it the best back end for the device is used"
        )
    if not flags.disable_custom_kernels:
        return flags.attention
    if flags.attention not in (None, "torch"):
        raise ArgumentValidation(
            f"`--disable-custom-kernels` and `--attention {flags.attention}` contradict each other"
        )
    return "torch"


def _prefix_caching(flags: Flags) -> bool:
    word = (flags.prefix_caching or "true").strip().lower()
    if word not in TRUE | FALSE:
        raise ArgumentValidation(f"`prefix_caching` must be true or false. Given: {flags.prefix_caching}")
    return word in TRUE


def _cuda_graphs(text: str | None) -> tuple[int, ...] | None:
    """Zeros are left out, as TGI does: ``0`` alone asks for no graph, and so does nothing at all."""
    if text is None:
        return None
    if not text.strip():
        return ()
    sizes = [word.strip() for word in text.split(",")]
    # int() takes more than a number of graphs should look like: signs, underscores, other scripts' digits
    if not all(size.isascii() and size.isdigit() for size in sizes):
        raise ArgumentValidation(f"`cuda_graphs` must be numbers with commas between. Given: {text}")
    return tuple(int(size) for size in sizes if int(size))


def _hostname(hostname: str) -> tuple[str, tuple[str, ...]]:
    found = address(hostname)
    return ("0.0.0.0", (invalid_hostname(hostname),)) if found is None else (found, ())


def _source(model_id: str) -> ModelSource:
    if not model_id.strip():
        raise ArgumentValidation(f"`model_id` must not be empty; without the flag it is `{EMBEDDED}`")
    if model_id == EMBEDDED:
        return ModelSource.EMBEDDED
    if Path(model_id).is_dir():
        return ModelSource.FOLDER
    if model_id.startswith(("/", "./", "../", "~")):
        raise ArgumentValidation(f"`--model-id {model_id}` is no folder")
    return ModelSource.HUB
