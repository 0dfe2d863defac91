from __future__ import annotations

import time

import pytest
from text_generation_router.scheduling.door import LEAD_S, PATIENCE_S, Door


def test_nobody_at_the_door_is_waited_for() -> None:
    left: list[bool] = []
    door = Door(lambda: left.append(True))
    now = time.perf_counter()
    assert door.wait_while_idle(now) <= now
    with door.entering():
        assert not left
    assert left == [True]
    assert door.wait_while_idle(now) <= now
    assert door.wait_while_busy(now + 1) <= now


def test_one_who_is_refused_leaves_too() -> None:
    left: list[bool] = []
    door = Door(lambda: left.append(True))
    with pytest.raises(ValueError, match="refused"), door.entering():
        raise ValueError("refused")
    assert left == [True]
    assert door.wait_while_idle(time.perf_counter()) == 0


def test_patience_ends() -> None:
    door = Door(lambda: None)
    before = time.perf_counter()
    with door.entering():
        now = time.perf_counter()
        assert door.wait_while_idle(before) == before + PATIENCE_S
        assert before + PATIENCE_S <= door.wait_while_idle(now + 1) <= now + PATIENCE_S, "a long text is not waited for"
        with door.entering():
            assert door.wait_while_idle(now + 1) >= now + PATIENCE_S, "the last one to come counts"


def test_behind_a_step_there_is_time_until_it_ends() -> None:
    door = Door(lambda: None)
    with door.entering():
        assert door.wait_while_busy(5.0) == 5.0 - LEAD_S
