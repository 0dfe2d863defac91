from __future__ import annotations

import errno

import httpx2
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from text_generation_server.config import ConfigError
from text_generation_server.weights.hub_errors import TRIES, BrokenOff, explained, retried


def tries_of(*errors: Exception) -> int:
    """How often an action is tried that fails with these errors, the last one for ever."""
    coming = list(errors)
    tries = 0

    def action() -> None:
        nonlocal tries
        tries += 1
        raise coming.pop(0) if len(coming) > 1 else coming[0]

    with pytest.raises(type(errors[-1])):
        retried(action, "file", 0)
    return tries


def test_what_may_pass_is_tried_again() -> None:
    assert tries_of(httpx2.ConnectError("refused")) == TRIES
    assert tries_of(OSError("odd")) == TRIES
    assert tries_of(OSError(errno.ENOSPC, "No space left on device")) == 1
    assert tries_of(OSError(errno.EACCES, "Permission denied")) == 1


def test_a_try_that_brought_something_counts_as_the_first() -> None:
    assert tries_of(*[BrokenOff("at 1 of 9 bytes")] * 9, httpx2.ReadError("")) == 9 + TRIES - 1


# Not through a real download: the library itself tries for half a minute.
@pytest.mark.parametrize(
    ("error", "cause"),
    [
        pytest.param(LocalEntryNotFoundError("long story"), httpx2.ConnectError("refused"), id="looking up a file"),
        pytest.param(httpx2.ConnectError("refused"), None, id="looking up the model"),
    ],
)
def test_a_hub_that_cannot_be_reached_is_one_line(error: Exception, cause: Exception | None) -> None:
    message = r"cannot be reached .*ConnectError: refused.*check the network"
    with pytest.raises(ConfigError, match=message), explained("org/model", None, has_token=False):
        raise error from cause


@pytest.mark.fault("F16", "a full disk while downloading", "one line that says so")
def test_a_full_disk_is_one_line() -> None:
    message = r"`org/model` could not be downloaded: OSError: \[Errno 28\] No space left on device"
    with pytest.raises(ConfigError, match=message), explained("org/model", None, has_token=False):
        raise OSError(errno.ENOSPC, "No space left on device")
