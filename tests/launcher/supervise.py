"""A launcher of fake children, as a program: JSON lists of actions for the download, the shards and the router."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path

from text_generation_launcher.errors import LauncherError
from text_generation_launcher.flags import Flags
from text_generation_launcher.launch import open_sink
from text_generation_launcher.plan import Plan, ProcessSpec, Role
from text_generation_launcher.process import Seconds
from text_generation_launcher.supervisor import LOADING_SILENCE_S, SETTLE_S, Supervisor

FAKE_CHILD = str(Path(__file__).with_name("fake_child.py"))


def fake(role: Role, actions: list[str], rank: int = 0) -> ProcessSpec:
    return ProcessSpec(role=role, argv=(sys.executable, FAKE_CHILD, *actions), env=dict(os.environ), rank=rank)


def fake_plan(shards: list[list[str]], router: list[str], download: list[str] | None = None) -> Plan:
    return Plan(
        download=None if download is None else fake(Role.DOWNLOAD, download),
        shards=tuple(fake(Role.SHARD, actions, rank) for rank, actions in enumerate(shards)),
        router=fake(Role.ROUTER, router),
    )


def supervise(
    plan: Plan,
    *,
    grace_s: float = 5.0,
    settle_s: float = SETTLE_S,
    until: str | None = None,
    max_shard_restarts: int = 0,
    stall_timeout_s: float = 60.0,
    loading_silence_s: float = LOADING_SILENCE_S,
) -> int:
    """``until``: with everything over but the cleaning up, wait for this file."""
    sink = open_sink(Flags(json_output=True), os.environ)

    def on_ready(seconds: Seconds) -> None:
        sink.info("READY", None, **seconds)

    try:
        supervisor = Supervisor(
            plan,
            sink,
            grace_s=grace_s,
            max_shard_restarts=max_shard_restarts,
            stall_timeout_s=stall_timeout_s,
            loading_silence_s=loading_silence_s,
            settle_s=settle_s,
            on_ready=on_ready,
        )
        code = asyncio.run(supervisor.run())
    except LauncherError as error:
        sink.error(str(error), error=error.name)
        code = error.exit_code
    if until is not None:
        sink.info("OVER")
        while not Path(until).exists():
            time.sleep(0.01)
    if not sink.close():
        os._exit(code)
    return code


if __name__ == "__main__":
    # The launcher leaves a signal alone that it was started with as ignored; whoever runs the tests may ignore some.
    for asking in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(asking, signal.SIG_DFL)
    wanted = json.loads(sys.argv[1])
    options = {name: wanted.pop(name) for name in wanted.keys() - {"shards", "router", "download"}}
    sys.exit(supervise(fake_plan(**wanted), **options))
