"""`text-generation-launcher` itself, from its command line to its exit code, with a fake router and shards."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from text_generation_launcher.environment import PREFIX
from text_generation_launcher.flags import flag_table

FAKE_CHILD = Path(__file__).with_name("fake_child.py")
LAUNCHER = [sys.executable, "-m", "text_generation_launcher"]

Launch = Callable[..., "Launched"]


class Launched:
    def __init__(self, argv: list[str], env: dict[str, str], folder: Path, *, terminal: bool) -> None:
        ours, theirs = os.openpty() if terminal else os.pipe()
        self.process = subprocess.Popen(
            [*LAUNCHER, *argv], env=env, cwd=folder, stdout=theirs, stderr=subprocess.PIPE, text=True
        )
        os.close(theirs)
        self.stdout = ours
        self.out = ""

    def wait_for(self, text: str) -> None:
        while text not in self.out:
            assert self.read(), self.out + self.end()[1]

    def read(self) -> bool:
        """Take in some output; False at its end, which a terminal tells by an error."""
        data = b""
        with contextlib.suppress(OSError):
            data = os.read(self.stdout, 65536)
        self.out += data.decode("utf-8", "replace")
        return bool(data)

    def end(self) -> tuple[int, str]:
        """Exit code and standard error; standard output is then whole."""
        while self.read():
            pass
        _, errors = self.process.communicate(timeout=30)
        return self.process.returncode, errors

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.end()[0]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Start the launcher with a router and a server package that write down how they were called."""
    for package in ("text_generation_router", "text_generation_server"):
        folder = tmp_path / "packages" / package
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
        (folder / "__main__.py").write_text(
            "import os, runpy, sys\n"
            f"kind = {package!r}.removeprefix('text_generation_')\n"
            "kind = 'download' if 'download-weights' in sys.argv else kind + os.environ.get('RANK', '')\n"
            f"record = 'environment=' + os.path.join({str(tmp_path)!r}, kind)\n"
            "last = 'resolved=abc' if kind == 'download' else 'ready\\nsleep=600'\n"
            "os.environ['FAKE_ACTIONS'] = record + '\\n' + (os.environ.get('FAKE_' + kind.upper()) or last)\n"
            f"runpy.run_path({str(FAKE_CHILD)!r}, run_name='__main__')\n"
        )
    flags = {name for flag in flag_table() for name in (flag.variable, PREFIX + flag.variable)}
    clean = {name: value for name, value in os.environ.items() if name not in flags and name != "LOG_LEVEL"}
    clean["PYTHONPATH"] = str(tmp_path / "packages")
    started: list[Launched] = []

    def start(*argv: str, terminal: bool = False, **environ: str) -> Launched:
        port = [] if "--port" in argv or "PORT" in environ else ["--port", "0"]
        started.append(Launched([*argv, *port], clean | environ, tmp_path, terminal=terminal))
        return started[-1]

    yield start
    for each in started:
        each.process.terminate()
        try:
            each.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            each.process.kill()
            each.process.wait()
        os.close(each.stdout)
        assert each.process.stderr is not None
        each.process.stderr.close()


def recorded(file: Path) -> tuple[list[str], dict[str, str]]:
    """Argv and environment of a fake child."""
    argv, _, environ = file.read_text().partition("\n\n")
    return argv.split("\n"), dict(line.partition("=")[::2] for line in environ.split("\n"))


def test_a_person_sees_where_the_server_is_and_what_to_try(launch: Launch) -> None:
    server = launch()
    server.wait_for("generate_stream")
    assert "embedded is ready at http://127.0.0.1:" in server.out
    assert "What is the capital of France?" in server.out
    assert "\x1b" not in server.out
    assert server.stop() == 0


def test_json_output_is_json_lines_alone(launch: Launch) -> None:
    server = launch("--json-output", "--env")
    server.wait_for("Ready at")
    assert server.stop() == 0
    lines = [json.loads(line) for line in server.out.splitlines()]
    assert all({"timestamp", "level", "target"} <= line.keys() for line in lines)
    [ready] = [line for line in lines if line.get("fields", {}).get("message", "").startswith("Ready at")]
    assert ready["fields"]["url"].startswith("http://127.0.0.1:")
    assert {"load", "total"} <= ready["fields"]["seconds"].keys()


def test_a_hub_model_is_downloaded_first_and_loaded_at_that_commit(launch: Launch, tmp_path: Path) -> None:
    environ = {"TGI_DTYPE": "float32", "HOSTNAME": "pod-1", "API_KEY": "hush"}
    server = launch("--model-id", "org/model", "--num-shard", "2", **environ)
    server.wait_for("generate_stream")
    assert server.stop() == 0
    assert recorded(tmp_path / "download")[0][:2] == ["download-weights", "org/model"]
    for rank in (0, 1):
        argv, environ = recorded(tmp_path / f"server{rank}")
        assert argv[:2] == ["serve", "org/model"]
        assert {"--dtype", "float32", "--revision", "abc", "--sharded"} <= set(argv)
        assert environ["RANK"] == str(rank)
        assert not {"TGI_DTYPE", "HOSTNAME", "API_KEY"} & environ.keys()
    argv, environ = recorded(tmp_path / "router")
    assert environ["API_KEY"] == "hush"
    assert "hush" not in server.out + " ".join(argv)
    socket_folder = Path(argv[argv.index("--master-shard-uds-path") + 1]).parent
    assert socket_folder.name.startswith("text-generation-")
    assert not socket_folder.exists()


