"""The command line and its environment variables, flag by flag."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from text_generation_launcher.benchmark import cli, report
from text_generation_launcher.benchmark.config import ApiName, Flags
from typer.testing import CliRunner

TGI = {
    "tokenizer_name": "gpt2",
    "revision": "refs/pr/1",
    "sequence_length": 7,
    "decode_length": 7,
    "runs": 7,
    "warmups": 7,
    "temperature": 0.5,
    "top_k": 7,
    "top_p": 0.5,
    "typical_p": 0.5,
    "repetition_penalty": 0.5,
    "frequency_penalty": 0.5,
    "watermark": True,
    "do_sample": True,
    "master_shard_uds_path": "/run/shard-0",
    "top_n_tokens": 7,
}
"""TGI's flags that read the environment."""
SHORT = {"-t": "gpt2", "-b": 7, "-s": 7, "-d": 7, "-r": 7, "-w": 7, "-m": "/run/shard-0"}

Parse = Callable[..., Flags]


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Parse:
    """Run the command line up to the benchmark."""

    def parse(*argv: str, **environ: str) -> Flags:
        seen: list[Flags] = []

        def record(flags: Flags) -> int:
            seen.append(flags)
            return 0

        monkeypatch.setattr(report, "benchmark", record)
        clean = {field.name.upper(): None for field in dataclasses.fields(Flags)}
        result = CliRunner().invoke(cli.app, argv, env={**clean, **environ})
        assert result.exit_code == 0, result.output
        return seen[0]

    return parse


@pytest.mark.parametrize("name", TGI)
def test_tgis_flags_are_read_from_command_line_and_environment(parse: Parse, name: str) -> None:
    value = TGI[name]
    option = "--" + name.replace("_", "-")
    assert parse(*([option] if value is True else [option, str(value)])) == Flags(**{name: value})  # type: ignore[arg-type]
    assert getattr(parse(**{name.upper(): str(value)}), name) == value


def test_short_names_are_tgis(parse: Parse) -> None:
    flags = parse(*(word for name, value in SHORT.items() for word in (name, str(value))))
    assert (flags.tokenizer_name, flags.batch_size, flags.sequence_length, flags.decode_length) == ("gpt2", [7], 7, 7)
    assert (flags.runs, flags.warmups, flags.master_shard_uds_path) == (7, 7, "/run/shard-0")


def test_batch_size_is_repeatable_and_not_in_the_environment(parse: Parse) -> None:
    assert parse("-b", "1", "--batch-size", "4", BATCH_SIZE="9").batch_size == [1, 4]
    assert parse(BATCH_SIZE="9").batch_size is None


def test_our_own_flags(parse: Parse) -> None:
    flags = parse("--url", "http://x", "--api", "chat", "--model", "m", "--json", "-", "--plot", "x.png", API_KEY="k")
    assert (flags.url, flags.api, flags.model, flags.json, flags.plot, flags.api_key) == (
        *("http://x", ApiName.CHAT, "m", "-", "x.png", "k"),
    )


def test_wrong_usage_is_2_and_help_names_every_flag() -> None:
    runner = CliRunner()
    assert runner.invoke(cli.app, ["--runs", "many"]).exit_code == 2
    text = runner.invoke(cli.app, ["--help"]).output
    for field in dataclasses.fields(Flags):
        assert "--" + field.name.replace("_", "-") in text
    assert runner.invoke(cli.app, ["--version"]).output.startswith("text-generation-benchmark ")
