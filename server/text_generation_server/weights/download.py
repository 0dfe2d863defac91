"""Downloading a model from the hub into its cache, with huggingface_hub: tries, progress, and errors that help."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from text_generation_proto.logs import send_event

from text_generation_server.config import ConfigError

logger = logging.getLogger(__name__)

T = TypeVar("T")

TRIES = 5
PAUSE_S = 5.0
"""Between tries of one file, as TGI; ``TGI_DOWNLOAD_PAUSE_S`` changes it."""
EVENT_INTERVAL_S = 0.25


def fetch_file(
    model_id: str, name: str, revision: str | None, cache_dir: str, token: str | None, pause_s: float
) -> Path:
    """One file into the cache. huggingface_hub resumes what was cut off; a file is in place only when complete."""
    from huggingface_hub import hf_hub_download

    bars: type[Any] = type("Bar", (_Bar,), {"name": name})
    path = retried(
        lambda: hf_hub_download(model_id, name, revision=revision, cache_dir=cache_dir, token=token, tqdm_class=bars),
        name,
        pause_s,
    )
    return Path(path)


def retried(action: Callable[[], T], what: str, pause_s: float) -> T:
    """Try again where that can help: not after a refusal, and not when the network is switched off."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled

    for attempt in range(1, TRIES + 1):
        try:
            return action()
        except OfflineModeIsEnabled:
            raise
        except OSError as error:  # every network error of the library, and a full disk
            refused = isinstance(error, HfHubHTTPError) and error.response.status_code in (400, 401, 403, 404)
            # A file that cannot be looked up: the library has tried several times itself by then.
            hopeless = refused or isinstance(error, EntryNotFoundError) or error.errno in _DISK_ERRORS
            if hopeless or attempt == TRIES:
                raise
            logger.warning("%s: try %d of %d failed (%s)", what, attempt, TRIES, _first_line(error))
            time.sleep(pause_s)
    raise AssertionError("the last try returns or raises")


_DISK_ERRORS = (13, 27, 28, 30, 122)  # EACCES, EFBIG, ENOSPC, EROFS, EDQUOT


@contextlib.contextmanager
def explained(model_id: str, revision: str | None, *, has_token: bool) -> Iterator[None]:
    """Turn the library's errors into one line that says what to do."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    token_hint = "check that HF_TOKEN may read it" if has_token else "set HF_TOKEN"
    try:
        yield
    except GatedRepoError as error:
        raise ConfigError(
            f"`{model_id}` is gated: accept its licence on its page on the hub, and {token_hint}"
        ) from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"`{model_id}` is not on the hub, or it is private: check the id, and {token_hint} if it is private"
        ) from error
    except RevisionNotFoundError as error:
        raise ConfigError(f"`{model_id}` has no revision `{revision}`; check --revision") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        if isinstance(error, OfflineModeIsEnabled) or isinstance(error.__cause__, OfflineModeIsEnabled):
            raise ConfigError(
                f"`{model_id}` is not complete in the cache and HF_HUB_OFFLINE is set: unset it, or download the model "
                "where there is a network and set HF_HOME to that cache, or give a local folder"
            ) from error
        cause = error.__cause__ or error
        raise ConfigError(
            f"the hub cannot be reached and `{model_id}` is not complete in the cache ({_first_line(cause)}); "
            "check the network, HF_ENDPOINT and the proxy settings, or give a local folder"
        ) from error
    except EntryNotFoundError as error:
        raise ConfigError(f"`{model_id}` has no config.json: it is not a transformers model") from error
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise ConfigError(
                f"the hub refuses `{model_id}` ({error.response.status_code}): accept its licence on its page if it "
                f"is gated, and {token_hint}"
            ) from error
        raise ConfigError(
            f"the hub answered {error.response.status_code} for `{model_id}`: {_first_line(error)}"
        ) from error
    except OSError as error:
        raise ConfigError(f"`{model_id}` could not be downloaded: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


_ORPHAN = re.compile(r"(?P<etag>[^.]+)\.[0-9a-f]{8}\.incomplete")


def remove_orphans(cache_dir: Path, model_id: str) -> None:
    """Delete partial files whose download was killed: their names are of one process, so nobody will go on with them.

    Whoever downloads a blob holds its lock; a free lock says that nobody does.
    """
    folder = "models--" + model_id.replace("/", "--")
    for path in (cache_dir / folder / "blobs").glob("*.incomplete"):
        match = _ORPHAN.fullmatch(path.name)
        if match is None:
            continue
        lock_path = cache_dir / ".locks" / folder / f"{match['etag']}.lock"
        with contextlib.suppress(OSError):
            lock = os.open(lock_path, os.O_RDWR | os.O_CREAT, 0o664)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                logger.info("removed %s, left by a download that was killed", path.name)
            finally:
                os.close(lock)


class _Bar:
    """What huggingface_hub uses of a tqdm bar; sends ``progress`` events, at most four a second."""

    name = ""
    _last_event = 0.0
    _event_lock = threading.Lock()

    def __init__(self, *args: Any, total: float | None = None, initial: float = 0, **options: Any) -> None:
        self.total = total
        self.n = initial
        self._sent: float | None = None
        self.desc = ""
        self.format_dict: dict[str, Any] = {}

    def update(self, n: float | None = 1) -> None:
        self.n += n or 0
        now = time.monotonic()
        with _Bar._event_lock:
            if now - _Bar._last_event < EVENT_INTERVAL_S:
                return
            _Bar._last_event = now
        self._send()

    def close(self) -> None:
        """Of a file that is complete, or given up."""

    def _send(self) -> None:
        if self._sent == self.n:
            return
        self._sent = self.n
        done, total = int(self.n), int(self.total or 0)
        send_event(
            "progress",
            f"download {self.name}: {done} of {total} bytes",
            stage="download",
            file=self.name,
            done=done,
            total=total,
            unit="bytes",
        )

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, error_type: object, *_: object) -> None:
        if error_type is None:
            self._send()
        self.close()

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **options: None
