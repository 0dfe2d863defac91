"""Files of the hub into its cache, with progress.

What a killed process has received of a large file is gone on with by the next one. huggingface_hub would begin again:
the names of its partial files are of one process.
"""

from __future__ import annotations

import hashlib
import logging
import re
import threading
import time
from collections.abc import Callable
from io import BufferedRandom
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from text_generation_proto.logs import send_event

from text_generation_server.errors import first_line
from text_generation_server.weights.hub_errors import BrokenOff, retried

logger = logging.getLogger(__name__)

EVENT_INTERVAL_S = 0.25

_SHA256 = re.compile(r"[0-9a-f]{64}")


def fetch_file(
    model_id: str, name: str, revision: str | None, cache_dir: str, token: str | None, pause_s: float
) -> Path:
    """One file into the cache; it is in place only when complete."""
    from huggingface_hub import hf_hub_download

    path = retried(
        lambda: hf_hub_download(
            model_id, name, revision=revision, cache_dir=cache_dir, token=token, tqdm_class=_bars(name)
        ),
        name,
        pause_s,
    )
    return Path(path)


def fetch_weights(model_id: str, name: str, snapshot: Path, token: str | None, pause_s: float) -> None:
    """One large file into a snapshot of the cache, from where an earlier download of it has come to."""
    if not (snapshot / name).exists():
        retried(lambda: _fetch_blob(model_id, name, snapshot, token), name, pause_s)
    # Finds the content in place and enters it in the snapshot.
    fetch_file(model_id, name, snapshot.name, str(snapshot.parents[2]), token, pause_s)


def _fetch_blob(model_id: str, name: str, snapshot: Path, token: str | None) -> None:
    """A file's content, through ``blobs/<sha256>.incomplete``, to where huggingface_hub looks for it.

    Only of files that the hub names by their sha256, so that what was put together is checked, and that are not too
    large for plain HTTP. huggingface_hub downloads the others itself; they are small, or above 50 GB.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined] # httpx's, under whichever name
    from huggingface_hub.utils import WeakFileLock, build_hf_headers  # type: ignore[attr-defined] # loaded on demand

    url = hf_hub_url(model_id, name, revision=snapshot.name)
    metadata = get_hf_file_metadata(url, token=token)
    sha256, size = metadata.etag or "", metadata.size
    if not _SHA256.fullmatch(sha256) or size is None or size > constants.MAX_HTTP_DOWNLOAD_SIZE:
        return
    repository = snapshot.parent.parent
    blob = repository / "blobs" / sha256
    lock = repository.parent / ".locks" / repository.name / f"{sha256}.lock"
    for file_path in (blob, lock):
        file_path.parent.mkdir(parents=True, exist_ok=True)
    # Another host has an address that is signed, and the token is none of its business.
    may_see_token = urlsplit(metadata.location)[:2] == urlsplit(url)[:2]
    headers = build_hf_headers(token=token if may_see_token else False)
    with WeakFileLock(lock):  # huggingface_hub's own: two launches do not write one file
        if blob.exists():
            return
        incomplete = blob.with_name(f"{sha256}.incomplete")
        with incomplete.open("a+b") as file:
            partial = _Partial(file)
            begin = partial.num_bytes
            try:
                if begin < size:
                    _receive(metadata.location, headers, partial, name, size)
            except HTTPError as error:
                if partial.num_bytes > begin:
                    raise BrokenOff(f"at {partial.num_bytes} of {size} bytes, {first_line(error)}") from error
                raise
        if partial.num_bytes < size:
            raise OSError(f"{name} ended at {partial.num_bytes} of {size} bytes")
        if partial.sha256 != sha256:
            incomplete.unlink()
            raise OSError(f"what was received of {name} is not what the hub describes (its sha256 differs)")
        incomplete.rename(blob)


class _Partial:
    """The bytes of a file that are here, and their digest."""

    def __init__(self, file: BufferedRandom) -> None:
        self._file = file
        file.seek(0)
        self._digest = hashlib.file_digest(file, "sha256")
        self.num_bytes = file.tell()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def append(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self._file.flush()  # a kill loses nothing
        self._digest.update(chunk)
        self.num_bytes += len(chunk)

    def clear(self) -> None:
        self._file.seek(0)
        self._file.truncate()
        self._digest = hashlib.sha256()
        self.num_bytes = 0


def _receive(url: str, headers: dict[str, str], partial: _Partial, name: str, size: int) -> None:
    """Append what is missing."""
    from huggingface_hub import constants, hf_raise_for_status
    from huggingface_hub.utils import http_stream_backoff  # type: ignore[attr-defined] # loaded on demand

    headers = headers | {"Accept-Encoding": "identity"}
    if partial.num_bytes:
        headers["Range"] = f"bytes={partial.num_bytes}-"
        logger.info("%s: %d of %d bytes are here already", name, partial.num_bytes, size)
    with http_stream_backoff(
        "GET",
        url,
        headers=headers,
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        retry_on_exceptions=(),
        retry_on_status_codes=(408, 429),
    ) as response:
        hf_raise_for_status(response)
        if response.status_code != 206:  # also where a proxy knows no ranges: it sends all of it
            partial.clear()
        with _bars(name)(total=size, initial=partial.num_bytes) as bar:
            for chunk in response.iter_bytes():
                partial.append(chunk)
                bar.update(len(chunk))


def _bars(name: str) -> type[Any]:
    """The class of the bars of one file."""
    return type("Bar", (_Bar,), {"name": name})


class _Bar:
    """What huggingface_hub and we use of a tqdm bar; sends ``progress`` events, at most four a second."""

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
