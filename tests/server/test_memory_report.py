"""What `plan` prints, for people and for programs."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from text_generation_server.config import ConfigError, PlanFlags, ShardConfig, resolve_plan
from text_generation_server.memory_report import Report, print_table, report, rows_of, run, to_json

MakeModel = Callable[..., Path]


def made(folder: Path, device: str | None = "24GiB", **flags: Any) -> Report:
    return report(resolve_plan(PlanFlags(model_id=str(folder), **flags), {}), device, {})


def table(each: Report) -> dict[str, tuple[str, str]]:
    return {name: (amount, why) for name, amount, why in rows_of(each)}


def test_the_table_adds_up(tiny_model: MakeModel) -> None:
    each = made(tiny_model("llama"), max_batch_total_tokens=4096, enable_prefill_logprobs=True)
    rows = table(each)
    assert rows["memory"][0] == "24.00 GiB"
    assert rows["weights"] == ("321.3 KiB", "82,240 parameters in float32")
    assert rows["KV cache"][1].startswith("4,096 tokens (256 blocks of 16, 0.5 KiB a token)")
    assert rows["longest request"] == ("512 tokens", "prompt and output: the model's positions")
    assert rows["of 512 tokens"][0] == "8 at once"
    assert "prompt logprobs" in rows
    plan = each.plan
    parts = plan.sizes.weight_bytes + plan.device.overhead_bytes + plan.kept_free_bytes + plan.step_bytes
    assert parts + plan.cache_bytes <= plan.device.usable_bytes


def test_it_is_printed_for_people(tiny_model: MakeModel) -> None:
    stream = io.StringIO()
    print_table(made(tiny_model("llama"), device="L4", num_shard=2), stream)
    text = stream.getvalue()
    assert "on L4 (21.90 GiB), each of 2 shards" in text
    assert "--max-total-tokens 512 (the model's positions)" in text
    assert "--max-input-tokens 511 (`max_total_tokens` - 1)" in text
    assert "--max-batch-prefill-tokens 4096 (the default)" in text
    assert "128 requests of 512 tokens can use)" in text


def test_requests_of_several_lengths(tiny_model: MakeModel) -> None:
    each = made(tiny_model("llama", max_position_embeddings=8192), max_batch_total_tokens=16384)
    assert each.concurrency == {1024: 16, 4096: 4, 8192: 2}


def test_programs_get_one_object(tiny_model: MakeModel) -> None:
    each = made(tiny_model("llama"))
    content = json.loads(to_json(each))
    assert content["fits"] is True and content["problem"] is None
    assert content["bytes_on_each_shard"]["kv_cache"] == each.plan.cache_bytes
    assert content["kv_cache"]["tokens"] == content["limits"]["max_batch_total_tokens"]["value"] == 65536
    assert content["concurrency"][-1] == {"tokens": 512, "requests": 128}


def test_what_is_unknown_is_said_not_guessed(tiny_model: MakeModel) -> None:
    each = made(tiny_model("jetmoe"))
    assert table(each)["KV cache"][0] == "unknown"
    content = json.loads(to_json(each))
    assert content["unknown_until_loaded"]
    assert content["kv_cache"]["tokens"] is None and content["bytes_on_each_shard"]["kv_cache"] is None
    assert content["limits"] == {}


def test_what_does_not_fit_is_printed_before_it_is_an_error(
    tiny_model: MakeModel, capsys: pytest.CaptureFixture[str]
) -> None:
    config = resolve_plan(PlanFlags(model_id=str(tiny_model("llama"))), {})
    with pytest.raises(ConfigError, match=r"not enough memory on a GPU with 0\.50 GiB"):
        run(config, "512MiB", {}, as_json=False)
    assert "weights" in capsys.readouterr().out
    with pytest.raises(ConfigError):
        run(config, "512MiB", {}, as_json=True)
    assert json.loads(capsys.readouterr().out)["fits"] is False


def test_this_machine_is_the_default(tiny_model: MakeModel) -> None:
    assert made(tiny_model("llama"), device=None).plan.device.kind in ("cpu", "cuda")
    assert made(tiny_model("llama"), device=" CPU ").plan.device.kind == "cpu"


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"num_shard": 0}, "`--num-shard` must be at least 1"),
        ({"max_total_tokens": -5}, "`--max-total-tokens` must be at least 1"),
        ({"max_batch_prefill_tokens": 10**30}, "`--max-batch-prefill-tokens` must be at least 1 and below 2**31"),
        ({"max_concurrent_requests": 0}, "`--max-concurrent-requests` must be at least 1"),
        ({"cuda_memory_fraction": 0.0}, "`--cuda-memory-fraction` must be in (0, 1]"),
        ({"cuda_memory_fraction": float("nan")}, "`--cuda-memory-fraction` must be in (0, 1]"),
        ({"dtype": "int4"}, "`--dtype` must be one of"),
    ],
)
def test_flags_that_make_no_sense(flags: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        resolve_plan(PlanFlags(model_id="embedded", **flags), {})
    assert text in str(refusal.value)


def test_the_shard_that_is_planned_is_the_one_that_is_started() -> None:
    flags = PlanFlags(model_id="embedded", num_shard=2, enable_prefill_logprobs=True, max_batch_size=3)
    expected = ShardConfig(model_id="embedded", uds_path=Path(), world_size=2, prefill_logprobs=True, max_batch_size=3)
    assert resolve_plan(flags, {}) == expected
    assert resolve_plan(flags, {"TGI_SWAPS": "0"}) == dataclasses.replace(expected, swaps=False)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (None, "has no config.json"),
        ("[]", "config.json of the model is not a JSON object"),
        ("{", "config.json of the model cannot be read"),
        ("\xff", "config.json of the model cannot be read"),
        ("[" * 100_000, "config.json of the model cannot be read"),
        ('{"model_type": "llama", "hidden_size": 1e400, "dtype": "float32"}', "cannot be served"),
        ('{"model_type": "llama", "hidden_size": 4611686018427387904, "dtype": "float32"}', "cannot be served"),
        ('{"model_type": ["llama"]}', "cannot be served"),
        ('{"model_type": "llama", "dtype": "float32", "vocab_size": -1}', "cannot be served"),
        ('{"model_type": "llama", "dtype": "float32", "num_attention_heads": 0}', "cannot be served"),
        ('{"model_type": "llama", "dtype": "no such"}', "cannot be served"),
        ('{"model_type": "llama", "dtype": "float32", "num_hidden_layers": 1000000000}', "cannot be served"),
    ],
)
def test_hostile_configurations(config: str | None, text: str, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "config.json").write_bytes(config.encode("latin-1"))
    with pytest.raises(ConfigError, match=re.escape(text)) as refusal:
        made(tmp_path)
    assert len(str(refusal.value).splitlines()) == 1
