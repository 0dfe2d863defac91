"""Router configuration: resolved once, then frozen."""

from __future__ import annotations

from dataclasses import dataclass


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
    master_shard_uds_path: str = "/tmp/text-generation-server-0"
    validation_workers: int = 2
    api_key: str | None = None
    json_output: bool = False
    cors_allow_origin: tuple[str, ...] = ()
    max_client_batch_size: int = 4
    payload_limit: int = 2_000_000
    disable_grammar_support: bool = False
    graceful_termination_timeout: int = 90
    compute_type: str = "gpu+optimized"
    launcher_nonce: str = ""


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
    prefill_logprobs: bool
    """The server was started with ``--enable-prefill-logprobs``."""

    def __post_init__(self) -> None:
        if not 0 < self.max_input_tokens < self.max_total_tokens:
            raise ConfigError(
                f"`max_input_tokens` must be < `max_total_tokens`. "
                f"Given: {self.max_input_tokens} and {self.max_total_tokens}"
            )
