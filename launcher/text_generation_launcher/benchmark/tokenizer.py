"""Where a tokenizer comes from: a folder, a file, or the hub."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from text_generation_launcher.benchmark.errors import BenchmarkError

FILE = "tokenizer.json"


def load_tokenizer(name: str, revision: str) -> Tokenizer:
    """``name``: a folder with a tokenizer.json, such a file, or a model of the hub. Raises: BenchmarkError."""
    path = Path(name)
    if path.is_dir():
        path /= FILE
        if not path.is_file():
            raise BenchmarkError(f"there is no {FILE} in {name}: name the folder of a model that has one")
    elif not path.is_file():
        path = _download(name, revision)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare exceptions
        raise BenchmarkError(f"{path} is no tokenizer: {error}") from None
    # Settings of training runs: they would pad a prompt, or cut it without a word.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _download(name: str, revision: str) -> Path:
    if name.startswith(("/", "./", "../", "~")):
        raise BenchmarkError(f"`--tokenizer-name {name}` does not exist")
    from huggingface_hub import hf_hub_download  # a second of imports that most benchmarks do without
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, FILE, revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise BenchmarkError(
            f"the tokenizer of {name} (revision {revision}) is neither a folder here nor to be had from the hub "
            f"({type(error).__name__}: {first}); give --tokenizer-name a folder with {FILE}, or a model of the hub"
        ) from None
