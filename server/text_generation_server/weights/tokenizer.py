"""A folder with tokenizer.json for the router, which reads no other tokenizer format."""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

from text_generation_server.config import ConfigError
from text_generation_server.errors import first_line

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def tokenizer_folder(folder: Path, *, trust_remote_code: bool) -> Iterator[Path]:
    """The model's own folder if it has a tokenizer.json; else a private one with a converted tokenizer, for as long as
    the context lasts. Raises: ConfigError if transformers cannot convert it."""
    if (folder / "tokenizer.json").is_file():
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="text-generation-tokenizer-") as name:
        _convert(folder, Path(name), trust_remote_code=trust_remote_code)
        yield Path(name)


def _convert(folder: Path, target: Path, *, trust_remote_code: bool) -> None:
    from transformers import AutoTokenizer

    logger.info("no tokenizer.json in the model's folder: converting its tokenizer once")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), use_fast=True, trust_remote_code=trust_remote_code, local_files_only=True
        )
        tokenizer.save_pretrained(str(target))
    except Exception as error:  # the library raises whatever its many converters raise
        raise ConfigError(_no_tokenizer(folder, f"its tokenizer cannot be converted ({first_line(error)})")) from error
    if not (target / "tokenizer.json").is_file():
        raise ConfigError(_no_tokenizer(folder, "transformers has no fast form of its tokenizer"))


def _no_tokenizer(folder: Path, why: str) -> str:
    return f"the model has no tokenizer.json, and {why}; put the tokenizer.json that belongs to it into {folder}"


def tokenizer_eos_ids(folder: Path) -> tuple[int, ...]:
    """What the tokenizer calls the end of a sequence: for a model whose configuration names no such id."""
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        token = settings["eos_token"]
        content = token["content"] if isinstance(token, dict) else token
        if not isinstance(content, str):
            return ()
    except (OSError, ValueError, KeyError, TypeError):
        return ()
    from tokenizers import Tokenizer

    token_id = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id(content)
    return () if token_id is None else (token_id,)
