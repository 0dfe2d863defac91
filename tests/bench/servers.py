"""The servers under test: how each is started, when it is ready, and its end with all its children."""

import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
from text_generation_launcher.benchmark.apis import Api

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.apis import APIS

HOST = "127.0.0.1"
READY_WITHIN_S = 600
STOP_WITHIN_S = 30


class ServerFailed(Exception):
    """It did not start, or did not stay; the text ends with its log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where things are on this machine."""

    model: Path
    peers: Path
    """Folder of `make_peers.py`."""

    def command(self, peer: str, name: str) -> str:
        return str(self.peers / peer / "bin" / name)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerKind:
    """How one server is run. Its settings are the best we found for it, not its defaults where those are worse."""

    argv: Callable[[Places, int], list[str]]
    version: Callable[[Places], str]
    api: Api
    environment: Callable[[Places], Mapping[str, str]] = lambda places: {}
    prepare: Callable[[Places], None] = lambda places: None
    """What has to be there before the first start and is no part of it."""


def package_version(python: str, package: str) -> str:
    """Of a package and its torch, in the environment of that interpreter."""
    ask = f"from importlib.metadata import version; print(version({package!r}), '/ torch', version('torch'))"
    return first_line([python, "-c", ask])


def first_line(argv: list[str]) -> str:
    try:
        answer = subprocess.run(argv, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "not installed"
    # llama-server tells it on stderr, after a word.
    return (answer.stdout + answer.stderr).partition("\n")[0].removeprefix("version: ")


def ours(places: Places, port: int) -> list[str]:
    launcher = str(Path(sys.executable).with_name("text-generation-launcher"))
    address = ["--hostname", HOST, "--port", str(port)]
    return [launcher, "--model-id", str(places.model), "--dtype", "bfloat16", *address]


def vllm(places: Places, port: int) -> list[str]:
    address = ["--host", HOST, "--port", str(port)]
    model = [str(places.model), "--dtype", "bfloat16", "--max-model-len", "4096"]
    return [places.command("vllm", "vllm"), "serve", *model, *address, "--disable-uvicorn-access-log"]


def vllm_environment(places: Places) -> dict[str, str]:
    return {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_NO_USAGE_STATS": "1"}


def vllm_all_cores(places: Places) -> dict[str, str]:
    """By itself it keeps one core for its scheduler, of two that is half of the machine; and Intel's OpenMP on top."""
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0)))
    openmp = str(places.peers / "vllm" / "lib" / "libiomp5.so")
    return vllm_environment(places) | {"VLLM_CPU_OMP_THREADS_BIND": cores, "LD_PRELOAD": openmp}


def transformers(places: Places, port: int) -> list[str]:
    address = ["--host", HOST, "--port", str(port)]
    model = [str(places.model), "--continuous-batching", "--dtype", "bfloat16", "--device", "cpu"]
    # By default it takes 60 % of the machine's memory for its cache, and has no more of it in use for that.
    cache = ["--cb-max-memory-percent", "0.2"]
    return [places.command("transformers", "transformers"), "serve", *model, *cache, *address]


def gguf_of(places: Places) -> Path:
    """Named after the whole path: folders of benchmark models tend to share their last name."""
    digest = f"{zlib.crc32(bytes(places.model)):08x}"
    return places.peers / "llama.cpp" / "models" / f"{places.model.name}-{digest}.gguf"


def make_gguf(places: Places) -> None:
    """Convert the model, unless that was done since its weights were written."""
    output = gguf_of(places)
    weights = max((path.stat().st_mtime for path in places.model.glob("*.safetensors")), default=0)
    if output.exists() and output.stat().st_mtime > weights:
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    script = str(Path(__file__).with_name("make_gguf.py"))
    paths = ["--model", str(places.model), "--output", str(output)]
    made = subprocess.run([places.command("llama.cpp", "python"), script, *paths], capture_output=True, text=True)
    if made.returncode:
        raise ServerFailed(f"make_gguf.py failed\n{made.stderr}")


