"""Router configuration: resolved once, then frozen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from text_generation_proto import limits as derive
from text_generation_proto.limits import Limit


class ConfigError(ValueError):
    """The flags contradict each other or the model; the text says which and what to change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterFlags:
    """The command line as given; None means "derive it"."""

    max_concurrent_requests: int = 128
    max_best_of: int = 2
    max_stop_sequences: int = 4
    max_top_n_tokens: int = 5
    max_input_tokens: int | None = None
    max_total_tokens: int | None = None
    waiting_served_ratio: float | None = None
    max_batch_prefill_tokens: int | None = None
    max_batch_total_tokens: int | None = None
    max_waiting_tokens: int | None = None
    max_batch_size: int | None = None
    hostname: str = "0.0.0.0"
    port: int = 3000
    prometheus_port: int | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    master_shard_uds_path: str = "/tmp/text-generation-server-0"
    validation_workers: int = 2
    tokenizer_config_path: str | None = None
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    safe_special_tokens: bool = False
    api_key: str | None = None
    json_output: bool = False
    cors_allow_origin: tuple[str, ...] = ()
    max_client_batch_size: int = 4
    payload_limit: int = 2_000_000
    disable_grammar_support: bool = False
    graceful_termination_timeout: int = 90
    prefix_caching: bool = True
    max_inter_token_latency_ms: int | None = None
    max_shard_restarts: int = 0
    stall_timeout: float = 60.0
    fair_shares: bool = True
    max_queue_size: int | None = None
    aip_predict_route: str | None = None
    aip_health_route: str | None = None
    compute_type: str = "gpu+optimized"
    launcher_nonce: str = ""
    git_sha: str | None = None
    docker_label: str | None = None

    @property
    def api_keys(self) -> tuple[str, ...]:
        """Of ``api_key``; commas separate them."""
        return () if self.api_key is None else tuple(key.strip() for key in self.api_key.split(","))


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a request may ask for."""

    max_best_of: int
    max_stop_sequences: int
    max_top_n_tokens: int
    max_input_tokens: int
    """Longest accepted prompt, in tokens, special tokens included."""
    max_total_tokens: int
    """Prompt plus generated tokens of one request."""
    vocab_size: int
    """Width of the logits."""
    disable_grammar_support: bool

    def __post_init__(self) -> None:
        if not 0 < self.max_input_tokens < self.max_total_tokens:
            raise ConfigError(
                f"`max_input_tokens` must be < `max_total_tokens`. "
                f"Given: {self.max_input_tokens} and {self.max_total_tokens}"
            )


class ModelInfo(Protocol):
    """What resolving needs to know of the model; the shards tell it."""

    @property
    def device_type(self) -> str: ...
    @property
    def block_size(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmupLimits:
    """What the shards must know to size their KV cache; 0 is "choose what fits"."""

    max_batch_prefill_tokens: int
    """Tokens of the largest step."""
    max_batch_total_tokens: int
    max_batch_size: int
    max_total_tokens: int
    max_concurrent_requests: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """The limits the router serves by, all of them settled."""

    limits: Limits
    max_concurrent_requests: int
    max_batch_prefill_tokens: int
    """Prompt tokens plus decode rows of one step."""
    max_batch_total_tokens: int
    """Tokens of KV cache for all running requests."""
    max_batch_size: int | None
    """Running requests; None is no limit beside the KV cache."""
    max_inter_token_latency_s: float | None
    """What a step that carries prompts may take; None is a limit for long prompts alone, by what decoding takes."""
    derivations: Mapping[str, str] = field(default_factory=dict)
    """How each limit came about, by its name: for the log."""


def check_counts(flags: RouterFlags) -> None:
    """Raises: ConfigError for numbers that make no sense with any model."""
    for name in (
        "validation_workers",
        "max_batch_size",
        "max_inter_token_latency_ms",
        "max_concurrent_requests",
        "max_batch_prefill_tokens",
        "max_batch_total_tokens",
    ):
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise ConfigError(f"`{name}` must be > 0")


def warmup_limits(flags: RouterFlags, info: ModelInfo) -> WarmupLimits:
    """What is known before the shards have said how much fits.

    Raises: ConfigError for all that is wrong whatever fits.
    """
    check_counts(flags)
    positions = info.max_position_embeddings
    max_total = flags.max_total_tokens
    if max_total is not None and 0 < positions < max_total:
        raise ConfigError(
            f"`max_total_tokens` must be <= the {positions} positions that the model was made for. Given: {max_total}"
        )
    if max_total is not None and flags.max_input_tokens is not None and flags.max_input_tokens >= max_total:
        raise ConfigError(
            f"`max_input_tokens` must be < `max_total_tokens`. Given: {flags.max_input_tokens} and {max_total}"
        )
    batch_total = flags.max_batch_total_tokens
    if batch_total is not None:
        _check_batch_total(flags.max_batch_prefill_tokens, max_total, batch_total)
    return WarmupLimits(
        max_batch_prefill_tokens=derive.largest_step_tokens(_prefill_tokens(flags, info).value, _most_rows(flags)),
        max_batch_total_tokens=batch_total or 0,
        max_batch_size=flags.max_batch_size or 0,
        max_total_tokens=max_total or 0,
        max_concurrent_requests=flags.max_concurrent_requests,
    )


def resolve(flags: RouterFlags, info: ModelInfo, num_blocks: int, model_max_length: int | None = None) -> RouterConfig:
    """Fill in all that was not given, now that ``num_blocks`` are known to fit.

    ``model_max_length`` is the tokenizer's word on the longest text. Raises: ConfigError.
    """
    capacity = num_blocks * info.block_size
    _check_batch_total(flags.max_batch_prefill_tokens, flags.max_total_tokens, capacity)
    total = derive.total_tokens(
        flags.max_total_tokens,
        capacity=capacity,
        positions=info.max_position_embeddings,
        model_max_length=model_max_length,
    )
    inputs = derive.input_tokens(flags.max_input_tokens, total.value)
    prefill = _prefill_tokens(flags, info)
    if prefill.value > capacity:
        prefill = Limit(capacity, "all tokens of the KV cache")
    limits = Limits(
        max_best_of=flags.max_best_of,
        max_stop_sequences=flags.max_stop_sequences,
        max_top_n_tokens=min(flags.max_top_n_tokens, info.vocab_size),
        max_input_tokens=inputs.value,
        max_total_tokens=total.value,
        vocab_size=info.vocab_size,
        disable_grammar_support=flags.disable_grammar_support,
    )
    latency_ms = flags.max_inter_token_latency_ms
    blocks = f"{num_blocks} blocks of {info.block_size}"
    return RouterConfig(
        limits=limits,
        max_concurrent_requests=flags.max_concurrent_requests,
        max_batch_prefill_tokens=prefill.value,
        max_batch_total_tokens=capacity,
        max_batch_size=flags.max_batch_size,
        max_inter_token_latency_s=None if latency_ms is None else latency_ms / 1000,
        derivations={
            "max_input_tokens": inputs.why,
            "max_total_tokens": total.why,
            "max_batch_prefill_tokens": prefill.why,
            "max_batch_total_tokens": f"{derive.GIVEN}, in {blocks}" if flags.max_batch_total_tokens else blocks,
        },
    )


def _prefill_tokens(flags: RouterFlags, info: ModelInfo) -> Limit:
    return derive.batch_prefill_tokens(
        flags.max_batch_prefill_tokens,
        device_type=info.device_type,
        rows=_most_rows(flags),
        block_size=info.block_size,
    )


def _most_rows(flags: RouterFlags) -> int:
    return derive.most_rows(flags.max_concurrent_requests, flags.max_batch_size)


def _check_batch_total(max_prefill: int | None, max_total: int | None, batch_total: int) -> None:
    if max_prefill is not None and max_prefill > batch_total:
        raise ConfigError(
            f"`max_batch_prefill_tokens` must be <= `max_batch_total_tokens`. Given: {max_prefill} and {batch_total}"
        )
    if max_total is not None and max_total > batch_total:
        raise ConfigError(
            f"`max_total_tokens` must be <= `max_batch_total_tokens`. Given: {max_total} and {batch_total}"
        )
