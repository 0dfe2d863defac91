"""schemathesis believes what `/api-doc/openapi.json` says, and tries it out on a real server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from integration.launched import serving

SCHEMATHESIS = Path(sys.executable).parents[1] / "schemathesis" / "bin" / "schemathesis"
CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
    "response_headers_conformance", "unsupported_method", "allow_header_conformance", "ignored_auth",
)  # fmt: skip
KEY = "key-of-the-test"


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_server_does_what_its_document_says(tmp_path: Path) -> None:
    with serving("--max-total-tokens", "256", "--api-key", KEY) as server:
        run = subprocess.run(
            [
                *(SCHEMATHESIS, "run", f"{server.url}/api-doc/openapi.json", "--continue-on-failure"),
                *("--phases", "examples,coverage,fuzzing,stateful", "--checks", ",".join(CHECKS)),
                *("--max-examples", "100", "--seed", "1", "--header", f"Authorization: Bearer {KEY}"),
            ],
            cwd=tmp_path,  # it keeps what it finds
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stdout[-20_000:] + run.stderr
        assert server.client.get("/health").status_code == 200
