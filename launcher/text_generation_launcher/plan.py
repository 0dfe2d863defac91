"""Pure: configuration -> the processes to start. Nothing here looks at the machine."""

from __future__ import annotations

import enum
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from text_generation_launcher.config import LauncherConfig, ModelSource
from text_generation_launcher.environment import without_flags
from text_generation_launcher.flags import Flags, Switch

HUB_TOKENS = ("HF_API_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""First found wins, as in TGI."""

ROUTER_FLAGS = (
    "max_concurrent_requests",
    "max_best_of",
    "max_stop_sequences",
    "max_top_n_tokens",
    "max_total_tokens",
    "waiting_served_ratio",
    "max_batch_prefill_tokens",
    "max_batch_total_tokens",
    "max_waiting_tokens",
    "max_batch_size",
    "max_inter_token_latency_ms",
    "max_client_batch_size",
    "validation_workers",
    "tokenizer_config_path",
    "tool_call_parser",
    "reasoning_parser",
    "safe_special_tokens",
    "payload_limit",
    "disable_grammar_support",
    "graceful_termination_timeout",
    "max_shard_restarts",
    "stall_timeout",
    "max_queue_size",
    "port",
    "prometheus_port",
    "tls_cert",
    "tls_key",
    "cors_allow_origin",
)
"""Flags that the router takes under the same name, unchanged."""


MEMORY_FLAGS = (
    "max_total_tokens",
    "max_batch_prefill_tokens",
    "max_batch_total_tokens",
    "max_batch_size",
    "max_concurrent_requests",
)
"""Limits that decide what a shard needs: the router's, which tells it again."""


class Role(enum.Enum):
    DOWNLOAD = "download"
    SHARD = "shard"
    ROUTER = "webserver"
    PLAN = "plan"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSpec:
    """One child process."""

    role: Role
    argv: tuple[str, ...]
    env: Mapping[str, str]
    """The whole environment, not an addition."""
    rank: int = 0

    @property
    def span(self) -> dict[str, Any] | None:
        """TGI's log span of the child's lines."""
        if self.role is Role.SHARD:
            return {"rank": self.rank, "name": "shard-manager"}
        return {"name": "download"} if self.role is Role.DOWNLOAD else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What is different in every launch."""

    nonce: str
    """The router speaks only to shards that carry it."""
    uds_path: str
    """Socket of rank r: ``{uds_path}-{r}``."""
    environ: Mapping[str, str]
    """The launcher's own environment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HubModel:
    """What a download has found out about its model; empty where nothing is known."""

    sha: str = ""
    pipeline_tag: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    download: ProcessSpec | None
    shards: tuple[ProcessSpec, ...]
    router: ProcessSpec

    def pinned(self, model: HubModel) -> Plan:
        """The same with every shard told what the download has found out.

        The branch may move between download and load, and the pipeline tag is in no file of the cache.
        """
        return replace(self, shards=tuple(_pinned(shard, model) for shard in self.shards))

    def restarted(self, incarnation: int, master_port: int | None) -> Plan:
        """The same for the next start of the shards; ``master_port``: a new one, if they meet at one."""
        more = {"TGI_INCARNATION": str(incarnation)} | _present({"MASTER_PORT": master_port})
        return replace(self, shards=tuple(replace(shard, env={**shard.env, **more}) for shard in self.shards))


def make_plan(config: LauncherConfig, launch: Launch) -> Plan:
    from_hub = config.source is ModelSource.HUB
    return Plan(
        download=_download(config, launch) if from_hub else None,
        shards=tuple(_shard(config, launch, rank) for rank in range(config.num_shard)),
        router=_router(config, launch),
    )


def _download(config: LauncherConfig, launch: Launch) -> ProcessSpec:
    flags = config.flags
    return ProcessSpec(
        role=Role.DOWNLOAD,
        argv=(
            *_python("text_generation_server", "download-weights", flags.model_id),
            *to_argv(flags, ("revision", "trust_remote_code")),
            "--json-output",
        ),
        env=_base_env(launch) | _hub_env(config, launch),
    )


def _shard(config: LauncherConfig, launch: Launch, rank: int) -> ProcessSpec:
    flags = config.flags
    argv = [
        *_python("text_generation_server", "serve", flags.model_id),
        *to_argv(flags, ("revision", "dtype", "kv_cache_dtype", "trust_remote_code")),
        *(("--sharded",) if config.num_shard > 1 else ()),
        *("--uds-path", launch.uds_path),
        *_given("--max-input-tokens", config.max_input_tokens),
        "--json-output",
    ]
    env = _base_env(launch) | _hub_env(config, launch)
    env |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(config.num_shard),
        "MASTER_ADDR": flags.master_addr,
        "TORCH_NCCL_AVOID_RECORD_STREAMS": "1",
        "CUDA_MEMORY_FRACTION": str(flags.cuda_memory_fraction),
        "PREFIX_CACHING": "1" if config.prefix_caching else "0",
        **tunables(launch.environ),
    }
    optional = {
        "MASTER_PORT": config.master_port,
        "WATERMARK_GAMMA": flags.watermark_gamma,
        "WATERMARK_DELTA": flags.watermark_delta,
        "REQUEST_LOGPROBS": "1" if flags.enable_prefill_logprobs else None,
        **{name.upper(): getattr(flags, name) for name in MEMORY_FLAGS},
    }
    env |= _present(optional | _by_environment(config))
    return ProcessSpec(role=Role.SHARD, argv=tuple(argv), env=env, rank=rank)


