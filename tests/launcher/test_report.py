from __future__ import annotations

from typing import Any

import pytest
from text_generation_launcher.config import LauncherConfig, resolve
from text_generation_launcher.devices import Devices
from text_generation_launcher.flags import Flags
from text_generation_launcher.report import given_arguments, ready_text, step_times, url


def config(**flags: Any) -> LauncherConfig:
    return resolve(Flags(**flags), Devices(count=None, card=None))


@pytest.mark.parametrize(
    ("hostname", "expected"),
    [
        ("0.0.0.0", "http://127.0.0.1:3000"),
        ("::", "http://[::1]:3000"),
        ("fd00::1", "http://[fd00::1]:3000"),
        ("10.0.0.1", "http://10.0.0.1:3000"),
    ],
)
def test_the_url_is_one_that_a_client_here_can_use(hostname: str, expected: str) -> None:
    assert url(config(hostname=hostname)) == expected


def test_arguments_are_shown_without_secrets_and_defaults() -> None:
    flags = Flags(api_key="hush", port=80, json_output=True, cors_allow_origin=["a", "b c"])
    assert given_arguments(flags) == "--port 80 --cors-allow-origin a 'b c' --api-key '***' --json-output"
    assert given_arguments(Flags()) == "(defaults)"


def test_the_lines_to_try_ask_for_a_key_where_one_is_needed() -> None:
    assert "authorization: Bearer YOUR_API_KEY" in ready_text(config(api_key="hush"))
    assert "authorization" not in ready_text(config())


def test_only_steps_that_a_person_notices_are_shown() -> None:
    assert step_times({"import": 1.934, "find": 0.0001, "load": 0.3, "total": 2.3}) == "import 1.93 s, load 0.30 s"
