"""`bench.servers` starts what it is told to, and leaves nothing behind."""

import socket
import sys
from pathlib import Path

import pytest
from bench.servers import KINDS, Places, ServerFailed, alive, running

# A server whose child ignores its end.
SERVER = """
import http.server, subprocess, sys
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(99)"
child = subprocess.Popen([sys.executable, "-c", deaf])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def test_a_server_is_ready_then_gone_with_its_children(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.servers.STOP_WITHIN_S", 0.5)
    with running([sys.executable, "-c", SERVER, str(port)], port) as server:
        tree = server.tree()
        assert len(tree) == 2
        assert server.ready_s > 0
    assert not any(alive(process) for process in tree)
    assert not server.log.exists()


def test_a_server_that_dies_shows_its_log(port: int) -> None:
    with (
        pytest.raises(ServerFailed, match=r"(?s)exit code 3.*no such model"),
        running([sys.executable, "-c", "import sys; print('no such model'); sys.exit(3)"], port),
    ):
        pass


def test_a_server_that_is_never_ready_is_given_up(port: int) -> None:
    with (
        pytest.raises(ServerFailed, match="not ready within"),
        running([sys.executable, "-c", "import time; time.sleep(99)"], port, within_s=0.3),
    ):
        pass


@pytest.mark.parametrize("name", KINDS)
def test_commands_name_the_model_and_the_port(name: str) -> None:
    argv = KINDS[name].argv(Places(model=Path("the-model"), peers=Path("peers")), 1234)
    assert any("the-model" in argument for argument in argv)
    assert "1234" in argv
