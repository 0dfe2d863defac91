"""Checks of safetensors files before anything maps them into memory.

A header is data from strangers: an offset past the end of a short file would be a bus error in the middle of loading,
or somebody else's memory. Pure Python, reads headers only.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from text_generation_server.config import ConfigError

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

_LENGTH_BYTES = 8

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


class CorruptWeights(ConfigError):
    """A weights file is not what it says; the text names the file and, where there is one, the tensor."""


@dataclass(frozen=True, slots=True)
class TensorSpan:
    name: str
    begin: int
    """Offset of the first byte behind the header."""
    end: int


def check_folder(folder: Path) -> None:
    """Check the weights of a model folder: the files that the index names, or the single one.

    Raises: CorruptWeights; ConfigError where there are no weights at all.
    """
    try:
        _check_folder(folder)
    except CorruptWeights as error:
        raise CorruptWeights(f"{error}; the weights in {folder} are damaged, download or copy them again") from None


def _check_folder(folder: Path) -> None:
    weight_map = _weight_map(folder)
    if weight_map is None:
        if not (folder / SINGLE_FILE).is_file():
            raise ConfigError(_no_weights(folder))
        check_file(folder / SINGLE_FILE)
        return
    owners: dict[str, str] = {}
    for file_name in weight_files(folder):
        if not (folder / file_name).is_file():
            raise CorruptWeights(f"{INDEX_FILE} names {file_name}, which is missing")
        for span in check_file(folder / file_name):
            if span.name in owners:
                raise CorruptWeights(f"tensor `{span.name}` is in {owners[span.name]} and again in {file_name}")
            owners[span.name] = file_name
    for name, file_name in weight_map.items():
        if owners.get(name) != file_name:
            raise CorruptWeights(f"{INDEX_FILE} says that tensor `{name}` is in {file_name}, and it is not")


def weight_files(folder: Path) -> list[str]:
    """The weights files that a model folder must have: those of its index, sorted, or the single one.

    Raises: CorruptWeights if the index cannot be read or leads out of the folder.
    """
    weight_map = _weight_map(folder)
    return [SINGLE_FILE] if weight_map is None else sorted(set(weight_map.values()))


def check_file(path: Path) -> list[TensorSpan]:
    """Check one file; returns its tensors in the order of their bytes. Raises: CorruptWeights."""
    try:
        size = os.path.getsize(path)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES:
                raise CorruptWeights(f"{path.name}: {size} bytes are too few for a safetensors file")
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - _LENGTH_BYTES):
                raise CorruptWeights(f"{path.name}: a header of {length} bytes does not fit a file of {size} bytes")
            header = file.read(length)
    except OSError as error:
        raise CorruptWeights(f"{path.name} cannot be read: {error.strerror}") from error
    return check_header(path.name, header, size - _LENGTH_BYTES - length)


def check_header(file_name: str, header: bytes, data_bytes: int) -> list[TensorSpan]:
    """Check that a header's tensors cover ``data_bytes`` exactly, without overlap. Raises: CorruptWeights."""
    try:
        entries = json.loads(header, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CorruptWeights(f"{file_name}: the header is not valid JSON ({error})") from error
    if not isinstance(entries, dict):
        raise CorruptWeights(f"{file_name}: the header is not a JSON object")
    entries.pop("__metadata__", None)
    spans = sorted((_span(file_name, name, entry) for name, entry in entries.items()), key=lambda span: span.begin)
    end = 0
    for span in spans:
        if span.begin != end:
            what = "overlaps the tensor before it" if span.begin < end else "leaves a hole before it"
            raise CorruptWeights(f"{file_name}: tensor `{span.name}` {what} (starts at {span.begin}, due at {end})")
        end = span.end
        if end > data_bytes:
            raise CorruptWeights(
                f"{file_name}: tensor `{span.name}` ends at byte {end} of {data_bytes}: the file is cut off"
            )
    if end != data_bytes:
        raise CorruptWeights(f"{file_name}: {data_bytes} bytes of data where the header describes {end}")
    return spans


def _span(file_name: str, name: str, entry: Any) -> TensorSpan:
    """One tensor's bytes. Raises: CorruptWeights unless dtype, shape and offsets agree."""
    where = f"{file_name}: tensor `{name}`"
    if not isinstance(entry, dict):
        raise CorruptWeights(f"{where} is not described by a JSON object")
    bits = DTYPE_BITS.get(entry["dtype"]) if isinstance(entry.get("dtype"), str) else None
    if bits is None:
        raise CorruptWeights(f"{where} has an unknown dtype, {entry.get('dtype')!r}")
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not _sizes(shape):
        raise CorruptWeights(f"{where} has an impossible shape")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CorruptWeights(f"{where} has impossible offsets")
    num_bits = bits
    for size in shape:
        num_bits *= size
        if num_bits > 2**66:  # past any file; and a product of many large sizes is slow
            raise CorruptWeights(f"{where} has an impossible shape")
    begin, end = offsets
    if num_bits != (end - begin) * 8:
        raise CorruptWeights(f"{where}: {entry['dtype']} of shape {shape} does not take {end - begin} bytes")
    return TensorSpan(name, begin, end)


def _sizes(value: Any) -> TypeGuard[list[int]]:
    """Whether ``value`` is a list of sane non-negative integers; a bool is none."""
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"`{twice}` occurs twice")
    return result


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Tensor -> file, as the index says; None without an index. Raises: CorruptWeights."""
    index_file = folder / INDEX_FILE
    if not index_file.is_file():
        return None
    try:
        index = json.loads(index_file.read_text(encoding="utf-8"))
        weight_map = index["weight_map"]
        names = set(weight_map.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptWeights(f"{INDEX_FILE} cannot be read: {type(error).__name__}: {error}") from error
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise CorruptWeights(f"{INDEX_FILE} must name files of the model's own folder")
    return dict(weight_map)


def _no_weights(folder: Path) -> str:
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled:
        return (
            f"only pickled weights ({pickled[0]}), which can run code when they are loaded; "
            "convert the model to safetensors, or choose a repository that has them"
        )
    return f"no {SINGLE_FILE} and no {INDEX_FILE} in the model's folder"
