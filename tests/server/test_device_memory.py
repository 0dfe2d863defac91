"""Readings of this machine, and devices by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from text_generation_server.config import ConfigError
from text_generation_server.device_memory import (
    CPU_SHARE,
    CUDA_CONTEXT_BYTES,
    GIB,
    GPU_GIB,
    amount,
    available_cpu_bytes,
    cpu_device,
    cuda_device,
    named_device,
)

KIB = 2**10


@pytest.mark.parametrize(
    ("text", "gib"),
    [
        ("24GiB", 24),
        (" 24 gib ", 24),
        ("24G", 24),
        ("0.5TiB", 512),
        ("24GB", 24e9 / GIB),
        ("512MiB", 0.5),
        ("H100", 79.1),
        ("h100-80gb", 79.1),
        ("NVIDIA L4", 21.9),
        ("RTX 4090", 23.5),
        ("a100", 79.1),
        ("A100-40GB", 39.3),
        ("H200-141GB", 139.7),
    ],
)
def test_a_gpu_by_name_or_size(text: str, gib: float) -> None:
    device = named_device(text)
    assert device.usable_bytes == pytest.approx(gib * GIB, abs=1)
    assert (device.kind, device.overhead_bytes) == ("cuda", CUDA_CONTEXT_BYTES)
    assert amount(device.usable_bytes) in device.name


@pytest.mark.parametrize(
    "text", ["H99", "", "24", "-24GiB", "24 apples", "GiB", "24KiB", "nan GiB", "1e9GiB", "9" * 500]
)
def test_an_unknown_gpu_is_refused_with_all_that_are_known(text: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        named_device(text)
    assert all(name in str(refusal.value) for name in GPU_GIB)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 500


@pytest.mark.parametrize("text", ["0GiB", "999999999999TiB"])
def test_a_size_that_no_device_has(text: str) -> None:
    with pytest.raises(ConfigError, match="has no sensible size"):
        named_device(text)


def test_the_fraction_is_of_the_whole_device_as_in_tgi() -> None:
    device = cuda_device("gpu", free=20 * GIB, total=24 * GIB, fraction=0.75)
    assert device.usable_bytes == 14 * GIB
    assert device.derivation == "14.00 GiB of 24.00 GiB with `--cuda-memory-fraction 0.75`"
    assert cuda_device("gpu", free=5 * GIB, total=24 * GIB, fraction=0.5).usable_bytes == 0


def test_shards_share_a_processors_memory(tmp_path: Path) -> None:
    root = system(tmp_path, {})
    alone, one_of_two = cpu_device(1, root), cpu_device(2, root)
    assert alone.usable_bytes == 2 * one_of_two.usable_bytes == 4000 * KIB
    assert alone.share == CPU_SHARE
    assert one_of_two.derivation == "2.0 MiB available, for each of 2 shards"


def test_a_system_that_does_not_say_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the memory of this machine is not known"):
        cpu_device(1, tmp_path)


@pytest.mark.parametrize(
    ("size", "text"), [(3 * GIB // 2, "1.50 GiB"), (12 * 2**20, "12.0 MiB"), (96 * KIB, "96.0 KiB")]
)
def test_amounts(size: int, text: str) -> None:
    assert amount(size) == text


def system(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    4000 kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V2 = {"proc/self/cgroup": "0::/pod/container\n", "sys/fs/cgroup/pod/container/memory.max": "max\n"}


@pytest.mark.parametrize(
    ("files", "available"),
    [
        pytest.param({}, 4000 * KIB, id="without cgroups"),
        pytest.param(V2, 4000 * KIB, id="a cgroup without a limit"),
        pytest.param(
            {
                **V2,
                "sys/fs/cgroup/pod/memory.max": "3000000\n",
                "sys/fs/cgroup/pod/memory.current": "2000000\n",
                "sys/fs/cgroup/pod/memory.stat": "anon 5\ninactive_file 500000\n",
            },
            1_500_000,
            id="a limit higher up, where the page cache can be given back",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "0::/on/the/host\n",
                "sys/fs/cgroup/memory.max": "900000\n",
                "sys/fs/cgroup/memory.current": "1000000\n",
            },
            0,
            id="a container that sees only its own group, full",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "5:cpu,memory:/docker/x\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "2000000\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "500000\n",
            },
            1_500_000,
            id="version 1",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "5:memory:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "500000\n",
            },
            4000 * KIB,
            id="version 1 without a limit",
        ),
    ],
)
def test_available_memory(tmp_path: Path, files: dict[str, str], available: int) -> None:
    assert available_cpu_bytes(system(tmp_path, files)) == available
