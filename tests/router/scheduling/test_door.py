from __future__ import annotations

import time

import pytest
from text_generation_router.scheduling.door import PATIENCE_BUSY_S, PATIENCE_IDLE_S, Door


def test_nobody_at_the_door_is_waited_for() -> None:
    left: list[bool] = []
    door = Door(lambda: left.append(True))
    assert door.wait_s(0.0, idle_since=0.0) <= 0
    with door.entering():
        assert not left
    assert left == [True]
    assert door.wait_s(0.0, idle_since=0.0) <= 0


def test_one_who_is_refused_leaves_too() -> None:
    left: list[bool] = []
    door = Door(lambda: left.append(True))
    with pytest.raises(ValueError, match="refused"), door.entering():
        raise ValueError("refused")
    assert left == [True]
    assert door.wait_s(0.0, idle_since=None) <= 0


def test_patience_ends() -> None:
    door = Door(lambda: None)
    with door.entering():
        now = time.perf_counter()
        assert 0 < door.wait_s(now, idle_since=None) <= PATIENCE_BUSY_S
        assert 0 < door.wait_s(now, idle_since=now) <= PATIENCE_IDLE_S
        assert door.wait_s(now, idle_since=now - PATIENCE_IDLE_S) <= 0, "those who wait already are not kept for long"
        assert door.wait_s(now + PATIENCE_IDLE_S, idle_since=now + PATIENCE_IDLE_S) <= 0, "nor by a long text"
        assert door.wait_s(now + PATIENCE_BUSY_S, idle_since=None) <= 0
        with door.entering():
            assert door.wait_s(now + PATIENCE_BUSY_S, idle_since=None) > 0, "the last one to come counts"
