"""The short form of the fuzzer; `make fuzz` sends 100,000 bodies."""

from __future__ import annotations

import pytest
from faults.fuzz import fuzz


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.fault("B1-B7", "5,000 changed bodies of every route", "no 5xx, no restart, no callback above 50 ms")
def test_bodies_that_nobody_would_send(record_property: object) -> None:
    report, wrong = fuzz(5000)
    assert wrong == []
    assert callable(record_property)
    record_property("seen", f"{report['statuses']}, longest callback {report['longest_callback_ms']} ms")
