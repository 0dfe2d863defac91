"""`docs/compatibility.md` has a row for whatever TGI has, and for whatever this server has; what it says exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from contract import tgi_surface as tgi
from text_generation_launcher.benchmark.config import Flags as BenchmarkFlags
from text_generation_launcher.environment import option_name
from text_generation_launcher.flags import flag_table
from text_generation_router.api.openapi import OPERATIONS, document
from text_generation_router.metrics import Metrics

DOCUMENT = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text(encoding="utf-8")
SCHEMAS: dict[str, Any] = document("0")["components"]["schemas"]


def section(title: str) -> str:
    """The rows under a heading: their first cells."""
    (found,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", DOCUMENT, re.S | re.M)
    return "\n".join(line.split("|")[1] for line in found.splitlines() if line.startswith("| `"))


def words(text: str) -> set[str]:
    """What stands in back quotes; of a metric without its labels."""
    return {re.sub(r"^(tgi_\w+)\{.*", r"\1", word) for word in re.findall(r"`([^`]+)`", text)}


@pytest.mark.parametrize("path", tgi.PATHS)
def test_every_path_is_served_and_has_a_row(path: str) -> None:
    assert set(tgi.PATHS[path]) <= set(OPERATIONS[path])
    rows = words(section("Routes"))
    assert {f"{method} {path}" for method in tgi.PATHS[path]} <= rows


@pytest.mark.parametrize("path", OPERATIONS)
def test_every_path_of_ours_has_a_row(path: str) -> None:
    assert {f"{method} {path}" for method in OPERATIONS[path]} <= words(section("Routes"))


@pytest.mark.parametrize("name", [*tgi.REQUESTS, *tgi.ANSWERS])
def test_every_member_of_a_body_exists(name: str) -> None:
    assert {*tgi.REQUESTS.get(name, ()), *tgi.ANSWERS.get(name, ())} <= set(SCHEMAS[name]["properties"])


@pytest.mark.parametrize("name", tgi.PARAMETERS)
def test_every_parameter_of_a_native_request_has_a_row(name: str) -> None:
    rows = words(section("Fields of a native request"))
    assert name in rows or f"parameters.{name}" in rows


@pytest.mark.parametrize("body", ["ChatBody", "CompletionBody"])
def test_every_field_of_a_chat_or_completion_has_a_row(body: str) -> None:
    rows = {re.split(r"[:. ]", word)[0] for word in words(section("OpenAI's routes"))}
    missing = set(SCHEMAS[body]["properties"]) - rows
    # Said in every API in the same way, and answered so.
    assert missing <= {"stream"}


ANSWERS = [
    (name, words(fields))
    for row in section("Fields of answers").splitlines()
    for names, _, fields in [row.partition(":")]
    for name in sorted(words(names))
]


def test_every_type_of_answer_has_a_row() -> None:
    assert set(tgi.ANSWERS) <= {name for name, _ in ANSWERS}


@pytest.mark.parametrize(("name", "fields"), ANSWERS)
def test_a_row_has_all_fields_of_an_answer_and_no_other(name: str, fields: set[str]) -> None:
    assert fields == set(SCHEMAS[name]["properties"])


@pytest.mark.parametrize("flag", sorted({*tgi.LAUNCHER_FLAGS, *(option_name(flag)[2:] for flag in flag_table())}))
def test_every_flag_of_the_launcher_has_a_row(flag: str) -> None:
    assert f"--{flag}" in words(section("Launcher flags"))


@pytest.mark.parametrize("flag", tgi.BENCHMARK_FLAGS)
def test_every_flag_of_the_benchmark_has_a_row(flag: str) -> None:
    assert f"--{flag}" in words(section("text-generation-benchmark"))
    assert flag.replace("-", "_") in BenchmarkFlags.__dataclass_fields__


def test_every_metric_has_a_row_and_every_row_is_exported() -> None:
    rendered = Metrics(max_input_tokens=10, max_total_tokens=20).render().decode()
    exported = set(re.findall(r"^# TYPE (\S+) ", rendered, re.M))
    assert set(tgi.METRICS) <= exported
    assert exported == words(section("Metrics"))
