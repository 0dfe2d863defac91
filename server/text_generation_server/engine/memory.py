"""How many KV blocks fit: one pure plan, and the readings it starts from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from text_generation_server.attention.torch_paged import SCRATCH_BYTES

CPU_SHARE = 0.5
"""Part of the memory still free after the weights are loaded that a CPU shard may plan with; the rest is left to the
router, the page cache of the weights and other programs of the machine."""

_GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmupLimits:
    """The limits resolved so far; 0 means that what fits decides."""

    max_batch_prefill_tokens: int = 0
    max_batch_total_tokens: int = 0
    max_batch_size: int = 0
    max_total_tokens: int = 0
    max_concurrent_requests: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What the largest step costs beside the cache."""

    kv_bytes_per_token: int
    """On this rank. The other sizes are the whole model's: of a rank that holds a slice they ask too much."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    max_position_embeddings: int
    """0: unbounded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVPlan:
    num_blocks: int
    derivation: str
    """Their size, and which limit decided: for the log."""


class DoesNotFit(ValueError):
    """The limits need more memory than there is; the text has the numbers and the flag that would help."""


def plan_kv_blocks(
    limits: WarmupLimits,
    shape: ModelShape,
    *,
    block_size: int,
    available_bytes: int,
    available: str,
    prefill_logprobs_rows: int = 0,
) -> KVPlan:
    """Blocks for the given limits within ``available_bytes``, which ``available`` describes for the log.

    With ``max_batch_total_tokens`` it is exactly as many as that takes; otherwise as many as fit, but no more than all
    requests together can use.
    Raises: DoesNotFit.
    """
    reserved = _largest_step_bytes(limits, shape, prefill_logprobs_rows)
    block_bytes = block_size * shape.kv_bytes_per_token
    # Block 0 is allocated as well, and never handed out.
    fitting = (available_bytes - reserved) // block_bytes - 1
    budget = f"{available}, of which {_gib(reserved)} for the largest step of {_prefill_tokens(limits)} tokens"
    sequence_tokens = limits.max_total_tokens or shape.max_position_embeddings
    least = _blocks(max(limits.max_total_tokens, 1), block_size)
    if limits.max_batch_total_tokens:
        wanted = _blocks(limits.max_batch_total_tokens, block_size)
        if wanted > fitting:
            raise DoesNotFit(
                f"`--max-batch-total-tokens {limits.max_batch_total_tokens}` needs {_gib(wanted * block_bytes)} of KV "
                f"cache, {_room(fitting, block_bytes)} fit ({budget}); decrease `--max-batch-total-tokens` to "
                f"{max(0, fitting * block_size)} or less, or `--max-batch-prefill-tokens`"
            )
        num_blocks, why = wanted, "as `--max-batch-total-tokens` asks"
    else:
        num_blocks, why = fitting, "all that fit"
        if limits.max_concurrent_requests and sequence_tokens:
            usable = limits.max_concurrent_requests * _blocks(sequence_tokens, block_size)
            if usable <= fitting:
                num_blocks = usable
                why = f"all that {limits.max_concurrent_requests} requests of {sequence_tokens} tokens can use"
    if num_blocks < least:
        if limits.max_total_tokens:
            raise DoesNotFit(
                f"one request of `--max-total-tokens {limits.max_total_tokens}` needs {_gib(least * block_bytes)} of "
                f"KV cache, {_room(fitting, block_bytes)} fit ({budget}); decrease `--max-total-tokens` to "
                f"{max(0, num_blocks * block_size)} or less, or `--max-batch-prefill-tokens`"
            )
        raise DoesNotFit(f"not one block of KV cache fits ({budget}); decrease `--max-batch-prefill-tokens`")
    derivation = f"{_gib(num_blocks * block_bytes)}: {why}; {max(0, fitting)} fit into {budget}"
    return KVPlan(num_blocks=num_blocks, derivation=derivation)


def _prefill_tokens(limits: WarmupLimits) -> int:
    return limits.max_batch_prefill_tokens or 4096


def _largest_step_bytes(limits: WarmupLimits, shape: ModelShape, prefill_logprobs_rows: int) -> int:
    """Activations, attention's scratch and logits of a step with the largest prefill and a full batch, as float32.

    At one time a layer holds the residual stream, the norm's result, queries, keys, values and the attention's result
    (8 hidden sizes, generously), then gate, up, their product and a copy (4 intermediate sizes). Sampling holds the
    logits, their exponentials and what the filters make of them in float64: 10 times the logits.
    """
    tokens = _prefill_tokens(limits)
    activations = tokens * (8 * shape.hidden_size + 4 * shape.intermediate_size) * 4
    rows = min(limits.max_batch_size or limits.max_concurrent_requests or 128, limits.max_concurrent_requests or 2**31)
    logits = (rows + prefill_logprobs_rows) * shape.vocab_size * 4 * 10
    return activations + SCRATCH_BYTES + logits


def _blocks(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)


def _room(blocks: int, block_bytes: int) -> str:
    return f"{max(0, blocks)} blocks ({_gib(max(0, blocks) * block_bytes)})"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.2f} GiB" if num_bytes >= _GIB // 10 else f"{num_bytes / 2**20:.1f} MiB"


def available_cpu_bytes(root: Path = Path("/")) -> int:
    """Memory that this process may still take: what the machine has available, or less where a cgroup sets a limit.

    ``root`` stands for ``/`` in tests. Raises: OSError, ValueError where the system does not say.
    """
    available = _machine_available_bytes(root)
    for limit in (_cgroup2_left(root), _cgroup1_left(root)):
        if limit is not None:
            available = min(available, max(0, limit))
    return available


def _machine_available_bytes(root: Path) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    raise ValueError("/proc/meminfo has no MemAvailable")


def _cgroup2_left(root: Path) -> int | None:
    """The least that any level of the unified hierarchy above this process leaves."""
    path = _cgroup_path(root, "")
    if path is None:
        return None
    left: list[int] = []
    base = root / "sys/fs/cgroup"
    for folder in _levels(base, path):
        limit, used = _number(folder / "memory.max"), _number(folder / "memory.current")
        if limit is not None and used is not None:
            left.append(limit - used + _statistic(folder / "memory.stat", "inactive_file"))
    return min(left, default=None)


def _cgroup1_left(root: Path) -> int | None:
    path = _cgroup_path(root, "memory")
    if path is None:
        return None
    left: list[int] = []
    base = root / "sys/fs/cgroup/memory"
    for folder in _levels(base, path):
        limit, used = _number(folder / "memory.limit_in_bytes"), _number(folder / "memory.usage_in_bytes")
        # "No limit" is the largest page-aligned number of this interface.
        if limit is not None and used is not None and limit < 2**62:
            left.append(limit - used + _statistic(folder / "memory.stat", "total_inactive_file"))
    return min(left, default=None)


def _cgroup_path(root: Path, controller: str) -> str | None:
    """This process's path in the hierarchy of ``controller``; the unified one is named by the empty string."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path
    return None


def _levels(base: Path, path: str) -> list[Path]:
    """The folders from the process's own group up to the root of the hierarchy, where they are visible.

    Inside a container the path may be the host's: then only the root is there, and it is the container's own group.
    """
    parts = [part for part in path.split("/") if part]
    return [base.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None  # "max", or no such file


def _statistic(file: Path, name: str) -> int:
    try:
        for line in file.read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    except (OSError, ValueError):
        pass
    return 0
