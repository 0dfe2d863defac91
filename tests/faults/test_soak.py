"""The short form of the soak; `make soak` is the long one."""

from __future__ import annotations

import pytest
from faults.soak import run


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_minutes_of_everything() -> None:
    assert run(2.0) == []
