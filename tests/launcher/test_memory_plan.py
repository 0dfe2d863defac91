"""`--plan` up to the child that makes it; what it prints is in `integration/test_plan.py`."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from text_generation_launcher import memory_plan
from text_generation_launcher.config import resolve
from text_generation_launcher.devices import Devices
from text_generation_launcher.flags import Dtype, Flags
from text_generation_launcher.plan import ProcessSpec, Role, plan_spec


def spec(environ: dict[str, str] | None = None, **flags: Any) -> ProcessSpec:
    return plan_spec(resolve(Flags(plan=True, **flags), Devices(count=None, card=None)), environ or {})


def test_the_child_gets_what_decides_about_memory() -> None:
    made = spec(
        model_id="org/model", revision="main", dtype=Dtype.BFLOAT16, plan_device="L4", num_shard=2, max_total_tokens=64,
        max_input_tokens=32, max_batch_size=4, enable_prefill_logprobs=True, cuda_memory_fraction=0.5, json_output=True,
    )  # fmt: skip
    assert made.role is Role.PLAN
    assert made.argv == (
        *(sys.executable, "-m", "text_generation_server", "plan", "org/model"),
        *("--revision", "main", "--dtype", "bfloat16", "--cuda-memory-fraction", "0.5", "--enable-prefill-logprobs"),
        *("--max-total-tokens", "64", "--max-batch-size", "4", "--max-concurrent-requests", "128"),
        *("--num-shard", "2", "--max-input-tokens", "32", "--device", "L4", "--json-output"),
    )


def test_without_flags_it_is_the_embedded_model_on_this_machine() -> None:
    argv = spec().argv
    assert argv[4] == "embedded"
    assert "--device" not in argv


def test_the_child_finds_the_hub() -> None:
    made = spec({"HF_TOKEN": "secret", "MAX_TOTAL_TOKENS": "7"}, huggingface_hub_cache="/cache")
    assert made.env["HF_TOKEN"] == "secret"
    assert made.env["HF_HUB_CACHE"] == "/cache"
    assert "MAX_TOTAL_TOKENS" not in made.env


def child(code: str) -> ProcessSpec:
    return ProcessSpec(role=Role.PLAN, argv=(sys.executable, "-c", code), env={})


@pytest.mark.parametrize(
    ("code", "exit_code", "out", "err"),
    [
        ("print('plan')", 0, "plan\n", ""),
        (
            """import sys; sys.stderr.write('{"level": "ERROR", "message": "no room"}\\n'); sys.exit(1)""",
            1,
            "",
            "Error: no room\n",
        ),
        ("""import sys; sys.stderr.write('{"level": "WARNING", "message": "x"}\\n')""", 0, "", "Warning: x\n"),
        ("""import sys; sys.stderr.write('{"level": "INFO", "message": "x"}\\nplain\\n')""", 0, "", "plain\n"),
        ("import os; os.kill(os.getpid(), 9)", 137, "", ""),
    ],
)
def test_the_plan_goes_to_standard_output_and_the_rest_to_standard_error(
    code: str, exit_code: int, out: str, err: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_plan, "plan_spec", lambda *_: child(code))
    assert memory_plan.print_plan(Flags(plan=True), {}) == exit_code
    assert capfd.readouterr() == (out, err)


def test_wrong_flags_are_refused_before_a_child_is_started(capfd: pytest.CaptureFixture[str]) -> None:
    assert memory_plan.print_plan(Flags(plan=True, max_total_tokens=1), {}) == 1
    assert capfd.readouterr().err.startswith('Error: ArgumentValidation("`max_total_tokens` must be > 1')
