from __future__ import annotations

import os
import subprocess
import sys

from text_generation_proto.lifeline import LIFELINE_FD

CHILD = """
import time
from text_generation_proto.lifeline import hold_lifeline
hold_lifeline()
print("up", flush=True)
time.sleep(60)
"""


def test_a_child_ends_when_the_other_end_is_closed() -> None:
    read_end, write_end = os.pipe()
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD],
        env={**os.environ, LIFELINE_FD: str(read_end)},
        pass_fds=[read_end],
        stdout=subprocess.PIPE,
    )
    os.close(read_end)
    assert child.stdout is not None
    with child.stdout:
        assert child.stdout.readline() == b"up\n"
        assert child.poll() is None
        os.close(write_end)
        assert child.wait(20) == 1


def test_a_process_started_by_hand_needs_no_lifeline() -> None:
    code = "from text_generation_proto.lifeline import hold_lifeline; hold_lifeline()"
    environment = {name: value for name, value in os.environ.items() if name != LIFELINE_FD}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
