"""`--tls-cert` and `--tls-key`, with an authority of the test's own."""

from __future__ import annotations

import ssl
from pathlib import Path

import httpx2
import pytest
import trustme
from integration.asking import body
from integration.launched import refusal, starting


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    paths = {name: folder / f"{name}.pem" for name in ("authority", "cert", "key")}
    authority.cert_pem.write_to_path(str(paths["authority"]))
    for blob in issued.cert_chain_pems:
        blob.write_to_path(str(paths["cert"]), append=True)
    issued.private_key_pem.write_to_path(str(paths["key"]))
    return paths


@pytest.mark.slow
def test_answers_come_over_tls_and_only_over_tls(files: dict[str, Path]) -> None:
    with starting("--tls-cert", str(files["cert"]), "--tls-key", str(files["key"])) as server:
        server.trust(files["authority"])
        server.wait_until_ready()
        assert server.url.startswith("https://")
        answer = server.client.post("/generate", json=body("What is the capital of France?", max_new_tokens=8))
        assert answer.status_code == 200
        with server.client.stream("POST", "/generate_stream", json=body("Hello", max_new_tokens=4)) as stream:
            assert sum(line.startswith("data:") for line in stream.iter_lines()) >= 1
        with pytest.raises(httpx2.TransportError):
            httpx2.get(server.url.replace("https", "http") + "/health")
        old = ssl.create_default_context(cafile=str(files["authority"]))
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        assert httpx2.get(server.url + "/health", verify=old).status_code == 200
        assert server.stop() == 0


def test_files_that_are_no_pair_end_the_start(files: dict[str, Path]) -> None:
    both = ("--tls-cert", str(files["cert"]), "--tls-key", str(files["authority"]))
    assert "cannot be used" in refusal(*both)
