from __future__ import annotations

import socket
import stat
from pathlib import Path

import pytest
from text_generation_launcher.errors import CannotListen
from text_generation_launcher.sockets import check_port, free_port, socket_path


def test_the_socket_folder_is_private_and_goes_with_the_launch() -> None:
    with socket_path(None, 1) as first, socket_path(None, 1) as second:
        folder = Path(first).parent
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert folder != Path(second).parent
        (folder / "shard-0").touch()
    assert not folder.exists()


def test_a_long_temporary_folder_is_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with socket_path(None, 1) as path:
        assert len(path) < 100
    assert list(long.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with pytest.raises(CannotListen, match=r"No such file.*set TMPDIR or --shard-uds-path"), socket_path(None, 1):
        pass


def test_a_given_path_is_used_and_a_stale_socket_removed(tmp_path: Path) -> None:
    path = tmp_path / "tgi-0"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    with socket_path(str(tmp_path / "tgi"), 1) as given:
        assert given == str(tmp_path / "tgi")
        assert not path.exists()


def test_a_socket_of_a_running_server_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "tgi-1"
    with socket.socket(socket.AF_UNIX) as living:
        living.bind(str(path))
        living.listen()
        with pytest.raises(CannotListen, match="belongs to a running server"), socket_path(str(tmp_path / "tgi"), 2):
            pass
        assert path.exists()


def test_a_taken_port_is_one_clear_line() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(CannotListen, match=f"^Port {port} on 0.0.0.0 is already in use: "):
            check_port("0.0.0.0", port)
        assert free_port(port) != port
    check_port("0.0.0.0", port)
    assert free_port(port) == port
    assert free_port(0) > 0


def test_an_address_of_another_machine_is_one_clear_line() -> None:
    with pytest.raises(CannotListen, match=r"^Cannot listen on 192\.0\.2\.1 port 80: "):
        check_port("192.0.2.1", 80)
