"""`text-generation-launcher` as its users run it: its command line, its log, its processes and its end."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx2
import psutil
from text_generation_launcher.environment import without_flags

LAUNCHER = Path(sys.executable).with_name("text-generation-launcher")
TIED = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""
"""Becomes the launcher, which the kernel then kills with its parent: tests that are killed leave nothing behind. What a
shell runs in the background ignores SIGINT, and so would the launcher."""
MARK = "LAUNCHED_BY_TEST"
"""Variable that every process of a launch inherits: what carries it after the end is an orphan."""
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""For tiny models: two threads that wait for each other, on a busy machine, are ten times slower than one."""
READY_WITHIN_S = 240.0
END_WITHIN_S = 120.0
"""Generous: the machine may be busy with other things. No test measures time by them."""


class Launched:
    """One launch, on one thread unless ``environ`` says otherwise."""

    def __init__(self, arguments: Sequence[str], environ: Mapping[str, str], log: Path) -> None:
        self.log = log
        self.url = ""
        self._mark = secrets.token_hex(8)
        self._client: httpx2.Client | None = None
        self._verify: ssl.SSLContext | bool = True
        port = () if "--port" in arguments else ("--port", "0")
        inherited = without_flags(os.environ)
        for name in ("LOG_LEVEL", *ONE_THREAD):
            inherited.pop(name, None)
        env = {**inherited, "HF_HUB_OFFLINE": "1", "JSON_OUTPUT": "true", MARK: self._mark, **environ}
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*([sys.executable, "-c", TIED] if sys.platform == "linux" else ()), LAUNCHER, *arguments, *port],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=env,
            )

    # -- its log ------------------------------------------------------------------------------------

    @property
    def text(self) -> str:
        return self.log.read_text(encoding="utf-8")

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Every complete line of the log; one that is no JSON object fails the test."""
        # Not `splitlines`: an error may quote characters that end lines elsewhere.
        lines = [json.loads(line) for line in self.text.split("\n")[:-1]]
        assert all(isinstance(line, dict) for line in lines), self.text
        return lines

    @property
    def errors(self) -> list[str]:
        return [message_of(line) for line in self.lines if line["level"] == "ERROR"]

    # -- while it runs ------------------------------------------------------------------------------

    @property
    def client(self) -> httpx2.Client:
        """One client, whose connections stay open between requests."""
        if self._client is None:
            self._client = httpx2.Client(base_url=self.url, timeout=END_WITHIN_S, verify=self._verify)
        return self._client

    def trust(self, authority: Path) -> None:
        """Take what this authority has signed for the server; ahead of the first request."""
        self._verify = ssl.create_default_context(cafile=str(authority))

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_WITHIN_S
        while not self.url:
            if self.process.poll() is not None:
                raise AssertionError(f"exit code {self.process.returncode} before it was ready\n{self.text}")
            if time.monotonic() > deadline:
                raise AssertionError(f"not ready within {READY_WITHIN_S} s\n{self.text}")
            time.sleep(0.05)
            for line in self.lines:
                if message_of(line).startswith("Ready at "):
                    self.url = line["fields"]["url"]
        assert self.client.get("/health").status_code == 200

    def processes(self) -> dict[str, psutil.Process]:
        """All living processes of the launch by what they are: ``launcher``, ``router``, ``grammar worker``,
        ``shard 0`` ..."""
        found: dict[str, psutil.Process] = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found[_role(process)] = process
        return found

    @contextlib.contextmanager
    def shards_frozen(self) -> Iterator[None]:
        """Stop the shards' processes: what has been asked stays unanswered until they go on."""
        shards = [process for role, process in self.processes().items() if role.startswith("shard")]
        for shard in shards:
            shard.suspend()
        try:
            yield
        finally:
            for shard in shards:
                with contextlib.suppress(psutil.NoSuchProcess):
                    shard.resume()

    # -- its end ------------------------------------------------------------------------------------

    def end(self) -> int:
        """Wait for the exit code; nothing of the launch is left then."""
        code = self.process.wait(timeout=END_WITHIN_S)
        self.assert_gone()
        return code

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.end()

    def assert_gone(self) -> None:
        """No process of the launch is left; a dying one may take a moment."""
        deadline = time.monotonic() + END_WITHIN_S
        while left := self.processes():
            assert time.monotonic() < deadline, f"left behind: {left}\n{self.text}"
            time.sleep(0.02)

    def discard(self) -> None:
        """Whatever has happened: leave nothing behind."""
        if self._client is not None:
            self._client.close()
        for process in self.processes().values():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


def message_of(line: dict[str, Any]) -> str:
    """The text of a log line; the router's lines are flat, as TGI's are."""
    fields = line.get("fields", line)
    return str(fields["message"])


@contextlib.contextmanager
def starting(*arguments: str, environ: Mapping[str, str] = ONE_THREAD) -> Iterator[Launched]:
    """Start the launcher on a free port, without waiting for anything; whatever is left is killed at the end."""
    with tempfile.TemporaryDirectory() as folder:
        server = Launched(arguments, environ, Path(folder, "log"))
        try:
            yield server
        except BaseException as error:
            error.add_note(f"The log of {' '.join(arguments) or 'the server'}:\n{server.text[-8000:]}")
            raise
        finally:
            server.discard()


@contextlib.contextmanager
def serving(*arguments: str, environ: Mapping[str, str] = ONE_THREAD) -> Iterator[Launched]:
    """A server that is ready; a SIGTERM ends it, with exit code 0 and nothing left, if the test has not ended it."""
    with starting(*arguments, environ=environ) as server:
        server.wait_until_ready()
        yield server
        if server.process.poll() is None:
            assert server.stop() == 0, server.text
            assert server.errors == []


def refusal(*arguments: str) -> str:
    """The one line in which a launch says why it does not start. Its exit code is 1."""
    with starting(*arguments) as server:
        assert server.end() == 1, server.text
        assert "Traceback" not in server.text
        last = server.lines[-1]
        assert last["level"] == "ERROR", server.text
        assert "\n" not in message_of(last)
        return message_of(last)


def _role(process: psutil.Process) -> str:
    command = " ".join(process.cmdline())
    if "-m text_generation_router.guidance.worker" in command:
        return "grammar worker"
    if "-m text_generation_router" in command:
        return "router"
    if "-m text_generation_server serve" in command:
        return f"shard {process.environ()['RANK']}"
    return "launcher" if "text-generation-launcher" in command else f"{process.pid} {command}"
