from __future__ import annotations

import os
import socket
import stat
import tempfile
from collections.abc import Iterator
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


def test_what_a_killed_launcher_left_goes_with_the_next_launch(
    short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(short_folder))
    left, young, other = (short_folder / name for name in ("text-generation-launch-a", "text-generation-launch-b", "c"))
    for folder in (left, young, other):
        folder.mkdir()
        (folder / "shard-0").touch()
    with socket_path(None, 1) as running:
        living = Path(running).parent
        for folder in (left, other, living):
            os.utime(folder, (0, 0))
        with socket_path(None, 1):
            assert not left.exists()
            assert young.exists()
            assert other.exists()
            assert living.exists()


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder whose own path leaves room for a socket's."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def padded(folder: Path, num_bytes: int) -> Path:
    """A path of ``num_bytes`` bytes in ``folder``."""
    return folder / ("x" * (num_bytes - len(str(folder)) - 1))


@pytest.mark.parametrize(
    ("num_bytes", "num_shard", "stays"),
    [
        pytest.param(67, 1, True, id="the longest socket is as long as it may be"),
        pytest.param(68, 1, False, id="one byte too many"),
        pytest.param(66, 11, True, id="rank 10 has two digits"),
        pytest.param(67, 11, False, id="and one byte too many"),
    ],
)
def test_a_temporary_folder_is_used_as_long_as_the_sockets_fit(
    short_folder: Path, monkeypatch: pytest.MonkeyPatch, num_bytes: int, num_shard: int, stays: bool
) -> None:
    temporary = padded(short_folder, num_bytes)
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    with socket_path(None, num_shard) as path, socket.socket(socket.AF_UNIX) as shard:
        assert (Path(path).parent.parent == temporary) is stays
        shard.bind(f"{path}-{num_shard - 1}")
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(("num_bytes", "num_shard"), [(105, 1), (105, 10), (104, 11)])
def test_a_given_path_may_be_as_long_as_the_sockets_fit(short_folder: Path, num_bytes: int, num_shard: int) -> None:
    given = str(padded(short_folder, num_bytes))
    with socket_path(given, num_shard) as path, socket.socket(socket.AF_UNIX) as shard:
        assert path == given
        shard.bind(f"{path}-{num_shard - 1}")
    with (
        pytest.raises(CannotListen, match=r"x-\d+ is longer than the 107 bytes .*: choose a shorter --shard-uds-path$"),
        socket_path(given + "x", num_shard),
    ):
        pass


def test_a_relative_path_is_made_absolute_before_it_is_measured(
    short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(short_folder)
    with socket_path("tgi", 1) as path:
        assert path == str(Path.cwd() / "tgi")
    with pytest.raises(CannotListen, match="is longer than the 107 bytes"), socket_path("x" * 105, 1):
        pass
    monkeypatch.setattr("tempfile.tempdir", ".")
    with socket_path(None, 1) as path:
        assert Path(path).is_absolute()


def test_an_empty_path_is_none_given() -> None:
    with socket_path("", 1) as path:
        assert Path(path).parent.name.startswith("text-generation-")


def test_a_path_that_ends_in_a_slash_is_the_same_for_router_and_shards(tmp_path: Path) -> None:
    with socket_path(f"{tmp_path}/tgi/", 1) as path:
        assert path == str(tmp_path / "tgi")


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
    check_port("0.0.0.0", port)


def test_a_free_port_is_one() -> None:
    check_port("127.0.0.1", free_port())


def test_an_address_of_another_machine_is_one_clear_line() -> None:
    with pytest.raises(CannotListen, match=r"^Cannot listen on 192\.0\.2\.1 port 80: "):
        check_port("192.0.2.1", 80)
