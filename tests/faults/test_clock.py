"""F20: the time of day jumps. Durations are read from a clock that does not."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from faults.ledger import ledger
from integration.asking import body, wait_until_idle
from integration.launched import ONE_THREAD, serving

pytestmark = pytest.mark.slow  # `make test-faults`
Record = Callable[[str, object], None]

HOUR_S = 3600


@pytest.mark.fault("F20", "the clock jumps on by an hour, and back by two", "nothing fails, no duration is wrong")
async def test_the_time_of_day_jumps(long_llama: Path, tmp_path: Path, record_property: Record) -> None:
    clock = tmp_path / "clock"
    fresh = clock.with_suffix(".new")
    clock.write_text("0")
    environ = {
        **ONE_THREAD,
        "PYTHONPATH": str(Path(__file__).with_name("jumping_clock")),
        "CLOCK_OFFSET": str(clock),
    }
    began = time.monotonic()
    with serving("--model-id", str(long_llama), "--stall-timeout", "5", environ=environ) as server:
        for jump_s in (HOUR_S, -HOUR_S):
            async with ledger(server) as books:
                for number in range(8):
                    books.send(body(f"stream {number}", max_new_tokens=600), stream=number % 2 == 0)
                await books.begun()
                fresh.write_text(str(jump_s))
                fresh.replace(clock)  # who reads it finds a whole number
                await books.ended()
            assert books.ends == {"ok": 8}
            answer = server.client.post("/v1/completions", json={"prompt": "what time is it", "max_tokens": 1}).json()
            assert answer["created"] - time.time() == pytest.approx(jump_s, abs=60), "the clock has not jumped"
        values = wait_until_idle(server)
        spent = {name: value for name, value in values.items() if "duration_sum" in name}
        assert len(spent) > 5
        # Sixteen requests at once have spent no more than sixteen times what has gone by.
        assert all(0 <= value < 16 * (time.monotonic() - began) for value in spent.values()), spent
        assert values["tgi_request_replay_count"] == 0
        record_property("seen", f"{books.ends} twice")
