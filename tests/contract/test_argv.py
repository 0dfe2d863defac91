"""Every argv that the launcher makes parses in the command line that it is meant for."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import typer
from text_generation_launcher.config import resolve
from text_generation_launcher.devices import Devices
from text_generation_launcher.flags import Dtype, Flags
from text_generation_launcher.plan import Launch, ProcessSpec, make_plan, plan_spec

FLAGS = [
    pytest.param(Flags(), id="defaults"),
    pytest.param(Flags(model_id="org/model", revision="refs/pr/1"), id="a model of the hub"),
    pytest.param(
        Flags(
            model_id="org/model",
            revision="main",
            dtype=Dtype.FLOAT32,
            trust_remote_code=True,
            huggingface_hub_cache="/cache",
            weights_cache_override="/weights",
            num_shard=2,
            attention="torch",
            cuda_memory_fraction=0.5,
            shard_uds_path="/tmp/tgi",
            master_addr="127.0.0.1",
            master_port=29501,
            max_concurrent_requests=1,
            max_best_of=1,
            max_stop_sequences=1,
            max_top_n_tokens=1,
            max_input_tokens=1,
            max_total_tokens=2,
            waiting_served_ratio=1.2,
            max_batch_prefill_tokens=4,
            max_batch_total_tokens=5,
            max_waiting_tokens=6,
            max_batch_size=7,
            max_client_batch_size=8,
            payload_limit=9,
            enable_prefill_logprobs=True,
            disable_grammar_support=True,
            validation_workers=3,
            hostname="::1",
            port=8080,
            prometheus_port=9001,
            cors_allow_origin=["https://a.example", "https://b.example"],
            api_key="key",
            graceful_termination_timeout=10,
        ),
        id="every flag",
    ),
]


def parse(app: typer.Typer, arguments: Sequence[str]) -> dict[str, Any]:
    """Values of the (sub)command's parameters; nothing is run."""
    command: Any = typer.main.get_command(app)
    context = command.make_context("program", list(arguments))
    if not hasattr(command, "resolve_command"):
        return dict(context.params)
    name, command, rest = command.resolve_command(context, list(arguments))
    return dict(command.make_context(name, rest, parent=context).params)


def specs(flags: Flags) -> list[ProcessSpec]:
    launch = Launch(nonce="n", uds_path=flags.shard_uds_path or "/run/x/shard", environ={})
    plan = make_plan(resolve(flags, Devices(count=None, card=None)), launch)
    return [spec for spec in (plan.download, *plan.shards, plan.router) if spec is not None]


def arguments(spec: ProcessSpec, module: str) -> list[str]:
    assert spec.argv[:3] == (sys.executable, "-m", module)
    return list(spec.argv[3:])


@pytest.mark.parametrize("flags", FLAGS)
def test_the_server_takes_the_launchers_argv(flags: Flags) -> None:
    from text_generation_server.cli import app

    for spec in specs(flags)[:-1]:
        values = parse(app, arguments(spec, "text_generation_server"))
        assert values["model_id"] == flags.model_id
        assert values["revision"] == flags.revision


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("device", [None, "24GiB"])
def test_the_server_takes_the_argv_of_a_plan(flags: Flags, device: str | None) -> None:
    from text_generation_server.cli import app

    wanted = replace(flags, plan=True, plan_device=device, json_output=device is not None)
    config = resolve(wanted, Devices(count=None, card=None))
    values = parse(app, arguments(plan_spec(config, {}), "text_generation_server"))
    assert values["device"] == device
    assert values["json_output"] is (device is not None)
    assert values["num_shard"] == config.num_shard
    for name in ("model_id", "max_total_tokens", "max_batch_size", "max_concurrent_requests", "max_input_tokens"):
        assert values[name] == getattr(flags, name)


@pytest.mark.parametrize("flags", FLAGS)
def test_the_router_takes_the_launchers_argv(flags: Flags) -> None:
    from text_generation_router.cli import app

    [*_, spec] = specs(flags)
    values = parse(app, arguments(spec, "text_generation_router"))
    assert values["port"] == flags.port
    assert values["max_total_tokens"] == flags.max_total_tokens
    assert list(values["cors_allow_origin"] or ()) == list(flags.cors_allow_origin or ())
