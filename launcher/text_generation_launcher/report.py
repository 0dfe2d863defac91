"""What runs here (`--env`), and what a person sees when the server is ready."""

from __future__ import annotations

import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import fields

from text_generation_launcher.config import LauncherConfig
from text_generation_launcher.devices import package_version, query
from text_generation_launcher.flags import Flags
from text_generation_launcher.process import Seconds

DISTRIBUTION = "text-generation-inference"


def version() -> str:
    return package_version(DISTRIBUTION)


def runtime_report(environ: Mapping[str, str]) -> str:
    """TGI's report for bug tickets; Python's versions stand where Cargo's was."""
    return "\n".join(
        [
            "Runtime environment:",
            f"Target: {platform.machine()}-{sys.platform}",
            f"Python version: {platform.python_version()}",
            f"Launcher version: {version()}",
            *(f"{name.capitalize()} version: {package_version(name)}" for name in ("torch", "transformers", "triton")),
            f"Commit sha: {environ.get('GIT_SHA') or 'N/A'}",
            f"Docker label: {environ.get('DOCKER_LABEL') or 'N/A'}",
            f"nvidia-smi: {_indented(query()) or 'N/A'}",
            f"xpu-smi: {_indented(_output('xpu-smi', 'discovery')) or 'N/A'}",
            f"hpu-smi: {_indented(_output('hpu-smi')) or 'N/A'}",
        ]
    )


def given_arguments(flags: Flags) -> str:
    """The flags that differ from their defaults, without secrets."""
    words = []
    for field in fields(Flags):
        value = getattr(flags, field.name)
        if value == field.default:
            continue
        if field.name in ("api_key", "ngrok_authtoken"):
            value = "***"
        words.append("--" + field.name.replace("_", "-"))
        if value is not True:
            words += [shlex.quote(str(item)) for item in (value if isinstance(value, list) else [value])]
    return " ".join(words) or "(defaults)"


def url(config: LauncherConfig) -> str:
    """Where a client on this machine finds the server."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(config.hostname, config.hostname)
    if ":" in host and not host.startswith("["):
        host = f"[{host}]"
    scheme = "http" if config.flags.tls_cert is None else "https"
    return f"{scheme}://{host}:{config.flags.port}"


def step_times(seconds: Seconds) -> str:
    """``import 1.93 s, load 0.31 s``: the steps that a person can notice; the total is not a step."""
    return ", ".join(f"{step} {spent:.2f} s" for step, spent in seconds.items() if step != "total" and spent >= 0.01)


def ready_text(config: LauncherConfig) -> str:
    """For a person: where the server is, and two lines to try."""
    key = " -H 'authorization: Bearer YOUR_API_KEY'" if config.flags.api_key is not None else ""
    body = """'{"inputs": "What is the capital of France?", "parameters": {"max_new_tokens": 20}}'"""
    request = f"-H 'content-type: application/json'{key} -d {body}"
    return "\n".join(
        [
            "",
            f"{config.flags.model_id} is ready at {url(config)}. Try:",
            "",
            f"  curl {url(config)}/generate {request}",
            f"  curl -N {url(config)}/generate_stream {request}",
            "",
        ]
    )


def _indented(lines: list[str]) -> str:
    return "".join("\n   " + line for line in lines)


def _output(*command: str) -> list[str]:
    if shutil.which(command[0]) is None:
        return []
    try:
        answer = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.rstrip() for line in answer.stdout.splitlines() if line.strip()]
