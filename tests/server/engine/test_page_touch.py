from __future__ import annotations

import ctypes
import mmap
import platform
import time

import pytest
import torch
from text_generation_server.engine import page_touch
from text_generation_server.engine.page_touch import PIECE_BYTES, PageTouch
from torch import Tensor

pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="Linux alone is asked for pages ahead")

WIDTH = 64
SLOTS = 16 * PIECE_BYTES // WIDTH
"""A head is 16 pieces."""


def untouched(num_heads: int) -> Tensor:
    memory = mmap.mmap(-1, num_heads * SLOTS * WIDTH, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.uint8).view(num_heads, SLOTS, WIDTH)


def resident_bytes(tensor: Tensor) -> int:
    """Of the tensor alone: its mapping may be one with memory beside it."""
    num_pages = tensor.nbytes // mmap.PAGESIZE
    states = (ctypes.c_ubyte * num_pages)()
    failed = ctypes.CDLL(None, use_errno=True).mincore(
        ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes), states
    )
    assert failed == 0, ctypes.get_errno()
    return sum(state & 1 for state in states) * mmap.PAGESIZE


def wait_for(tensor: Tensor, num_bytes: int) -> int:
    deadline = time.monotonic() + 60
    while (resident := resident_bytes(tensor)) < num_bytes and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)  # it would go on now
    assert resident >= num_bytes
    return resident_bytes(tensor)


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_touch, "LEAST_BYTES", 0)
    monkeypatch.setattr(page_touch, "SOON_BYTES", 4 * PIECE_BYTES)
    monkeypatch.setattr(page_touch, "AHEAD_BYTES", 8 * PIECE_BYTES)


SLACK = 6 * PIECE_BYTES
"""Pieces begin where huge pages need not."""


def test_pages_come_ahead_of_the_slots_in_use_and_content_stays() -> None:
    tensor = untouched(4)
    tensor[2, 0, :5] = torch.arange(5, dtype=torch.uint8)
    touch = PageTouch([tensor[:2], tensor[2:]])
    assert wait_for(tensor, 8 * PIECE_BYTES) <= 8 * PIECE_BYTES + SLACK
    for slot in (SLOTS // 2, 0):
        with touch.step(slot):
            pass
    assert wait_for(tensor, 40 * PIECE_BYTES) <= 40 * PIECE_BYTES + SLACK
    with touch.step(SLOTS - 1):
        pass
    wait_for(tensor, 64 * PIECE_BYTES)
    touch.stop()
    touch.stop()
    assert tensor[2, 0, :6].tolist() == [0, 1, 2, 3, 4, 0]
    assert int(tensor[:2].sum()) == 0


def test_beside_a_step_only_what_is_needed_soon_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_touch, "IDLE_S", 0.05)
    tensor = untouched(4)
    touch = PageTouch([tensor])
    with touch.step(SLOTS // 2):
        assert wait_for(tensor, 36 * PIECE_BYTES) <= 36 * PIECE_BYTES + SLACK
        time.sleep(4 * page_touch.IDLE_S)
        assert resident_bytes(tensor) <= 36 * PIECE_BYTES + SLACK
    wait_for(tensor, 40 * PIECE_BYTES)
    touch.stop()


def test_it_ends_while_it_waits() -> None:
    tensor = untouched(1)
    touch = PageTouch([tensor])
    wait_for(tensor, PIECE_BYTES)
    touch.stop()


def test_a_small_cache_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_touch, "LEAST_BYTES", 2**30)
    tensor = untouched(1)
    touch = PageTouch([tensor])
    with touch.step(SLOTS - 1):
        time.sleep(0.1)
    assert resident_bytes(tensor) < PIECE_BYTES
    touch.stop()
