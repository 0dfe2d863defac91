"""The command line and its environment variables, flag by flag."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from text_generation_launcher import cli, environment, launch
from text_generation_launcher.flags import Dtype, FlagInfo, Flags, KvCacheDtype, Switch, UsageStats, flag_table
from typer.testing import CliRunner

Parse = Callable[..., Any]

VALUES: dict[type, tuple[str, Any]] = {
    bool: ("true", True),
    int: ("7", 7),
    float: ("0.5", 0.5),
    str: ("text", "text"),
    list: ("https://a.example,https://b.example", ["https://a.example", "https://b.example"]),
    Switch: ("true", Switch.TRUE),
    Dtype: ("bfloat16", Dtype.BFLOAT16),
    KvCacheDtype: ("fp8_e5m2", KvCacheDtype.FP8_E5M2),
    UsageStats: ("off", UsageStats.OFF),
}

every_flag = pytest.mark.parametrize("flag", flag_table(), ids=lambda flag: flag.name)


def value_of(flag: FlagInfo) -> tuple[str, Any]:
    return ("127.0.0.1", "127.0.0.1") if flag.name == "hostname" else VALUES[flag.kind]


@dataclasses.dataclass
class Outcome:
    exit_code: int
    output: str
    flags: Flags | None
    warnings: list[str]


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Parse:
    """Run the command line up to the launch."""

    def parse(*argv: str, **environ: str) -> Outcome:
        seen: list[Flags] = []

        def record(flags: Flags, environ: Mapping[str, str], warnings: Sequence[str]) -> int:
            seen.append(flags)
            return 0

        monkeypatch.setattr(launch, "launch", record)
        warnings = environment.adopt(environ)
        clean = {name: None for flag in flag_table() for name in (flag.variable, environment.PREFIX + flag.variable)}
        result = CliRunner().invoke(cli.app, argv, env={**clean, **environ}, obj=warnings)
        return Outcome(result.exit_code, result.output, seen[0] if seen else None, warnings)

    return parse


def test_defaults_are_tgis_where_tgi_has_them(parse: Parse) -> None:
    flags = parse().flags
    assert flags == Flags()
    assert (flags.port, flags.hostname, flags.max_concurrent_requests, flags.max_best_of) == (3000, "0.0.0.0", 128, 2)
    assert (flags.max_stop_sequences, flags.max_top_n_tokens, flags.max_client_batch_size) == (4, 5, 4)
    assert (flags.payload_limit, flags.validation_workers, flags.graceful_termination_timeout) == (2_000_000, 2, 90)


@every_flag
def test_every_flag_is_read_from_the_command_line(parse: Parse, flag: FlagInfo) -> None:
    text, value = value_of(flag)
    argv = [environment.option_name(flag)]
    if flag.kind is list:
        argv = [word for item in value for word in (argv[0], item)]
    elif flag.kind is not bool:
        argv.append(text)
    assert getattr(parse(*argv).flags, flag.name) == value


@every_flag
def test_every_flag_is_read_from_its_variable(parse: Parse, flag: FlagInfo) -> None:
    text, value = value_of(flag)
    assert getattr(parse(**{flag.variable: text}).flags, flag.name) == value


@every_flag
def test_every_flag_is_read_from_its_variable_with_the_prefix(parse: Parse, flag: FlagInfo) -> None:
    text, value = value_of(flag)
    assert getattr(parse(**{f"TGI_{flag.variable}": text}).flags, flag.name) == value


NO_ADDRESS = [flag for flag in flag_table() if flag.name not in ("cors_allow_origin", "otlp_endpoint", "api_key")]


@pytest.mark.parametrize("flag", NO_ADDRESS, ids=lambda flag: flag.name)
def test_a_service_address_in_a_prefixed_variable_is_ignored_with_a_warning(parse: Parse, flag: FlagInfo) -> None:
    outcome = parse(**{f"TGI_{flag.variable}": "tcp://10.0.0.1:80"})
    assert outcome.flags == Flags()
    [warning] = outcome.warnings
    assert f"TGI_{flag.variable}" in warning


@pytest.mark.parametrize("flag", [f for f in flag_table() if f.kind is bool], ids=lambda flag: flag.name)
@pytest.mark.parametrize(
    ("word", "value"), [("true", True), ("1", True), ("yes", True), ("false", False), ("0", False), ("no", False)]
)
def test_booleans_in_the_environment(parse: Parse, flag: FlagInfo, word: str, value: bool) -> None:
    assert getattr(parse(**{flag.variable: word}).flags, flag.name) is value


NOT_TEXT = [flag for flag in flag_table() if flag.kind not in (str, list)]


@pytest.mark.parametrize("flag", NOT_TEXT, ids=lambda flag: flag.name)
def test_a_bad_value_in_the_plain_variable_is_a_usage_error_that_names_it(parse: Parse, flag: FlagInfo) -> None:
    outcome = parse(**{flag.variable: "tcp://10.0.0.1:80"})
    assert outcome.exit_code == 2
    assert f"'{flag.variable}'" in outcome.output


@pytest.mark.parametrize("flag", [f for f in NOT_TEXT if f.kind is not bool], ids=lambda flag: flag.name)
def test_a_bad_value_on_the_command_line_is_a_usage_error(parse: Parse, flag: FlagInfo) -> None:
    assert parse(environment.option_name(flag), "-1x").exit_code == 2


@pytest.mark.parametrize(
    ("argv", "environ", "port"),
    [
        pytest.param(["--port", "1"], {"PORT": "2", "TGI_PORT": "3"}, 1, id="the command line wins"),
        pytest.param(["-p", "1"], {"PORT": "2"}, 1, id="also in its short form"),
        pytest.param([], {"PORT": "2", "TGI_PORT": "3"}, 3, id="the prefixed variable wins over the plain one"),
        pytest.param([], {"PORT": "2", "TGI_PORT": "tcp://x:1"}, 2, id="unless it is no port"),
        pytest.param([], {"PORT": "2", "TGI_PORT": "70000"}, 2, id="or out of range"),
        pytest.param([], {"PORT": "", "TGI_PORT": ""}, 3000, id="empty is unset"),
    ],
)
def test_precedence(parse: Parse, argv: list[str], environ: dict[str, str], port: int) -> None:
    assert parse(*argv, **environ).flags.port == port


def test_a_hostname_that_a_container_sets_is_ignored_with_tgis_warning(parse: Parse) -> None:
    outcome = parse(HOSTNAME="3f2a9c1d")
    assert outcome.flags.hostname == "0.0.0.0"
    assert outcome.warnings == ["Invalid hostname, defaulting to 0.0.0.0: '3f2a9c1d' is no IP address"]


@pytest.mark.parametrize("name", ["HOSTNAME", "TGI_HOSTNAME"])
def test_localhost_is_a_wish_in_the_environment_too(parse: Parse, name: str) -> None:
    outcome = parse(**{name: "localhost"})
    assert outcome.flags.hostname == parse("--hostname", "localhost").flags.hostname == "localhost"
    assert outcome.warnings == []


def test_a_key_that_looks_like_an_address_is_a_key(parse: Parse) -> None:
    assert parse(TGI_API_KEY="a://b").flags.api_key == "a://b"


@pytest.mark.parametrize("value", ["true", "false"])
def test_sharded_takes_a_value(parse: Parse, value: str) -> None:
    assert parse("--sharded", value).flags.sharded is Switch(value)
    assert parse("--sharded").exit_code == 2


def test_env_has_no_variable_of_its_own(parse: Parse) -> None:
    assert parse(ENV="true").flags.env is False
    assert parse("-e").flags.env is True


@pytest.mark.parametrize("argv", [["--unknown"], ["--port", "x"], ["--dtype", "int4"], ["--json-output=maybe"]])
def test_wrong_usage_ends_with_2(parse: Parse, argv: list[str]) -> None:
    assert parse(*argv).exit_code == 2


@every_flag
def test_help_names_every_flag_in_full(parse: Parse, flag: FlagInfo) -> None:
    outcome = parse("--help")
    assert outcome.exit_code == 0
    assert f"{environment.option_name(flag)} " in outcome.output
    assert flag.variable in outcome.output.replace("\n" + " " * 34, " ")


def test_version(parse: Parse) -> None:
    outcome = parse("--version")
    assert (outcome.exit_code, outcome.output.split()[0]) == (0, "text-generation-launcher")


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["--quantize", "gptq"]])
def test_the_launcher_imports_nothing_heavy(argv: list[str]) -> None:
    code = (
        "import sys, text_generation_launcher.cli as cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'grpc', 'numpy', 'text_generation_router', 'text_generation_server'}\n"
        "assert not heavy & {name.partition('.')[0] for name in sys.modules}\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
