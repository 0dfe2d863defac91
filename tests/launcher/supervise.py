"""A launcher of fake children, as a program: JSON lists of actions for the download, the shards and the router."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

from text_generation_launcher.errors import LauncherError
from text_generation_launcher.flags import Flags
from text_generation_launcher.launch import open_sink
from text_generation_launcher.plan import Plan, ProcessSpec, Role
from text_generation_launcher.process import Seconds
from text_generation_launcher.supervisor import Supervisor

FAKE_CHILD = str(Path(__file__).with_name("fake_child.py"))


def fake(role: Role, actions: list[str], rank: int = 0) -> ProcessSpec:
    return ProcessSpec(role=role, argv=(sys.executable, FAKE_CHILD, *actions), env=dict(os.environ), rank=rank)


def fake_plan(shards: list[list[str]], router: list[str], download: list[str] | None = None) -> Plan:
    return Plan(
        download=None if download is None else fake(Role.DOWNLOAD, download),
        shards=tuple(fake(Role.SHARD, actions, rank) for rank, actions in enumerate(shards)),
        router=fake(Role.ROUTER, router),
    )


def supervise(plan: Plan, grace_s: float) -> int:
    sink = open_sink(Flags(json_output=True), os.environ)

    def ready(seconds: Seconds) -> None:
        sink.info("READY", None, **seconds)

    try:
        supervisor = Supervisor(
            plan, sink, grace_s=grace_s, on_ready=lambda seconds: sink.info("READY", None, **seconds)
        )
        code = asyncio.run(supervisor.run())
    except LauncherError as error:
        sink.error(str(error), error=error.name)
        code = error.exit_code
    if not sink.close():
        os._exit(code)
    return code


if __name__ == "__main__":
    # The launcher leaves a signal alone that it was started with as ignored; whoever runs the tests may ignore some.
    for asking in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(asking, signal.SIG_DFL)
    wanted = json.loads(sys.argv[1])
    grace_s = wanted.pop("grace_s", 5.0)
    sys.exit(supervise(fake_plan(**wanted), grace_s))