def plan_spec(config: LauncherConfig, environ: Mapping[str, str]) -> ProcessSpec:
    """The child that prints the memory plan of such a launch."""
    flags = config.flags
    launch = Launch(nonce="", uds_path="", environ=environ)
    return ProcessSpec(
        role=Role.PLAN,
        argv=(
            *_python("text_generation_server", "plan", flags.model_id),
            *to_argv(flags, ("revision", "dtype", "kv_cache_dtype", "trust_remote_code", "cuda_memory_fraction")),
            *to_argv(flags, ("enable_prefill_logprobs", *MEMORY_FLAGS)),
            *("--num-shard", str(config.num_shard)),
            *_given("--max-input-tokens", config.max_input_tokens),
            *_given("--device", flags.plan_device),
            *(("--json-output",) if flags.json_output else ()),
        ),
        env=_base_env(launch) | _hub_env(config, launch) | _present(_by_environment(config)),
    )


def _by_environment(config: LauncherConfig) -> dict[str, object]:
    """What shards are told as TGI's are; None where they decide."""
    graphs = config.cuda_graphs
    return {
        "ATTENTION": config.attention,
        "CUDA_GRAPHS": None if graphs is None else ",".join(map(str, graphs or (0,))),
    }


def _present(variables: Mapping[str, object]) -> dict[str, str]:
    return {name: str(value) for name, value in variables.items() if value is not None}


SPINS = 10_000
"""Looks at the next piece of work, by a thread of GNU's OpenMP that has none, before it sleeps; by default 300,000, in
which it keeps a core from the router and its clients for milliseconds. Measured on 2 cores with a 135M model, 1, 8 and
32 streams: 7, 7 and 2 % more tokens, half the time between steps. 1,000 are too few: threads sleep within steps."""


def tunables(environ: Mapping[str, str]) -> dict[str, str]:
    """How a shard's C library hands out memory, and how its threads wait. What the user has set wins.

    One arena, because one thread computes; activations of a step stay mapped for the next one, and large areas are
    asked for in huge pages. Measured on 2 cores with a 135M model: decode steps 8 to 10 % shorter.
    """
    malloc = {"hugetlb": 1, "arena_max": 1, "mmap_threshold": 32 * 2**20, "trim_threshold": 256 * 2**20}
    given = environ.get("GLIBC_TUNABLES", "")
    own = [f"glibc.malloc.{name}={value}" for name, value in malloc.items()]
    waits = {} if environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} else {"GOMP_SPINCOUNT": str(SPINS)}
    return {"GLIBC_TUNABLES": ":".join([*own, *([given] if given else [])])} | waits


def _router(config: LauncherConfig, launch: Launch) -> ProcessSpec:
    flags = config.flags
    argv = (
        *_python("text_generation_router"),
        *("--hostname", config.hostname, "--master-shard-uds-path", f"{launch.uds_path}-0"),
        *_given("--max-input-tokens", config.max_input_tokens),
        *to_argv(flags, ROUTER_FLAGS),
        "--prefix-caching" if config.prefix_caching else "--no-prefix-caching",
        "--fair-shares" if flags.fair_shares is Switch.TRUE else "--no-fair-shares",
        "--json-output",
    )
    env = _base_env(launch)
    # The router faces the internet and needs nothing from the hub.
    for name in HUB_TOKENS:
        env.pop(name, None)
    env.setdefault("COMPUTE_TYPE", config.compute_type)
    if flags.api_key is not None:
        env["API_KEY"] = flags.api_key  # not on argv, where every user of the machine can read it
    return ProcessSpec(role=Role.ROUTER, argv=argv, env=env)


def to_argv(flags: Flags, names: Sequence[str]) -> list[str]:
    """The named fields as command-line flags; None and false are left out, lists repeat their flag."""
    argv: list[str] = []
    for name in names:
        argv += _given("--" + name.replace("_", "-"), getattr(flags, name))
    return argv


def _given(flag: str, value: Any) -> list[str]:
    if value is None or value is False:
        return []
    if value is True:
        return [flag]
    return [word for item in (value if isinstance(value, list) else [value]) for word in (flag, str(item))]


def _python(module: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", module, *arguments)


def _base_env(launch: Launch) -> dict[str, str]:
    return without_flags(launch.environ) | {
        "TGI_LAUNCHER_NONCE": launch.nonce,
        "TGI_INCARNATION": "1",
        "PYTHONUNBUFFERED": "1",
        # `-m` would look for modules in the current folder first, whatever lies there.
        "PYTHONSAFEPATH": "1",
    }


def _hub_env(config: LauncherConfig, launch: Launch) -> dict[str, str]:
    flags = config.flags
    env = {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    token = next((launch.environ[name] for name in HUB_TOKENS if launch.environ.get(name)), None)
    if token is not None:
        env["HF_TOKEN"] = token
    if flags.huggingface_hub_cache is not None:
        env["HUGGINGFACE_HUB_CACHE"] = env["HF_HUB_CACHE"] = flags.huggingface_hub_cache
    if flags.weights_cache_override is not None:
        env["WEIGHTS_CACHE_OVERRIDE"] = flags.weights_cache_override
    return env


def _pinned(shard: ProcessSpec, model: HubModel) -> ProcessSpec:
    argv = _with_revision(shard.argv, model.sha) if model.sha else shard.argv
    env = {**shard.env, "TGI_PIPELINE_TAG": model.pipeline_tag} if model.pipeline_tag else shard.env
    return replace(shard, argv=argv, env=env)


def _with_revision(argv: tuple[str, ...], sha: str) -> tuple[str, ...]:
    if "--revision" not in argv:
        return (*argv, "--revision", sha)
    at = argv.index("--revision") + 1
    return (*argv[:at], sha, *argv[at + 1 :])