def llama_cpp(places: Places, port: int) -> list[str]:
    """Chosen by processor time a token (135M model, 16 streams, one thread): without flash attention 16 ms, with it 20;
    with one cache for all slots 25 and 21. The order of samplers made no difference. All else is at its default.
    """
    address = ["--host", HOST, "--port", str(port), "--no-webui", "--log-verbosity", "1"]
    # As in vLLM's row, 4,096 tokens for each stream. A prompt is never seen twice: nothing to look up, nothing to keep.
    context = ["--parallel", "32", "--no-kv-unified", "--ctx-size", str(32 * 4096), "--no-cache-prompt"]
    speed = ["--threads", str(len(os.sched_getaffinity(0))), "--flash-attn", "off", "--cache-ram", "0"]
    return [places.command("llama.cpp", "llama-server"), "--model", str(gguf_of(places)), *address, *context, *speed]


VLLM = ServerKind(
    argv=vllm,
    version=lambda places: package_version(places.command("vllm", "python"), "vllm"),
    api=APIS["completions"],
    environment=vllm_environment,
)
KINDS = {
    "ours": ServerKind(
        argv=ours,
        version=lambda _: package_version(sys.executable, "text-generation-inference"),
        api=APIS["native"],
    ),
    "vllm": VLLM,
    "vllm-all-cores": replace(VLLM, environment=vllm_all_cores),
    "transformers": ServerKind(
        argv=transformers,
        version=lambda places: package_version(places.command("transformers", "python"), "transformers"),
        api=APIS["transformers"],
    ),
    "llama.cpp": ServerKind(
        argv=llama_cpp,
        version=lambda places: first_line([places.command("llama.cpp", "llama-server"), "--version"]),
        api=APIS["llama.cpp"],
        prepare=make_gguf,
    ),
}
"""Room for more: a row here is a column in the table of `compare.py`."""


@dataclass(slots=True, kw_only=True)
class Server:
    process: "subprocess.Popen[bytes]"
    url: str
    log: Path
    ready_s: float
    """From the start of the process until `/health` answered 200."""
    first_answer_s: float = 0
    """From the start of the process until the first request was answered; its sender knows."""

    def tree(self) -> list[psutil.Process]:
        try:
            root = psutil.Process(self.process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


def end_cleanly_on_sigterm() -> None:
    """For main programs: `timeout` and the like must not leave a server of ours behind."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


@contextmanager
def running(
    argv: list[str], port: int, environment: Mapping[str, str] | None = None, within_s: float = READY_WITHIN_S
) -> Iterator[Server]:
    """Start a server, hand it out when it is ready, and leave nothing of it behind."""
    with tempfile.NamedTemporaryFile(prefix="bench-", suffix=".log", delete=False) as log:
        start = time.perf_counter()
        process = subprocess.Popen(
            argv,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **(environment or {})},
            start_new_session=True,
        )
    server = Server(process=process, url=f"http://{HOST}:{port}", log=Path(log.name), ready_s=0)
    try:
        wait_until_ready(server, within_s)
        server.ready_s = round(time.perf_counter() - start, 2)
        yield server
    finally:
        stop(server)
    server.log.unlink()  # kept after a failure, for a look at all of it


def wait_until_ready(server: Server, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise ServerFailed(f"exit code {server.process.returncode} before it was ready\n{last_words(server)}")
        with suppress(OSError), urllib.request.urlopen(f"{server.url}/health", timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.1)
    raise ServerFailed(f"not ready within {within_s} s\n{last_words(server)}")


def last_words(server: Server, num_lines: int = 30) -> str:
    lines = server.log.read_text(errors="replace").splitlines()[-num_lines:]
    return "\n".join([f"the end of {server.log}:", *lines])


def stop(server: Server) -> None:
    """SIGTERM to the root, which should end its children; SIGKILL to what is left of its tree and its session."""
    ours = {process.pid: process for process in [*server.tree(), *session_of(server.process.pid)]}
    with suppress(ProcessLookupError):
        server.process.terminate()
    for process in wait_gone(list(ours.values())):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    wait_gone(list(ours.values()))
    server.process.wait()


def wait_gone(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that are still there after `STOP_WITHIN_S`. A dead one that nobody has reaped counts as gone."""
    deadline = time.monotonic() + STOP_WITHIN_S
    while (left := [process for process in processes if alive(process)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def session_of(leader: int) -> Iterator[psutil.Process]:
    """All processes of the session that `running` opened, also those whose parent is gone."""
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == leader:
                yield process