def test_a_relative_socket_path_is_the_same_for_router_and_shards(launch: Launch, tmp_path: Path) -> None:
    server = launch("--shard-uds-path", "tgi")
    server.wait_for("generate_stream")
    assert server.stop() == 0
    shard, router = recorded(tmp_path / "server0")[0], recorded(tmp_path / "router")[0]
    assert shard[shard.index("--uds-path") + 1] == str(tmp_path / "tgi")
    assert router[router.index("--master-shard-uds-path") + 1] == str(tmp_path / "tgi-0")


def test_two_launches_with_the_same_flags_share_nothing(launch: Launch, tmp_path: Path) -> None:
    seen = set()
    for _ in range(2):
        launch().wait_for("generate_stream")
        argv, environ = recorded(tmp_path / "router")
        seen |= {argv[argv.index("--master-shard-uds-path") + 1], environ["TGI_LAUNCHER_NONCE"]}
        (tmp_path / "router").unlink()
    assert len(seen) == 4


def test_a_taken_port_is_told_before_anything_starts(launch: Launch, tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("0.0.0.0", 0))
        holder.listen()
        port = holder.getsockname()[1]
        server = launch("--port", str(port))
        assert server.end()[0] == 1
    assert f"Port {port} on 0.0.0.0 is already in use: " in server.out.splitlines()[-1]
    assert not (tmp_path / "router").exists()


def test_argument_errors_are_printed_as_tgi_prints_them(launch: Launch) -> None:
    assert launch("--num-shard", "0").end() == (1, 'Error: ArgumentValidation("`num_shard` cannot be < 1")\n')
    assert launch("--sharded", "true", CUDA_VISIBLE_DEVICES="0").end() == (
        1,
        'Error: NotEnoughCUDADevices("`sharded` is true but only found 1 CUDA devices")\n',
    )


def test_an_empty_key_on_the_command_line_opens_no_server(launch: Launch, tmp_path: Path) -> None:
    """Typically `--api-key "$UNSET"`."""
    assert launch("--api-key", "").end() == (1, 'Error: ArgumentValidation("`api_key` must not be empty")\n')
    assert not (tmp_path / "router").exists()


@pytest.mark.parametrize("name", ["API_KEY", "TGI_API_KEY"])
def test_an_empty_key_in_the_environment_is_told(launch: Launch, name: str, tmp_path: Path) -> None:
    warning = f"{name} is empty: the server is open"
    server = launch(**{name: ""})
    server.wait_for("generate_stream")
    assert server.stop() == 0
    assert warning in server.out
    protected = launch("--api-key", "hush", **{name: ""})
    protected.wait_for("generate_stream")
    assert protected.stop() == 0
    assert warning not in protected.out
    assert recorded(tmp_path / "router")[1]["API_KEY"] == "hush"


def test_an_ignored_variable_is_told(launch: Launch) -> None:
    server = launch(TGI_PORT="tcp://10.0.0.1:80")
    server.wait_for("Ignored TGI_PORT='tcp://10.0.0.1:80': not a value of --port")
    assert server.stop() == 0


def test_the_runtime_report_comes_first_and_then_the_server(launch: Launch) -> None:
    server = launch("--env")
    server.wait_for("generate_stream")
    assert server.stop() == 0
    labels = ["Runtime environment:", "Target:", "Python version:", "Torch version:", "Commit sha:", "Docker label:"]
    positions = [
        server.out.index(label) for label in [*labels, "nvidia-smi:", "xpu-smi:", "hpu-smi:", "Starting shard"]
    ]
    assert positions == sorted(positions)


def test_a_shard_that_cannot_load_ends_in_one_clear_line(launch: Launch) -> None:
    server = launch(FAKE_SERVER0="error=unknown architecture falcon\nexit=1")
    assert server.end()[0] == 1
    assert server.out.splitlines()[-1].endswith(
        "Shard 0 failed to start: unknown architecture falcon error=ShardCannotStart"
    )


@pytest.mark.parametrize("level", ["error", "text_generation.events=off"])
def test_no_log_level_hides_readiness(launch: Launch, level: str) -> None:
    server = launch(LOG_LEVEL=level)
    server.wait_for("generate_stream")
    assert server.stop() == 0


@pytest.mark.parametrize(
    ("environ", "coloured"),
    [({"LOG_COLORIZE": "1"}, True), ({"LOG_COLORIZE": "0"}, False), ({"NO_COLOR": "1"}, False), ({}, False)],
)
def test_colour(launch: Launch, environ: dict[str, str], coloured: bool) -> None:
    server = launch(**environ)
    server.wait_for("Starting shard")
    assert server.stop() == 0
    assert ("\x1b[" in server.out) is coloured


def test_errors_are_json_too(launch: Launch) -> None:
    server = launch("--json-output", "--num-shard", "0")
    assert server.end() == (1, "")
    error = json.loads(server.out.splitlines()[-1])
    assert error["level"] == "ERROR"
    assert error["fields"] == {"message": "`num_shard` cannot be < 1", "error": "ArgumentValidation"}


def test_on_a_terminal_bars_come_and_plain_lines_stay(launch: Launch) -> None:
    slow = "progress=1/4\nsleep=0.5\nprogress=3/4\nsleep=0.5\nprogress=4/4\nready\nsleep=600"
    server = launch(FAKE_SERVER0=slow, TERM="xterm", NO_COLOR="1", terminal=True)
    server.wait_for("generate_stream")
    assert server.stop() == 0
    assert "3 layers / 4 layers" in server.out
    assert "text_generation_launcher: Load: 4 layers in " in server.out
    after = server.out[server.out.index("Load: 4 layers") :]
    assert "layers / 4 layers" not in after
