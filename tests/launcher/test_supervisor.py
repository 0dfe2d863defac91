"""The launcher's life cycle with real processes: who is started, watched, stopped, and in which order."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

Start = Callable[..., Any]

SERVE = ["ready", "sleep=600"]


def test_it_is_ready_when_the_router_and_all_shards_are(run: Start) -> None:
    started = run(
        shards=[["ready=load", "sleep=600"], ["ready=import", "sleep=600"]], router=["ready=connect", "sleep=600"]
    )
    line = started.wait_for("READY")
    assert {"load", "import", "connect", "total"} <= line["fields"].keys()
    assert sum(message.startswith("Shard ready in") for message in started.messages) == 2
    started.signal(signal.SIGTERM)
    assert started.end() == 0


@pytest.mark.parametrize(
    ("actions", "reason"),
    [
        pytest.param(["error=no such dtype", "exit=1"], "no such dtype", id="its own error line"),
        pytest.param(["error=first", "error=last", "exit=1"], "last", id="the last of its error lines"),
        pytest.param(["raw=Traceback", "raw=ImportError: x", "exit=1"], "ImportError: x", id="a line that is no JSON"),
        pytest.param(["exit=3"], "exit code 3", id="nothing said"),
        pytest.param(["exit=0"], "exit code 0", id="an end without an error"),
        pytest.param(["die=11"], "killed by signal 11", id="a signal"),
        pytest.param(["die=9"], "killed by signal 9; often it is the system that has run out of memory", id="SIGKILL"),
    ],
)
def test_a_shard_that_dies_while_loading_ends_everything(run: Start, actions: list[str], reason: str) -> None:
    started = run(shards=[SERVE, actions], router=["sleep=600"])
    assert started.end() == 1
    assert started.last_error == f"Shard 1 failed to start: {reason}"
    assert started.lines[-1]["fields"]["error"] == "ShardCannotStart"


def test_a_death_by_signal_and_raw_output_are_told_in_tgis_words(run: Start) -> None:
    started = run(shards=[["raw=Fatal Python error", "die=6"]], router=["sleep=600"])
    assert started.end() == 1
    assert "Shard complete standard error output:\nFatal Python error" in started.messages
    assert "Shard process was signaled to shutdown with signal 6" in started.messages


@pytest.mark.parametrize("actions", [["exit=0"], ["error=CUDA error", "exit=1"], ["die=9"]])
def test_a_shard_that_dies_at_run_time_ends_everything(run: Start, actions: list[str], tmp_path: Path) -> None:
    go = tmp_path / "go"
    started = run(shards=[["ready", f"until={go}", *actions], SERVE], router=SERVE)
    started.wait_for("READY")
    go.touch()
    assert started.end() == 1
    assert started.last_error.startswith("Shard 0 crashed: ")
    assert started.lines[-1]["fields"]["error"] == "ShardFailed"


def test_shards_that_die_are_started_again_and_the_router_stays(run: Start, process: Any, tmp_path: Path) -> None:
    go, peer, router = (tmp_path / name for name in ("go", "peer", "router"))
    environments = tmp_path / "environment"
    started = run(
        shards=[["ready", "first=1", f"until={go}", "die=9"], [f"pid={peer}", f"environment={environments}", *SERVE]],
        router=[f"pid={router}", *SERVE],
        max_shard_restarts=1,
    )
    started.wait_for("READY")
    first_peer = process.pid_in(peer)
    go.touch()
    line = started.wait_for("Restarting the shards")
    assert line["level"] == "ERROR"
    assert line["fields"]["message"].startswith("Shard 0 crashed: killed by signal 9; ")
    assert line["fields"]["message"].endswith(". Restarting the shards, 1 of 1 times")
    started.wait_for("The shards are back after")
    # The whole group: the others would wait for the dead one for ever.
    assert process.ends_within(first_peer, 2.0)
    assert process.pid_in(peer) != first_peer
    assert "TGI_INCARNATION=2" in environments.read_text().split("\n")
    assert psutil.pid_exists(process.pid_in(router))
    started.signal(signal.SIGTERM)
    assert started.end() == 0


def test_shards_that_keep_dying_are_given_up(run: Start, tmp_path: Path) -> None:
    go = tmp_path / "go"
    started = run(shards=[["ready", f"until={go}", "sleep=0.2", "exit=1"]], router=SERVE, max_shard_restarts=2)
    started.wait_for("READY")
    go.touch()
    assert started.end(timeout=60) == 1
    assert sum("Restarting the shards" in message for message in started.messages) == 2
    assert started.last_error == "Shard 0 crashed: exit code 1 (2 restarts in the last 10 minutes)"


def test_a_restart_that_fails_counts(run: Start, tmp_path: Path) -> None:
    go = tmp_path / "go"
    actions = ["ready", f"until={go}", "error=no room", "exit=1"]
    started = run(shards=[actions], router=SERVE, max_shard_restarts=3)
    started.wait_for("READY")
    go.touch()
    assert started.end(timeout=60) == 1
    assert sum("Restarting the shards" in message for message in started.messages) == 3


@pytest.mark.parametrize("restarts", [0, 1])
def test_shards_of_which_the_router_says_that_they_hang(run: Start, restarts: int, tmp_path: Path) -> None:
    go = tmp_path / "go"
    started = run(
        shards=[["stacks", "never-ends", *SERVE]],
        router=["ready", f"until={go}", "lost=1", "sleep=600"],
        max_shard_restarts=restarts,
        settle_s=0.1,
    )
    started.wait_for("READY")
    go.touch()
    if restarts:
        started.wait_for("The shards are back after")
        started.signal(signal.SIGTERM)
    assert started.end() == (0 if restarts else 1)
    assert any("Shards are lost: a shard hangs" in message for message in started.messages)
    # Where they were is in the log, before they were killed.
    assert any("fake_child.py" in message and "in perform" in message for message in started.messages)


def test_what_the_router_says_of_shards_that_are_gone_already_counts_for_nothing(run: Start, tmp_path: Path) -> None:
    go, die = tmp_path / "go", tmp_path / "die"
    started = run(
        shards=[["ready", "first=1", f"until={die}", "die=9"]],
        router=["ready", f"until={go}", "lost=1", "info=said", "sleep=600"],
        max_shard_restarts=3,
    )
    started.wait_for("READY")
    die.touch()
    started.wait_for("The shards are back after")
    go.touch()
    started.wait_for("said")
    time.sleep(0.5)
    started.signal(signal.SIGTERM)
    assert started.end() == 0
    assert sum("Restarting the shards" in message for message in started.messages) == 1


def test_a_shard_that_hangs_while_it_is_started_again(run: Start, tmp_path: Path) -> None:
    go = tmp_path / "go"
    started = run(
        shards=[["hangs=2", "ready", "first=1", f"until={go}", "die=9"]],
        router=SERVE,
        max_shard_restarts=2,
        loading_silence_s=1.0,
    )
    started.wait_for("READY")
    go.touch()
    line = started.wait_for("Restarting the shards, 2 of 2 times")
    assert line["fields"]["message"].startswith("Shard 0 hangs: it loads, and said nothing for ")
    started.wait_for("The shards are back after")
    started.signal(signal.SIGTERM)
    assert started.end() == 0


@pytest.mark.parametrize("stall_timeout_s", [0.0, 600.0])
def test_shards_that_the_router_never_heard_of_are_given_time_to_answer(
    run: Start, stall_timeout_s: float, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    started = run(
        shards=[SERVE],
        router=["ready", f"until={go}", "lost=0", "info=said", "sleep=600"],
        max_shard_restarts=1,
        stall_timeout_s=stall_timeout_s,
    )
    started.wait_for("READY")
    go.touch()
    started.wait_for("said" if stall_timeout_s > 1 else "The shards are back after")
    time.sleep(0.5)
    started.signal(signal.SIGTERM)
    assert started.end() == 0
    restarts = sum("Restarting the shards" in message for message in started.messages)
    assert restarts == (stall_timeout_s < 1)


def test_a_router_that_dies_while_shards_are_restarted(run: Start, tmp_path: Path) -> None:
    go, router = tmp_path / "go", tmp_path / "router"
    started = run(
        shards=[["first=1", "ready", f"until={go}", "die=9"]],
        router=["ready", f"until={router}", "error=a defect", "exit=1"],
        max_shard_restarts=3,
    )
    started.wait_for("READY")
    go.touch()
    started.wait_for("Restarting the shards")
    router.touch()
    assert started.end() == 1
    assert started.last_error == "Webserver Crashed: a defect"


def test_a_signal_while_shards_are_restarted(run: Start, tmp_path: Path) -> None:
    go = tmp_path / "go"
    started = run(shards=[["first=1", "ready", f"until={go}", "die=9"]], router=SERVE, max_shard_restarts=3)
    started.wait_for("READY")
    go.touch()
    started.wait_for("Restarting the shards")
    started.signal(signal.SIGTERM)
    assert started.end() == 0


def test_shards_that_die_while_the_router_drains_are_started_again(run: Start, tmp_path: Path) -> None:
    """Its last requests need them."""
    die, go = tmp_path / "die", tmp_path / "go"
    started = run(
        shards=[["ready", "first=1", f"until={die}", "die=9"]],
        router=[f"last-words={go}", *SERVE],
        max_shard_restarts=1,
    )
    started.wait_for("READY")
    started.signal(signal.SIGTERM)
    started.wait_for("asked to end")
    die.touch()
    started.wait_for("The shards are back after")
    go.touch()
    assert started.end() == 0
    assert "last words" in started.messages
    assert "shard terminated" in started.messages


def test_what_asks_all_processes_at_once_to_end_has_asked_the_shards_too(
    run: Start, process: Any, tmp_path: Path
) -> None:
    die, go, told = (tmp_path / name for name in ("die", "go", "told"))
    started = run(
        shards=[["ready", f"until={die}", "exit=0"]],
        router=[f"told={told}", f"last-words={go}", *SERVE],
        max_shard_restarts=3,
    )
    started.wait_for("READY")
    started.signal(signal.SIGTERM)
    started.wait_for("asked to end")
    die.touch()
    assert process.text_in(told, timeout_s=60), "the router is told"
    go.touch()
    assert started.end() == 0
    assert not [message for message in started.messages if "Restarting" in message]


@pytest.mark.parametrize("drains", [False, True])
def test_a_router_is_told_of_shards_that_are_not_started_again(
    run: Start, process: Any, drains: bool, tmp_path: Path
) -> None:
    die, go, told = (tmp_path / name for name in ("die", "go", "told"))
    started = run(
        shards=[["ready", f"until={die}", "die=9"]], router=[f"told={told}", f"last-words={go}", *SERVE], grace_s=600
    )
    started.wait_for("READY")
    if drains:
        started.signal(signal.SIGTERM)
        started.wait_for("asked to end")
    die.touch()
    assert process.text_in(told, timeout_s=60), "the router is told"
    go.touch()
    assert started.end() == 1
    assert started.last_error.startswith("Shard 0 crashed: killed by signal 9")


def test_a_router_that_dies_ends_everything(run: Start, tmp_path: Path) -> None:
    go = tmp_path / "go"
    started = run(shards=[SERVE], router=["ready", f"until={go}", "error=Port 80 on 0.0.0.0 is taken", "exit=1"])
    started.wait_for("READY")
    go.touch()
    assert started.end() == 1
    assert started.last_error == "Webserver Crashed: Port 80 on 0.0.0.0 is taken"
    assert "Shutting down shards" in started.messages


def test_a_router_that_cannot_start_ends_everything_before_the_shards_are_loaded(run: Start) -> None:
    started = run(shards=[["sleep=600"]], router=["error=Port 80 is taken", "exit=1"])
    assert started.end() == 1
    assert started.last_error == "Webserver failed to start: Port 80 is taken"


def test_a_router_that_dies_of_a_dead_shard_is_not_blamed(run: Start, process: Any, tmp_path: Path) -> None:
    """The end of the router is seen first, the end of the shard within the time that it is given."""
    router, shard, pid = (tmp_path / name for name in ("router", "shard", "pid"))
    started = run(
        shards=[["ready", f"until={shard}", "exit=1"]],
        router=[f"pid={pid}", "ready", f"until={router}", "exit=1"],
        settle_s=60,
    )
    started.wait_for("READY")
    router.touch()
    process.wait_until_reaped(process.pid_in(pid))
    shard.touch()
    assert started.end() == 1
    assert started.last_error.startswith("Shard 0 crashed")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_the_router_first_and_then_the_shards(
    run: Start, number: signal.Signals, tmp_path: Path
) -> None:
    endings = tmp_path / "endings"
    shards = [[f"ends=shard@{endings}", *SERVE]] * 2
    started = run(shards=shards, router=[f"ends-slowly=router@{endings}", *SERVE])
    started.wait_for("READY")
    started.signal(number)
    assert started.end() == 0
    assert endings.read_text().split() == ["router", "shard", "shard"]
    texts = [
        "Terminating webserver",
        "Waiting for webserver to gracefully shutdown",
        "webserver terminated",
        "Shutting down shards",
        "Terminating shard",
        "shard terminated",
    ]
    assert [started.messages.index(text) for text in texts] == sorted(started.messages.index(text) for text in texts)


def test_the_rest_of_the_group_is_killed_at_once_when_a_rank_dies(run: Start, tmp_path: Path) -> None:
    go = tmp_path / "go"
    started = run(shards=[["ready", f"until={go}", "exit=1"], ["never-ends", *SERVE]], router=SERVE)
    started.wait_for("READY")
    go.touch()
    assert started.end() == 1
    assert started.last_error.startswith("Shard 0 crashed")
    # It ignores SIGTERM: had it been asked, and given time, there would be lines about that.
    assert not [message for message in started.messages if message in ("Terminating shard", "Killing shard")]


def test_a_signal_while_downloading_stops_the_download(run: Start) -> None:
    started = run(download=["info=downloading", "sleep=600"], shards=[SERVE], router=SERVE)
    started.wait_for("downloading")
    started.signal(signal.SIGTERM)
    assert started.end() == 0
    assert "download terminated" in started.messages


def test_a_signal_while_loading_stops_the_shards(run: Start) -> None:
    started = run(shards=[["info=loading", "sleep=600"]], router=["sleep=600"])
    started.wait_for("loading")
    started.signal(signal.SIGINT)
    assert started.end() == 0


def test_what_outlives_its_grace_is_killed(run: Start) -> None:
    started = run(shards=[SERVE], router=["sleep=0.3", "never-ends", *SERVE], grace_s=-7.5)
    started.wait_for("READY")
    started.signal(signal.SIGTERM)
    assert started.end() == 0
    assert "Killing webserver" in started.messages
    assert "webserver killed" in started.messages


def test_a_second_signal_kills_at_once(run: Start) -> None:
    started = run(shards=[SERVE], router=["never-ends", *SERVE], grace_s=600)
    started.wait_for("READY")
    started.signal(signal.SIGTERM)
    started.wait_for("Waiting for webserver")
    started.signal(signal.SIGTERM)
    assert started.end() == 128 + signal.SIGTERM


def test_the_first_signal_after_a_crash_does_not_cut_the_routers_last_words(run: Start, tmp_path: Path) -> None:
    crash, go = tmp_path / "crash", tmp_path / "go"
    started = run(shards=[["ready", f"until={crash}", "exit=1"]], router=[f"last-words={go}", *SERVE], grace_s=600)
    started.wait_for("READY")
    crash.touch()
    started.wait_for("asked to end")
    started.signal(signal.SIGTERM)
    line = started.wait_for("Received SIGTERM")
    go.touch()
    assert line["fields"]["message"] == (
        "Received SIGTERM, stopping: running requests may end within 600 s, the same signal again stops at once"
    )
    assert started.end() == 1
    assert "last words" in started.messages
    assert started.last_error.startswith("Shard 0 crashed")


def test_a_second_signal_after_a_crash_kills_at_once(run: Start, tmp_path: Path) -> None:
    crash = tmp_path / "crash"
    started = run(shards=[["ready", f"until={crash}", "exit=1"]], router=["never-ends", *SERVE], grace_s=600)
    started.wait_for("READY")
    crash.touch()
    started.wait_for("Waiting for webserver")
    started.signal(signal.SIGTERM)
    started.wait_for("Received SIGTERM, stopping")
    started.signal(signal.SIGTERM)
    assert started.end() == 1
    assert "Received SIGTERM again, stopping at once" in started.messages
    assert "Killing webserver" not in started.messages


@pytest.mark.parametrize("crash", [False, True])
def test_no_signal_cuts_short_what_is_cleaned_up_at_the_end(run: Start, crash: bool, tmp_path: Path) -> None:
    go, until = tmp_path / "go", tmp_path / "until"
    started = run(shards=[["ready", f"until={go}", "exit=1"]], router=SERVE, until=str(until))
    started.wait_for("READY")
    if crash:
        go.touch()
    else:
        started.signal(signal.SIGTERM)
    started.wait_for("OVER")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        started.signal(number)
    until.touch()
    assert started.end() == int(crash)


def test_a_failed_download_starts_nothing(run: Start, tmp_path: Path) -> None:
    started = run(
        download=["error=no space left", "exit=1"], shards=[[f"pid={tmp_path / 'shard'}", *SERVE]], router=SERVE
    )
    assert started.end() == 1
    assert started.last_error == "Download encountered an error: no space left"
    assert not (tmp_path / "shard").exists()


def test_shards_load_the_commit_that_was_downloaded_and_know_its_task(run: Start, tmp_path: Path) -> None:
    file = tmp_path / "argv"
    download = ["resolved=abc123 text-generation"]
    started = run(download=download, shards=[[f"environment={file}", *SERVE, "--"]], router=SERVE)
    started.wait_for("READY")
    argv, _, environ = file.read_text().partition("\n\n")
    assert "--revision\nabc123" in argv
    assert "TGI_PIPELINE_TAG=text-generation" in environ.split("\n")


@pytest.mark.parametrize("where", ["shard", "router"])
def test_what_a_child_started_does_not_outlive_it(run: Start, process: Any, where: str, tmp_path: Path) -> None:
    file = tmp_path / "grandchild"
    actions = [f"grandchild={file}", "ready", "sleep=600"]
    started = run(shards=[actions if where == "shard" else SERVE], router=actions if where == "router" else SERVE)
    started.wait_for("READY")
    started.signal(signal.SIGTERM)
    assert started.end() == 0
    assert process.ends_within(process.pid_in(file), 2.0)


@pytest.mark.parametrize("phase", ["downloading", "loading", "serving"])
def test_children_die_with_a_launcher_that_is_killed(run: Start, process: Any, phase: str, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("download", "shard", "router")]
    download = [f"pid={files[0]}", "never-ends", "info=started", "sleep=600"] if phase == "downloading" else None
    ready = ["ready"] if phase == "serving" else []
    started = run(
        download=download,
        shards=[[f"pid={files[1]}", "never-ends", "info=started", *ready, "sleep=600"]],
        router=[f"pid={files[2]}", "never-ends", *ready, "sleep=600"],
    )
    started.wait_for("READY" if phase == "serving" else "started")
    pids = [process.pid_in(file) for file in (files[:1] if phase == "downloading" else files[1:])]
    started.signal(signal.SIGKILL)
    assert [process.ends_within(pid, 5.0) for pid in pids] == [True] * len(pids)


def test_ctrl_c_of_a_terminal_reaches_the_launcher_alone(run: Start, process: Any, tmp_path: Path) -> None:
    file = tmp_path / "shard"
    started = run(shards=[[f"pid={file}", *SERVE]], router=SERVE)
    started.wait_for("READY")
    pid = process.pid_in(file)
    assert os.getsid(pid) == os.getpgid(pid) == pid


def test_a_line_that_is_no_json_is_passed_on(run: Start) -> None:
    started = run(shards=[["out=plain text", 'raw={"no": "message"}', *SERVE]], router=SERVE)
    started.wait_for("READY")
    lines = {line["fields"]["message"]: line for line in started.lines if "fields" in line}
    assert lines["plain text"]["level"] == lines['{"no": "message"}']["level"] == "INFO"
    assert lines["plain text"]["span"] == {"rank": 0, "name": "shard-manager"}


@pytest.mark.fault("F25", "a log that nobody reads", "the children go on")
def test_a_log_that_nobody_reads_does_not_stop_the_children(run: Start, tmp_path: Path) -> None:
    done = tmp_path / "done"
    started = run(shards=[["flood=20000", f"pid={done}", *SERVE]], router=SERVE)
    deadline = time.monotonic() + 60
    while not done.exists():
        assert time.monotonic() < deadline, "the shard is blocked by the launcher's full pipe"
        time.sleep(0.05)
    started.signal(signal.SIGTERM)
    assert started.process.wait(timeout=20) == 0


def test_waiting_takes_no_cpu_time(run: Start) -> None:
    started = run(shards=[SERVE], router=SERVE)
    started.wait_for("READY")
    launcher = psutil.Process(started.process.pid)

    def used() -> tuple[float, int]:
        """Processor seconds, and how often it has gone to sleep again."""
        return sum(launcher.cpu_times()[:2]), launcher.num_ctx_switches().voluntary

    # A launcher that looks after its children every so often has no quiet second, one that waits has one soon: on a
    # busy machine perhaps not the first.
    deadline = time.monotonic() + 60
    while True:
        cpu_s, sleeps = used()
        time.sleep(1.0)
        cpu_s_after, sleeps_after = used()
        if cpu_s_after - cpu_s <= 0.011 and sleeps_after - sleeps <= 5:
            return
        assert time.monotonic() < deadline, (
            f"{cpu_s_after - cpu_s:.2f} s and {sleeps_after - sleeps} sleeps in a second"
        )
