"""The command line of `text-generation-router`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

import pytest
from text_generation_router import cli
from text_generation_router.config import RouterFlags


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for field in fields(RouterFlags):
        monkeypatch.delenv(cli.ENVIRONMENT.get(field.name, field.name.upper()), raising=False)
    yield


def test_no_flags_are_the_defaults() -> None:
    assert cli.parse([]) == RouterFlags()


def test_flags() -> None:
    argv = "--max-total-tokens 20 -p 0 -g 5 --hostname :: --cors-allow-origin a --cors-allow-origin b --json-output"
    flags = cli.parse([*argv.split(), "--disable-grammar-support", "--waiting-served-ratio=0.5"])
    assert flags == RouterFlags(
        max_total_tokens=20,
        port=0,
        graceful_termination_timeout=5,
        hostname="::",
        cors_allow_origin=("a", "b"),
        json_output=True,
        disable_grammar_support=True,
        waiting_served_ratio=0.5,
    )


def test_the_environment_is_read_and_the_command_line_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "PORT": "8080", "MAX_BEST_OF": "3", "API_KEY": "secret", "DISABLE_GRAMMAR_SUPPORT": "true",
        "COMPUTE_TYPE": "2-h200", "TGI_LAUNCHER_NONCE": "n1", "MAX_INPUT_TOKENS": "",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    flags = cli.parse(["--port", "9090"])
    assert (flags.port, flags.max_best_of, flags.api_key) == (9090, 3, "secret")
    assert (flags.disable_grammar_support, flags.compute_type, flags.launcher_nonce) == (True, "2-h200", "n1")
    assert flags.max_input_tokens is None


@pytest.mark.parametrize("word", cli.REFUSED)
def test_what_is_not_there_is_refused_by_name(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([word], [f"{word}=x"]):
        with pytest.raises(SystemExit) as exit_:
            cli.parse(argv)
        assert exit_.value.code == 2
        assert f"does not support {word}: {cli.REFUSED[word]}." in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--nope"], ["--port", "x"], ["--port", "70000"], ["--max-best-of", "-1"], ["extra"]])
def test_wrong_usage(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.parse(argv)
    assert exit_.value.code == 2


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--version"], ["-V"]])
def test_questions(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.parse(argv)
    assert exit_.value.code == 0
    assert "text-generation-router" in capsys.readouterr().out


def test_every_flag_shown_has_a_field() -> None:
    assert set(cli.HELP) <= {field.name for field in fields(RouterFlags)}
