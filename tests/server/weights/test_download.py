"""Downloads that break, are killed, meet one another, or are led to another host: against a hub on a local port."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from downloading import FILES, WEIGHTS, Outcome, download, outcome_of, start_download
from fake_hub import FakeHub, Repository, served

NAME = "model.safetensors"
NINE_TENTHS = len(WEIGHTS) * 9 // 10
BLOBS = "hub/models--org--model/blobs"


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with served(org__model=Repository(FILES)) as hub:
        yield hub


def weights_of(outcome: Outcome) -> bytes:
    assert (outcome.code, outcome.errors) == (0, [])
    assert not list(outcome.folder.parents[1].glob("blobs/*.incomplete"))
    return (outcome.folder / NAME).read_bytes()


def kill_at(num_bytes: int, hub: FakeHub, home: Path) -> None:
    """A download that is killed once it has written so much of the weights."""
    hub.stall_after[NAME] = [num_bytes]
    process = start_download(hub, home, "org/model")
    incomplete = home / BLOBS / f"{hashlib.sha256(WEIGHTS).hexdigest()}.incomplete"
    try:
        until = time.monotonic() + 60
        while not incomplete.exists() or incomplete.stat().st_size != num_bytes:
            assert time.monotonic() < until
            time.sleep(0.02)
    finally:
        process.kill()
        process.communicate()
    hub.go_on.set()


def test_a_killed_download_is_gone_on_with_by_the_next(hub: FakeHub, tmp_path: Path) -> None:
    kill_at(NINE_TENTHS, hub, tmp_path)
    outcome = download(hub, tmp_path, "org/model")
    assert weights_of(outcome) == WEIGHTS
    assert hub.downloads(NAME) == ["", f"bytes={NINE_TENTHS}-"]
    progress = [event["done"] for event in outcome.events("progress") if event["file"] == NAME]
    assert min(progress) > NINE_TENTHS and progress[-1] == len(WEIGHTS)
    assert f"{NAME}: {NINE_TENTHS} of {len(WEIGHTS)} bytes are here already" in [
        line["message"] for line in outcome.lines
    ]


def test_a_download_that_was_killed_at_its_end_is_only_put_in_place(hub: FakeHub, tmp_path: Path) -> None:
    blobs = tmp_path / BLOBS
    blobs.mkdir(parents=True)
    (blobs / f"{hashlib.sha256(WEIGHTS).hexdigest()}.incomplete").write_bytes(WEIGHTS)
    assert weights_of(download(hub, tmp_path, "org/model")) == WEIGHTS
    assert hub.downloads(NAME) == []


def test_a_file_that_has_changed_meanwhile_is_begun_again(hub: FakeHub, tmp_path: Path) -> None:
    kill_at(NINE_TENTHS, hub, tmp_path)
    changed = bytes(reversed(WEIGHTS))
    hub.repositories["org/model"] = Repository({**FILES, NAME: changed}, sha="f" * 40)
    outcome = download(hub, tmp_path, "org/model")
    assert (outcome.folder / NAME).read_bytes() == changed
    assert hub.downloads(NAME) == ["", ""]


@pytest.mark.parametrize("left", [b"x" * NINE_TENTHS, b"x" * len(WEIGHTS), WEIGHTS + b"x"])
def test_what_was_damaged_is_not_mixed_in(hub: FakeHub, tmp_path: Path, left: bytes) -> None:
    blobs = tmp_path / BLOBS
    blobs.mkdir(parents=True)
    (blobs / f"{hashlib.sha256(WEIGHTS).hexdigest()}.incomplete").write_bytes(left)
    outcome = download(hub, tmp_path, "org/model")
    assert weights_of(outcome) == WEIGHTS
    assert hub.downloads(NAME)[-1] == ""
    (warning,) = [line["message"] for line in outcome.lines if line["level"] == "WARNING"]
    assert f"what was received of {NAME} is not what the hub describes" in warning


def test_a_server_without_ranges_sends_all_of_it_again(hub: FakeHub, tmp_path: Path) -> None:
    kill_at(NINE_TENTHS, hub, tmp_path)
    hub.knows_ranges = False
    outcome = download(hub, tmp_path, "org/model")
    assert weights_of(outcome) == WEIGHTS
    assert [line for line in outcome.lines if line["level"] == "WARNING"] == []


def test_two_launches_download_a_file_once(hub: FakeHub, tmp_path: Path) -> None:
    hub.stall_after[NAME] = [NINE_TENTHS]
    first = start_download(hub, tmp_path, "org/model")
    assert hub.stalled.wait(60)
    num_requests = len(hub.requests)
    second = start_download(hub, tmp_path, "org/model")
    until = time.monotonic() + 60
    while not any(path.endswith(NAME) for _, path, _ in hub.requests[num_requests:]):
        assert time.monotonic() < until
        time.sleep(0.02)
    time.sleep(0.3)  # in which it would begin
    hub.go_on.set()
    assert [weights_of(outcome_of(process)) == WEIGHTS for process in (first, second)] == [True, True]
    assert hub.downloads(NAME) == [""]


def test_a_cut_connection_is_resumed_where_it_broke(hub: FakeHub, tmp_path: Path) -> None:
    hub.cut_after[NAME] = [100_000] * 7
    outcome = download(hub, tmp_path, "org/model")
    assert weights_of(outcome) == WEIGHTS, "more than five times is fine where every try brings something"
    assert hub.downloads(NAME) == ["", *(f"bytes={cut}00000-" for cut in range(1, 8))]
    warnings = [line["message"] for line in outcome.lines if line["level"] == "WARNING"]
    assert len(warnings) == 7
    assert warnings[-1].startswith(f"{NAME}: try 1 of 5 failed (BrokenOff: at 700000 of {len(WEIGHTS)} bytes")


def test_an_answer_that_is_too_short_is_gone_on_with(hub: FakeHub, tmp_path: Path) -> None:
    hub.short[NAME] = [NINE_TENTHS]
    outcome = download(hub, tmp_path, "org/model")
    assert weights_of(outcome) == WEIGHTS
    assert hub.downloads(NAME) == ["", f"bytes={NINE_TENTHS}-"]


@pytest.mark.parametrize("name", ["tokenizer.json", NAME])
def test_a_file_is_tried_five_times(hub: FakeHub, tmp_path: Path, name: str) -> None:
    hub.failures[name] = [500, 500, 500, 500]
    outcome = download(hub, tmp_path, "org/model")
    assert outcome.code == 0
    assert sum("try 4 of 5 failed" in line["message"] for line in outcome.lines) == 1

    hub.repositories["org/model"] = Repository(FILES | {name: b"changed"}, sha="f" * 40)
    hub.failures[name] = [500, 500, 500, 500, 500]
    outcome = download(hub, tmp_path, "org/model", "--revision", "f" * 40)
    (error,) = outcome.errors
    assert outcome.code == 1 and error.startswith("the hub answered 500 for `org/model`")


def test_the_token_stays_with_the_hub(tmp_path: Path) -> None:
    with served(org__model=Repository(FILES, gated=True, on_other_host=True)) as hub:
        hub.cut_after[NAME] = [NINE_TENTHS]
        outcome = download(hub, tmp_path, "org/model", HF_TOKEN="hf_x")
        assert weights_of(outcome) == WEIGHTS
        assert [headers.get("range", "") for headers in hub.other_headers] == ["", f"bytes={NINE_TENTHS}-"]
        assert not any("authorization" in headers for headers in hub.other_headers)
        assert {headers["accept-encoding"] for headers in hub.other_headers} == {"identity"}, (
            "ranges are of plain bytes"
        )


def test_a_file_without_a_checksum_is_left_to_the_library(tmp_path: Path) -> None:
    with served(org__model=Repository(FILES, large=())) as hub:
        assert weights_of(download(hub, tmp_path, "org/model")) == WEIGHTS
