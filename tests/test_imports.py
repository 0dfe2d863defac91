"""The rooms of the house: who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "text_generation_proto": ROOT / "proto",
    "text_generation_launcher": ROOT / "launcher",
    "text_generation_router": ROOT / "router",
    "text_generation_server": ROOT / "server",
}


def imports(file: Path) -> set[str]:
    """Dotted names of all modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file}: imports are absolute"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_processes_meet_only_in_the_contract(package: str) -> None:
    others = set(PACKAGES) - {package, "text_generation_proto"}
    for file in (PACKAGES[package] / package).rglob("*.py"):
        found = {name for name in imports(file) if name.split(".")[0] in others}
        assert not found, f"{file} imports {found}"


@pytest.mark.parametrize("package", ["text_generation_launcher", "text_generation_router"])
def test_no_torch_outside_the_shards(package: str) -> None:
    """Checked in a process of its own: what a package pulls in counts, not only what its files name."""
    modules = [
        ".".join(file.relative_to(PACKAGES[package]).with_suffix("").parts)
        for file in (PACKAGES[package] / package).rglob("*.py")
        if file.name not in ("__init__.py", "__main__.py")
    ]
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def below(package: str, folder: str, module: str) -> set[str]:
    root = PACKAGES[package] / package
    files = [*(root / folder).rglob("*.py")] if (root / folder).is_dir() else [root / f"{folder}.py"]
    return {
        str(file.relative_to(ROOT))
        for file in files
        if any(name.startswith(f"{package}.{module}") for name in imports(file))
    }


@pytest.mark.parametrize(
    ("package", "folder", "never"),
    [
        ("text_generation_router", "inference", "app"),
        ("text_generation_router", "scheduling", "inference"),
        ("text_generation_router", "scheduling", "api"),
        ("text_generation_router", "scheduling", "app"),
        ("text_generation_router", "shards", "api"),
        ("text_generation_router", "shards", "inference"),
        ("text_generation_router", "shards", "scheduling"),
        ("text_generation_router", "validation", "scheduling.batcher"),
        ("text_generation_server", "engine", "rpc"),
        ("text_generation_server", "generation", "engine.engine"),
        ("text_generation_server", "model", "rpc"),
        ("text_generation_server", "model", "engine.engine"),
        ("text_generation_server", "attention", "model"),
        ("text_generation_server", "attention", "rpc"),
        ("text_generation_server", "weights", "engine"),
    ],
)
def test_inside_a_process_data_flows_one_way(package: str, folder: str, never: str) -> None:
    assert not below(package, folder, never)
