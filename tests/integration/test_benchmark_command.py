"""`text-generation-benchmark` as its users run it: beside a real shard, a launched server, and on a terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from integration.asking import generate
from integration.launched import Launched, serving
from text_generation_launcher.sockets import launched_sockets

BENCHMARK = Path(sys.executable).with_name("text-generation-benchmark")
SHARD = [sys.executable, "-m", "text_generation_server", "serve", "embedded"]
READY_WITHIN_S = 240.0
CONTROLLED = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
"""Becomes the command, with standard input as its session's terminal: Ctrl-C typed there is a signal."""
FLAGS = ("TOKENIZER_NAME", "REVISION", "RUNS", "API_KEY", "MASTER_SHARD_UDS_PATH", "COLUMNS", "LINES")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in FLAGS} | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The socket of a shard that somebody has started by hand."""
    path = tmp_path_factory.mktemp("shard") / "s"
    log = path.with_name("log")
    with log.open("wb") as output:
        process = subprocess.Popen([*SHARD, "--uds-path", str(path)], stderr=output, env=ENVIRONMENT)
    try:
        deadline = time.monotonic() + READY_WITHIN_S
        while '"event": "ready"' not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield path.with_name("s-0")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def benchmark(*arguments: str, code: int = 0) -> tuple[str, str]:
    """Standard output and standard error of a whole benchmark."""
    done = subprocess.run(
        [str(BENCHMARK), *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


def small(*arguments: str) -> tuple[str, ...]:
    return ("-b", "1", "-b", "3", "-s", "9", "-d", "4", "-r", "2", *arguments)


def test_a_shard_is_measured_step_by_step(shard: Path, tmp_path: Path) -> None:
    raw, picture = tmp_path / "raw.json", tmp_path / "plot.png"
    out, err = benchmark("-m", str(shard), *small("--json", str(raw), "--plot", str(picture)))
    assert out.count("\n| Prefill ") == 3
    assert "| Sequence Length    | 9 " in out
    assert [line.split(":")[0] for line in err.splitlines()] == ["embedded", "batch size 1", "batch size 3"]
    content = json.loads(raw.read_text())
    assert content["is_complete"] is True
    assert content["target"]["model"] == "embedded"
    assert [batch["batch_size"] for batch in content["batches"]] == [1, 3]
    for batch in content["batches"]:
        for run in batch["runs"]:
            assert (len(run["prefill_s"]), len(run["token_s"])) == (1, 3)
            assert all(value > 0 for value in run["prefill_s"] + run["token_s"] + run["decode_s"])
            assert run["prompt_tokens"] == 9 * batch["batch_size"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_it_can_be_measured_again_with_other_sizes_and_sampling(shard: Path) -> None:
    out, _ = benchmark(
        *("-m", str(shard), "-b", "5", "-s", "100", "-d", "20", "-r", "1", "-w", "0", "--json", "-"),
        *("--temperature", "0.7", "--top-k", "5", "--top-p", "0.9", "--typical-p", "0.9", "--do-sample"),
        *("--repetition-penalty", "1.1", "--frequency-penalty", "0.1", "--top-n-tokens", "2"),
    )
    content = json.loads(out)
    assert (content["parameters"]["top_k"], content["parameters"]["top_n_tokens"]) == (5, 2)
    assert len(content["batches"][0]["runs"][0]["token_s"]) == 19


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["-s", "100000"], "tokens, the model has", id="longer than the model"),
        pytest.param(["-b", "100000000", "-s", "400"], "does not fit: choose a smaller --batch-size", id="no room"),
        pytest.param(["-b", "200000", "-s", "400"], "does not fit: choose a smaller --batch-size", id="no memory"),
        pytest.param(["-t", "/nowhere"], "`--tokenizer-name /nowhere` does not exist", id="no tokenizer"),
    ],
)
def test_what_cannot_be_is_one_line(shard: Path, arguments: list[str], message: str) -> None:
    out, err = benchmark("-m", str(shard), *arguments, code=1)
    assert out == ""
    [line] = err.splitlines()
    assert line.startswith("Error: ")
    assert message in line


def test_a_launched_server_by_its_own_route(embedded: Launched, tmp_path: Path) -> None:
    out, _ = benchmark("--url", embedded.url, *small("--json", "-"))
    content = json.loads(out)
    assert content["target"]["kind"] == "/generate_stream"
    assert content["streams"]["sent"] == (1 + 2) * (1 + 3)
    assert content["streams"]["prompt_tokens"] == [9], "the server counts what was asked for"
    assert len(content["batches"][1]["runs"][0]["prefill_s"]) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["-b", "1000"], "the server's max_concurrent_requests, 128", id="too many"),
        pytest.param(["-s", "100000"], "the server's max_input_tokens", id="too long"),
    ],
)
def test_what_a_server_does_not_take(embedded: Launched, arguments: list[str], message: str) -> None:
    _, err = benchmark("--url", embedded.url, *arguments, code=1)
    assert message in err.splitlines()[-1]


def test_a_server_without_such_routes(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        assert server.stdout is not None
        port = server.stdout.readline().split(" port ")[1].split()[0]
        _, err = benchmark("--url", f"http://127.0.0.1:{port}", "--api", "chat", code=1)
        server.kill()
    assert "is no server of TGI's API (/info) or OpenAI's" in err.splitlines()[-1]


@pytest.mark.slow
def test_the_shard_of_a_launched_server(tmp_path: Path) -> None:
    """Its router goes on behind the benchmark: the step that is refused to it is computed again."""
    path = tmp_path / "s"
    with serving("--shard-uds-path", str(path), "--max-concurrent-requests", "4") as server:
        before = generate(server, "What is 12 + 30?", max_new_tokens=5)
        out, err = benchmark("-m", f"{path}-0", *small())
        assert "Note: This shard belongs to a launched server" in err
        assert "This shard belongs to a launched server" in out
        assert generate(server, "What is 12 + 30?", max_new_tokens=5) == before
        _, err = benchmark("-m", f"{path}-0", "-b", "1", "-s", "8", "-d", "1", "-r", "1")
        assert "prefill" in err
        server.stop()


def test_a_launched_shard_is_found_without_a_path(embedded: Launched) -> None:
    assert len(launched_sockets()) >= 1


class Terminal:
    """The command on a terminal of its own, and all that it has written there."""

    def __init__(self, *arguments: str, columns: int, rows: int) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.before = termios.tcgetattr(slave)
        self.slave = slave
        self.process = subprocess.Popen(
            [sys.executable, "-c", CONTROLLED, str(BENCHMARK), *arguments],
            env=ENVIRONMENT | {"TERM": "xterm-256color"},
            stdin=slave,
            stdout=subprocess.PIPE,
            stderr=slave,
            start_new_session=True,
        )
        self.written = ""

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + 60
        while text not in self.written:
            assert time.monotonic() < deadline, self.written
            self.written += os.read(self.master, 65536).decode(errors="replace")

    def end(self) -> tuple[int, str]:
        """The exit code and standard output; the terminal is as it was before."""
        out, _ = self.process.communicate(timeout=120)
        assert termios.tcgetattr(self.slave) == self.before
        os.close(self.master)
        os.close(self.slave)
        text: Any = out.decode()
        return self.process.returncode, text


@pytest.mark.parametrize("stop", [b"\x03", b"q"], ids=["Ctrl-C", "q"])
@pytest.mark.parametrize(("columns", "rows"), [(80, 24), (30, 10)])
def test_the_full_screen_ends_early_with_tables(shard: Path, stop: bytes, columns: int, rows: int) -> None:
    terminal = Terminal("-m", str(shard), "-b", "1", "-b", "2", "-r", "2000", "-w", "0", columns=columns, rows=rows)
    terminal.wait_for("Batch size 1")
    terminal.wait_for("Prefill" if rows > 10 else "run 1")
    os.write(terminal.master, b"\x1b[C\x1b[D")
    # Some runs are over by now, else there would be no table.
    time.sleep(1)
    os.write(terminal.master, stop)
    terminal.wait_for("Stopped before the end.")
    code, out = terminal.end()
    assert code == 130
    assert out.startswith("| Parameter")
    assert "Not complete: batch size 1 (" in out
    assert "\x1b[?1049l" in terminal.written, "the alternate screen is left"


def test_ctrl_c_without_a_terminal(shard: Path) -> None:
    process = subprocess.Popen(
        [str(BENCHMARK), "-m", str(shard), "-b", "1", "-b", "2", "-s", "8", "-r", "5000", "--json", "-"],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert "embedded" in process.stderr.readline()
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert json.loads(out)["is_complete"] is False
    assert err.endswith("Stopped before the end.\n")
    # The shard is none the worse.
    benchmark("-m", str(shard), "-b", "1", "-r", "1")
