from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_generation_server.attention.torch_paged import SCRATCH_BYTES
from text_generation_server.engine import memory
from text_generation_server.engine.memory import (
    DoesNotFit,
    KVPlan,
    ModelShape,
    WarmupLimits,
    available_cpu_bytes,
    plan_kv_blocks,
)

KIB, GIB = 2**10, 2**30
SHAPE = ModelShape(
    kv_bytes_per_token=KIB, vocab_size=1000, hidden_size=64, intermediate_size=128, max_position_embeddings=4096
)


def plan(limits: WarmupLimits, cache_bytes: int = GIB) -> KVPlan:
    """With ``cache_bytes`` beside what the largest step needs."""
    available_bytes = memory._largest_step_bytes(limits, SHAPE, 0) + cache_bytes
    return plan_kv_blocks(limits, SHAPE, block_size=16, available_bytes=available_bytes, available="1 GiB")


@pytest.mark.parametrize(
    ("limits", "cache_bytes", "num_blocks"),
    [
        pytest.param(WarmupLimits(), 100 * 16 * KIB, 99, id="all that fit, but for the padding block"),
        pytest.param(WarmupLimits(max_batch_total_tokens=161), GIB, 11, id="exactly as many as asked, rounded up"),
        pytest.param(
            WarmupLimits(max_concurrent_requests=3, max_total_tokens=17), GIB, 6, id="each request takes whole blocks"
        ),
        pytest.param(WarmupLimits(max_concurrent_requests=2), GIB, 512, id="unset, a request may use all positions"),
        pytest.param(
            WarmupLimits(max_concurrent_requests=1000, max_total_tokens=64), 40 * 16 * KIB, 39, id="what fits is less"
        ),
    ],
)
def test_the_number_of_blocks(limits: WarmupLimits, cache_bytes: int, num_blocks: int) -> None:
    made = plan(limits, cache_bytes)
    assert made.num_blocks == num_blocks
    assert made.derivation.startswith(f"{num_blocks * 16 / 1024:.1f} MiB: ")


@pytest.mark.parametrize(
    ("limits", "flags"),
    [
        (WarmupLimits(max_batch_total_tokens=1600), ["`--max-batch-total-tokens 1600`", "144 or less"]),
        (WarmupLimits(max_total_tokens=200), ["`--max-total-tokens 200`", "144 or less"]),
    ],
)
def test_too_little_memory_names_the_flag_and_the_numbers(limits: WarmupLimits, flags: list[str]) -> None:
    with pytest.raises(DoesNotFit) as error:
        plan(limits, 10 * 16 * KIB)
    assert all(text in str(error.value) for text in flags)


def test_no_room_at_all_names_the_prefill() -> None:
    with pytest.raises(DoesNotFit, match="--max-batch-prefill-tokens"):
        plan(WarmupLimits(), 1000)


def test_the_largest_step_is_reserved_first() -> None:
    def blocks(prefill_tokens: int, logprobs_rows: int = 0) -> int:
        limits = WarmupLimits(max_batch_prefill_tokens=prefill_tokens)
        return plan_kv_blocks(
            limits,
            SHAPE,
            block_size=16,
            available_bytes=GIB,
            available="",
            prefill_logprobs_rows=logprobs_rows,
        ).num_blocks

    assert blocks(8192) < blocks(1024)
    assert blocks(1024, 256) < blocks(1024)


def test_what_attention_holds_is_reserved_too() -> None:
    few = WarmupLimits(max_batch_prefill_tokens=1, max_concurrent_requests=1)
    with pytest.raises(DoesNotFit):
        plan_kv_blocks(few, SHAPE, block_size=16, available_bytes=SCRATCH_BYTES, available="")


@given(
    total=st.integers(0, 10_000),
    requests=st.integers(0, 100),
    each=st.integers(0, 3000),
    cache_bytes=st.integers(-(2**22), 2**26),
)
def test_a_plan_fits_or_is_refused(total: int, requests: int, each: int, cache_bytes: int) -> None:
    limits = WarmupLimits(max_batch_total_tokens=total, max_concurrent_requests=requests, max_total_tokens=each)
    try:
        made = plan(limits, cache_bytes)
    except DoesNotFit:
        return
    assert (made.num_blocks + 1) * 16 * KIB <= cache_bytes
    assert made.num_blocks * 16 >= max(total, 1)


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
