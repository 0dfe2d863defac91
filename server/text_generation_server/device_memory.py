"""How much memory there is to plan with: of this machine's processor or GPU, of a GPU by name, of any size."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from text_generation_server.config import ConfigError

GIB = 2**30

CPU_SHARE = 0.5
"""Part of the memory still free once the weights are loaded that CPU shards plan with; the rest is left to the router,
the page cache of the weights and other programs of the machine."""
CUDA_SHARE = 0.96
"""The same of a GPU, which is ours alone: the allocator rounds sizes up, and leaves gaps. Not measured yet."""
CUDA_CONTEXT_BYTES = 768 * 2**20
"""What the driver's context, the libraries' kernels and their workspaces take beside our tensors. Not measured yet."""
CUDA_WORKSPACE_BYTES = 256 * 2**20
"""The part of it that comes only with the first steps, after the context."""
TOO_LARGE_BYTES = 2**60
"""No device has as much: whoever asks for it has mistyped."""

GPU_GIB = {
    "A10": 22.0, "A10G": 21.9, "A100-40GB": 39.3, "A100-80GB": 79.1, "A30": 23.5, "A40": 44.3, "B200": 178.3,
    "GH200-96GB": 94.5, "H100-80GB": 79.1, "H100-NVL": 93.0, "H200": 139.7, "L4": 21.9, "L40": 44.3, "L40S": 44.3,
    "RTX3090": 23.5, "RTX4090": 23.5, "RTX5090": 31.3, "RTX6000-ADA": 47.3, "RTXA6000": 47.4, "T4": 14.5,
    "V100-16GB": 15.7, "V100-32GB": 31.7,
}  # fmt: skip
"""GiB that programs see on a card, rounded down: less than its name says where error correction takes its part. From
what users' error messages report; cards of one name differ by a few hundred MiB."""

_ALIASES = {"A100": "A100-80GB", "GH200": "GH200-96GB", "H100": "H100-80GB", "H200-141GB": "H200", "V100": "V100-16GB"}
"""A name alone means the card that data centres mostly have; of the V100 the smaller one."""
_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "M": 2**20, "G": GIB, "T": 2**40}
_UNITS |= {"MIB": 2**20, "GIB": GIB, "TIB": 2**40}
_SIZE = re.compile(r"(\d{1,12}(?:\.\d{1,6})?)\s*([KMGT]I?B?)", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """The memory of one device that one shard may plan with."""

    kind: str
    """cpu or cuda."""
    name: str
    """For people."""
    usable_bytes: int
    """What this process may take, its weights included if they are not loaded yet."""
    derivation: str
    """How it came about."""
    fraction: float = 1.0
    """The user's limit, of the whole device."""
    overhead_bytes: int = 0
    """Taken by what is not ours: the driver and the libraries."""
    share: float = 1.0
    """Part that may be planned with of what is left beside overhead and weights."""


def named_device(text: str, *, cuda_memory_fraction: float = 1.0) -> DeviceMemory:
    """A GPU by its name (``H100``) or by its memory (``24GiB``), whatever this machine has.

    Raises: ConfigError.
    """
    key = re.sub(r"^NVIDIA[-_ ]*", "", text.strip().upper())
    key = re.sub(r"[-_ ]+", "-", key).replace("RTX-", "RTX")
    key = _ALIASES.get(key, key)
    total = int(GPU_GIB[key] * GIB) if key in GPU_GIB else _size(text)
    if total is None:
        raise ConfigError(
            f"device `{_shown(text)}` is not known: give `cpu`, a size such as 24GiB, or one of {', '.join(GPU_GIB)}"
        )
    if not 0 < total < TOO_LARGE_BYTES:
        raise ConfigError(f"device `{_shown(text)}` has no sensible size: give one such as 24GiB")
    name = f"{key} ({amount(total)})" if key in GPU_GIB else f"a GPU with {amount(total)}"
    return cuda_device(name, free=total, total=total, fraction=cuda_memory_fraction, overhead_bytes=CUDA_CONTEXT_BYTES)


def _shown(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}..."


def _size(text: str) -> int | None:
    found = _SIZE.fullmatch(text.strip())
    if found is None or found[2].upper() not in _UNITS:
        return None
    return int(float(found[1]) * _UNITS[found[2].upper()])


def cuda_device(
    name: str, *, free: int, total: int, fraction: float, overhead_bytes: int = CUDA_WORKSPACE_BYTES
) -> DeviceMemory:
    """A GPU with ``free`` of ``total`` bytes free. The fraction is of the whole device, as in TGI."""
    usable = max(0, int(free - (1 - fraction) * total))
    derivation = f"{amount(usable)} of {amount(total)} with `--cuda-memory-fraction {fraction:g}`"
    return DeviceMemory(
        kind="cuda",
        name=name,
        usable_bytes=usable,
        derivation=derivation,
        fraction=fraction,
        overhead_bytes=overhead_bytes,
        share=CUDA_SHARE,
    )


def cpu_device(world_size: int = 1, root: Path = Path("/")) -> DeviceMemory:
    """This machine's memory, which all shards share.

    Raises: ConfigError where the system does not say how much is available.
    """
    try:
        available = available_cpu_bytes(root)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the memory of this machine is not known: {error}") from error
    usable = available // world_size
    shared = f", for each of {world_size} shards" if world_size > 1 else ""
    return DeviceMemory(
        kind="cpu",
        name="cpu",
        usable_bytes=usable,
        derivation=f"{amount(usable)} available{shared}",
        share=CPU_SHARE,
    )


def amount(num_bytes: int) -> str:
    """``1.50 GiB``, ``12.0 MiB``, ``96.0 KiB``"""
    if abs(num_bytes) >= GIB // 10:
        return f"{num_bytes / GIB:.2f} GiB"
    return f"{num_bytes / 2**20:.1f} MiB" if abs(num_bytes) >= 2**20 else f"{num_bytes / 2**10:.1f} KiB"


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
