"""What a running server lets others see and do: listeners, code of a model's repository, names in errors."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import psutil
import pytest
from faults.hostile_model import KILL
from integration.asking import body
from integration.launched import serving

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("ranks", [1, 2])
def test_nothing_but_the_http_port_listens_beyond_this_machine(long_llama: Path, ranks: int) -> None:
    with serving("--model-id", str(long_llama), "--num-shard", str(ranks)) as server:
        port = int(server.url.rpartition(":")[2])
        listening = {
            (connection.laddr.ip, connection.laddr.port)
            for process in server.processes().values()
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
        if not listening:
            pytest.skip("the system does not tell who listens where")
        beyond = {each for each in listening if not ipaddress.ip_address(each[0]).is_loopback}
        assert beyond == {("0.0.0.0", port)}


def test_code_of_a_model_does_not_run_without_trust(hostile_model: Path) -> None:
    """Its configuration names a class in a file beside it; here the library's own is served."""
    with serving("--model-id", str(hostile_model)) as server:
        answer = server.client.post("/generate", json=body(KILL, max_new_tokens=3))
        assert answer.status_code == 200
        assert len(answer.json()["details"]["tokens"]) == 3
