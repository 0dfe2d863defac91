"""MODEL_ID -> a local folder: the embedded model, a folder, the hub's cache, or a download into it."""

from __future__ import annotations

import fnmatch
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from text_generation_proto.logs import send_event

from text_generation_server.config import EMBEDDED_MODEL, ConfigError
from text_generation_server.library_logs import route_library_logs
from text_generation_server.weights.checks import INDEX_FILE, SINGLE_FILE, CorruptWeights, check_folder, weight_files
from text_generation_server.weights.download import fetch_file, fetch_weights
from text_generation_server.weights.hub_errors import PAUSE_S, explained, retried

logger = logging.getLogger(__name__)

SUPPORT_FILES = (
    "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "chat_template*", "additional_chat_templates/*.jinja",
    "*_Pooling/config.json", "*_Dense/config.json", "*_Dense/model.safetensors",
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
KEPT_FILES = (INDEX_FILE, "*_Dense/model.safetensors")
"""Of what the patterns above mean, those that are needed after all."""
VOCABULARY_FILES = ("tokenizer.json", "*.model", "*.tiktoken", "vocab.*")
"""One of them is in every folder that a tokenizer can be made from."""
TOKENIZER_SETTINGS = "tokenizer_config.json"
"""Most models have it; chat template and end-of-sequence token are named here."""
PICKLED_FILES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
WEIGHT_FILES = (*PICKLED_FILES, "*.safetensors", "*.index.json", "*.gguf")


@dataclass(frozen=True, slots=True)
class ModelSource:
    folder: Path
    sha: str = ""
    """Commit on the hub; empty for a folder of the user's own."""
    pipeline_tag: str = ""


def find_model(
    model_id: str, revision: str | None, env: Mapping[str, str], *, trust_remote_code: bool = False
) -> ModelSource:
    """The model's folder for ``serve``: what is on this machine already, else a download. Raises: ConfigError."""
    local = _local(model_id, revision, env, trust_remote_code=trust_remote_code)
    return local or _download(model_id, revision, env, trust_remote_code=trust_remote_code)


def find_config(
    model_id: str, revision: str | None, env: Mapping[str, str], *, trust_remote_code: bool = False
) -> ModelSource:
    """The model's folder for a plan, which needs no weights: of a model that is not on this machine only config.json
    is fetched. Raises: ConfigError, as for `find_model` if there are weights that cannot be served.
    """
    local = _local(model_id, revision, env, trust_remote_code=trust_remote_code)
    if local is not None:
        if any(_matches(file.name, WEIGHT_FILES) for file in local.folder.iterdir()):
            check_folder(local.folder)
        else:
            logger.warning("there are no weights in %s: the plan is made from config.json alone", local.folder)
        return local
    from huggingface_hub import constants

    token = _token(env)
    with explained(model_id, revision, has_token=token is not None):
        config_file = fetch_file(
            model_id, "config.json", revision, _cache_dir(env) or constants.HF_HUB_CACHE, token, _pause_s(env)
        )
    return ModelSource(config_file.parent, sha=config_file.parent.name)


def download_and_report(
    model_id: str, revision: str | None, env: Mapping[str, str], *, trust_remote_code: bool
) -> None:
    """``download-weights``: make the model local and say where, in a ``resolved`` event. Raises: ConfigError."""
    source = _local(model_id, revision, env, trust_remote_code=trust_remote_code)
    if source is not None and (not source.sha or (source.folder / TOKENIZER_SETTINGS).is_file()):
        logger.info("Files are already present on the host. Skipping download.")
    else:
        try:
            source = _download(model_id, revision, env, trust_remote_code=trust_remote_code)
        except ConfigError as error:
            if source is None:
                raise
            logger.warning("the cache has no %s, perhaps no chat template: %s", TOKENIZER_SETTINGS, error)
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
    wanted = [name for name in files if not _matches(name, IGNORED_FILES) or _matches(name, KEPT_FILES)]
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


def _local(
    model_id: str, revision: str | None, env: Mapping[str, str], *, trust_remote_code: bool
) -> ModelSource | None:
    """The model if all that a start needs is on this machine."""
    if override := env.get("WEIGHTS_CACHE_OVERRIDE"):
        return _own_folder("WEIGHTS_CACHE_OVERRIDE", override)
    if model_id == EMBEDDED_MODEL:
        from text_generation_server.embedded_model import embedded_model_path

        return ModelSource(embedded_model_path(), pipeline_tag="text-generation")
    if Path(model_id).is_dir():
        return _own_folder("the model's folder", model_id)
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
    if missing := _missing(folder, trust_remote_code=trust_remote_code):
        logger.info("the cache has a part of %s: %s is missing", model_id, missing)
        return None
    return ModelSource(folder, sha=folder.name)


def _own_folder(what: str, text: str) -> ModelSource:
    folder = Path(text).expanduser().resolve()
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{what} {folder} has no config.json")
    return ModelSource(folder)


def _missing(folder: Path, *, trust_remote_code: bool) -> str | None:
    """What a cached snapshot lacks of what no start can do without; other programs fetch only what they use."""
    try:
        needed = weight_files(folder)
    except CorruptWeights:
        return INDEX_FILE
    if trust_remote_code:
        needed += sorted(_code_files(folder))
    missing = [name for name in needed if not (folder / name).is_file()]
    if not any(_matches(path.name, VOCABULARY_FILES) and path.is_file() for path in folder.iterdir()):
        missing.append("a tokenizer")
    return missing[0] if missing else None


def _code_files(folder: Path) -> set[str]:
    """The code that a model's settings name (``file.Class``), without that of other repositories (``repo--…``)."""
    names = set()
    for settings_file in ("config.json", TOKENIZER_SETTINGS):
        try:
            settings = json.loads((folder / settings_file).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        auto_map = settings.get("auto_map") if isinstance(settings, dict) else None
        names |= {f"{reference.split('.')[0]}.py" for reference in _texts(auto_map) if "--" not in reference}
    return names


def _texts(value: Any) -> Iterator[str]:
    """The strings in a JSON value, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _cache_dir(env: Mapping[str, str]) -> str | None:
    """None: huggingface_hub's own (HF_HOME, HF_HUB_CACHE)."""
    return env.get("HUGGINGFACE_HUB_CACHE") or None


def _token(env: Mapping[str, str]) -> str | None:
    return env.get("HF_TOKEN") or env.get("HF_API_TOKEN") or None


def _pause_s(env: Mapping[str, str]) -> float:
    return float(env.get("TGI_DOWNLOAD_PAUSE_S") or PAUSE_S)


def _download(model_id: str, revision: str | None, env: Mapping[str, str], *, trust_remote_code: bool) -> ModelSource:
    from huggingface_hub import HfApi, constants

    route_library_logs("huggingface_hub")
    token = _token(env)
    cache_dir = _cache_dir(env) or constants.HF_HUB_CACHE
    pause_s = _pause_s(env)
    with explained(model_id, revision, has_token=token is not None):
        # By name, and so that the cache learns which commit the name means; everything after it is of that commit.
        config_file = fetch_file(model_id, "config.json", revision, cache_dir, token, pause_s)
        sha = config_file.parent.name
        details = retried(
            lambda: HfApi(token=token).model_info(model_id, revision=sha, timeout=constants.HF_HUB_ETAG_TIMEOUT),
            "the list of files",
            pause_s,
        )
        names = [sibling.rfilename for sibling in details.siblings or []]
        weights, support = choose_files(names)
        if trust_remote_code:
            support += sorted(name for name in names if _matches(name, CODE_FILES))
        for name in support:
            fetch_file(model_id, name, sha, cache_dir, token, pause_s)
        for name in weights:
            fetch_weights(model_id, name, config_file.parent, token, pause_s)
    return ModelSource(config_file.parent, sha=sha, pipeline_tag=details.pipeline_tag or "")
