"""MODEL_ID -> a local folder: the embedded model, a folder, the hub's cache, or a download into it."""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from text_generation_proto.logs import send_event

from text_generation_server.config import EMBEDDED_MODEL, ConfigError
from text_generation_server.library_logs import route_library_logs
from text_generation_server.weights.checks import INDEX_FILE, SINGLE_FILE

logger = logging.getLogger(__name__)

T = TypeVar("T")

TRIES = 5
PAUSE_S = 5.0
"""Between tries of one file, as TGI; ``TGI_DOWNLOAD_PAUSE_S`` changes it."""
EVENT_INTERVAL_S = 0.25

SUPPORT_FILES = (
    "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "chat_template*", "additional_chat_templates/*.jinja",
)  # fmt: skip
"""Configuration, tokenizer, chat templates, generation settings: small files beside the weights."""
CODE_FILES = ("*.py",)
"""Only with --trust-remote-code."""
IGNORED_FILES = (
    "consolidated*",
    "*optimizer*",
    "*training*",
    "*arguments*",
    "args.*",
    "*/*.safetensors",
    "*.index.json",
)
PICKLED_FILES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")


@dataclass(frozen=True, slots=True)
class ModelSource:
    folder: Path
    sha: str = ""
    """Commit on the hub; empty for a folder of the user's own."""
    pipeline_tag: str = ""


def find_model(model_id: str, revision: str | None, env: Mapping[str, str]) -> ModelSource:
    """The model's folder for ``serve``: what is on this machine already, else a download. Raises: ConfigError."""
    return _local(model_id, revision, env) or _download(model_id, revision, env, trust_remote_code=False)


def download_and_report(
    model_id: str, revision: str | None, env: Mapping[str, str], *, trust_remote_code: bool
) -> None:
    """``download-weights``: make the model local and say where, in a ``resolved`` event. Raises: ConfigError."""
    source = _local(model_id, revision, env)
    if source is not None:
        logger.info("Files are already present on the host. Skipping download.")
    else:
        source = _download(model_id, revision, env, trust_remote_code=trust_remote_code)
    send_event(
        "resolved",
        f"model files are in {source.folder}",
        folder=str(source.folder),
        sha=source.sha,
        pipeline_tag=source.pipeline_tag,
    )


def choose_files(files: list[str]) -> tuple[list[str], list[str]]:
    """Split a repository's files into the weights to load and the small files around them, each sorted.

    Raises: ConfigError if there are no safetensors.
    """
    wanted = [name for name in files if not _matches(name, IGNORED_FILES) or name == INDEX_FILE]
    weights = sorted(name for name in wanted if name.endswith(".safetensors") and "/" not in name)
    if INDEX_FILE in wanted and len(weights) > 1:
        weights = [name for name in weights if name != SINGLE_FILE]  # the parts hold the same again
    if not weights:
        pickled = sorted(name for name in files if _matches(name, PICKLED_FILES))
        if pickled:
            raise ConfigError(
                f"the repository has only pickled weights ({pickled[0]}), which can run code when they are loaded; "
                "choose a repository or revision with .safetensors files, or convert it"
            )
        raise ConfigError("the repository has no .safetensors files")
    support = sorted(name for name in wanted if _matches(name, SUPPORT_FILES) and name not in weights)
    return weights, support


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    # A pattern without a folder is for the top level only.
    return any(fnmatch.fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)


def _local(model_id: str, revision: str | None, env: Mapping[str, str]) -> ModelSource | None:
    """The model if all its files are on this machine."""
    if model_id == EMBEDDED_MODEL:
        from text_generation_server.embedded_model import embedded_model_path

        return ModelSource(embedded_model_path(), pipeline_tag="text-generation")
    for what, text in (("WEIGHTS_CACHE_OVERRIDE", env.get("WEIGHTS_CACHE_OVERRIDE")), ("the model's folder", model_id)):
        if text and (what == "WEIGHTS_CACHE_OVERRIDE" or Path(text).is_dir()):
            folder = Path(text).expanduser().resolve()
            if not (folder / "config.json").is_file():
                raise ConfigError(f"{what} {folder} has no config.json")
            return ModelSource(folder)
    if model_id.startswith(("/", "./", "../", "~")):
        raise ConfigError(f"there is no folder {model_id}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        path = hf_hub_download(
            model_id, "config.json", revision=revision, cache_dir=_cache_dir(env), local_files_only=True
        )
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise ConfigError(f"`{model_id}` is neither a folder nor a model id of the hub: {error}") from error
    folder = Path(path).parent
    return ModelSource(folder, sha=folder.name) if _is_complete(folder) else None


def _is_complete(folder: Path) -> bool:
    """Whether the weights of a cached snapshot are all there."""
    index_file = folder / INDEX_FILE
    if not index_file.is_file():
        return (folder / SINGLE_FILE).is_file()
    try:
        names = set(json.loads(index_file.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    return all((folder / str(name)).is_file() for name in names)


def _cache_dir(env: Mapping[str, str]) -> str | None:
    """None: huggingface_hub's own (HF_HOME, HF_HUB_CACHE)."""
    return env.get("HUGGINGFACE_HUB_CACHE") or None


def _download(model_id: str, revision: str | None, env: Mapping[str, str], *, trust_remote_code: bool) -> ModelSource:
    from huggingface_hub import HfApi, constants

    route_library_logs("huggingface_hub")
    token = env.get("HF_TOKEN") or env.get("HF_API_TOKEN") or None
    cache_dir = _cache_dir(env) or constants.HF_HUB_CACHE
    pause_s = float(env.get("TGI_DOWNLOAD_PAUSE_S") or PAUSE_S)
    with _explained(model_id, revision, has_token=token is not None):
        # By name, and so that the cache learns which commit the name means; everything after it is of that commit.
        config_file = _fetch(model_id, "config.json", revision, cache_dir, token, pause_s)
        sha = config_file.parent.name
        details = _retried(lambda: HfApi(token=token).model_info(model_id, revision=sha), "the list of files", pause_s)
        names = [sibling.rfilename for sibling in details.siblings or []]
        weights, support = choose_files(names)
        if trust_remote_code:
            support += sorted(name for name in names if _matches(name, CODE_FILES))
        _remove_orphans(Path(cache_dir), model_id)
        for name in (*support, *weights):
            _fetch(model_id, name, sha, cache_dir, token, pause_s)
    return ModelSource(config_file.parent, sha=sha, pipeline_tag=details.pipeline_tag or "")


def _fetch(model_id: str, name: str, revision: str | None, cache_dir: str, token: str | None, pause_s: float) -> Path:
    """One file into the cache. huggingface_hub resumes what was cut off; a file is in place only when complete."""
    from huggingface_hub import hf_hub_download

    bars: type[Any] = type("Bar", (_Bar,), {"name": name})
    path = _retried(
        lambda: hf_hub_download(model_id, name, revision=revision, cache_dir=cache_dir, token=token, tqdm_class=bars),
        name,
        pause_s,
    )
    return Path(path)


def _retried(action: Callable[[], T], what: str, pause_s: float) -> T:
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
def _explained(model_id: str, revision: str | None, *, has_token: bool) -> Iterator[None]:
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


def _remove_orphans(cache_dir: Path, model_id: str) -> None:
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
