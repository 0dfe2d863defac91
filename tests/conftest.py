"""What tests of several folders share: tiny model folders, and servers that run for the whole session."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from integration.launched import ONE_THREAD, Launched, serving

for name, number in ONE_THREAD.items():  # before anybody imports torch
    os.environ.setdefault(name, number)


def pytest_configure(config: pytest.Config) -> None:
    """Triton kernels run in Triton's interpreter, on the CPU, unless it is the GPU that is tested."""
    if config.getoption("markexpr") != "gpu":  # before anybody imports triton
        os.environ.setdefault("TRITON_INTERPRET", "1")


FAULTS_TABLE = "FAULTS_TABLE"
"""Environment variable: the file that gets a line for every test of a fault, for the table of the documents."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    for mark in item.iter_markers("fault"):
        if not any(name == "fault" for name, _ in item.user_properties):
            item.user_properties.append(("fault", list(mark.args)))
    report = yield
    if report.failed:  # a fixture's server never hears of the error, and takes its log with it
        servers = [value for value in getattr(item, "funcargs", {}).values() if isinstance(value, Launched)]
        report.sections += [("log of the server", server.text[-8000:]) for server in servers if server.log.exists()]
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """With workers beside it this runs where their reports come together."""
    properties: dict[str, Any] = dict(report.user_properties)
    path = os.environ.get(FAULTS_TABLE)
    if path is None or "fault" not in properties or "PYTEST_XDIST_WORKER" in os.environ or report.when != "call":
        return
    number, what, expected = properties["fault"]
    found = str(properties.get("seen", "as expected")) if report.passed else "**failed**"
    with Path(path).open("a") as table:
        table.write(json.dumps({"fault": number, "what": what, "expected": expected, "seen": found}) + "\n")


MakeModel = Callable[..., Path]

SMALL_ONEDNN_CACHES = {"LRU_CACHE_CAPACITY": "16", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}
"""oneDNN keeps what it compiled for a shape, up to 1,024 times: in a test of leaks that would look like one."""


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """Makes the folder of a tiny random model, each one once: ``tiny_model("llama", num_hidden_layers=1)``."""
    made: dict[str, Path] = {}

    def make(model_type: str, **changes: Any) -> Path:
        key = f"{model_type} {sorted(changes.items())}"
        if key not in made:
            from tiny_models import make_tiny_model

            made[key] = make_tiny_model(model_type, tmp_path_factory.mktemp(model_type), **changes)
        return made[key]

    return make


@pytest.fixture(scope="session")
def embedded() -> Iterator[Launched]:
    """A server of the embedded model, with every flag at its default and all threads."""
    with serving(environ={}) as server:
        yield server


@pytest.fixture(scope="session")
def tiny_llama(tiny_model: MakeModel) -> Path:
    """The model of `tiny`."""
    return tiny_model("llama")


@pytest.fixture(scope="session")
def tiny(tiny_llama: Path) -> Iterator[Launched]:
    """A server of a tiny random model in float32, whose tokens `transformers` can be asked for."""
    with serving("--model-id", str(tiny_llama), "--enable-prefill-logprobs") as server:
        yield server


@pytest.fixture(scope="session")
def reciting_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model whose answers tests know: see `integration.reciting`."""
    from integration.reciting import make_reciting_model

    return make_reciting_model(tmp_path_factory.mktemp("reciting"))


@pytest.fixture(scope="session")
def reciting(reciting_model: Path) -> Iterator[Launched]:
    """A server of it."""
    with serving("--model-id", str(reciting_model), environ=ONE_THREAD | SMALL_ONEDNN_CACHES) as server:
        yield server
