from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from text_generation_server.config import ConfigError
from text_generation_server.weights.checks import CorruptWeights, check_file, check_folder, weight_files

TENSORS = {"a": torch.arange(6, dtype=torch.float32).view(2, 3), "b": torch.ones(5, dtype=torch.bfloat16)}
INTACT = save(TENSORS)


def file_of(folder: Path, content: bytes) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(content)
    return path


def with_header(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_what_the_library_writes_passes(tmp_path: Path) -> None:
    spans = check_file(file_of(tmp_path, INTACT))
    assert {span.name for span in spans} == {"a", "b"}
    check_file(file_of(tmp_path, with_header({"__metadata__": {"format": "pt"}}, b"")))
    check_file(
        file_of(tmp_path, with_header({"empty": tensor("F32", [0, 7], 0, 0), "x": tensor("U8", [], 0, 1)}, b"1"))
    )


@pytest.mark.parametrize(
    ("content", "text"),
    [
        pytest.param(b"", "0 bytes", id="empty"),
        pytest.param(INTACT[:5], "5 bytes", id="no header length"),
        pytest.param(INTACT[:8], "header", id="no header"),
        pytest.param(INTACT[:40], "header", id="mid-header"),
        pytest.param(INTACT[:-1], "cut off", id="mid-tensor"),
        pytest.param(INTACT + b"x", "bytes of data", id="bytes behind the last tensor"),
        pytest.param((2**63).to_bytes(8, "little") + b"{}", "header", id="a header longer than any file"),
        pytest.param(with_header(b"[1]", b""), "not a JSON object", id="not an object"),
        pytest.param(with_header(b"{nope", b""), "not valid JSON", id="not JSON"),
        pytest.param(with_header(b"[" * 100_000, b""), "not valid JSON", id="nested without end"),
        pytest.param(with_header(b'{"w":{},"w":{}}', b""), "`w` occurs twice", id="a tensor twice"),
        pytest.param(with_header({"w": 3}, b""), "`w`", id="not a description"),
        pytest.param(with_header({"w": tensor("F31", [1], 0, 4)}, b"0000"), "`w` has an unknown dtype", id="dtype"),
        pytest.param(with_header({"w": tensor("F32", [2], 0, 4)}, b"0000"), "`w`: F32", id="dtype lie"),
        pytest.param(
            with_header({"w": tensor("F32", [-1], 0, 4)}, b"0000"), "`w` has an impossible shape", id="negative"
        ),
        pytest.param(
            with_header({"w": tensor("F32", [2**62] * 900, 0, 4)}, b"0000"), "impossible shape", id="huge shape"
        ),
        pytest.param(with_header({"w": tensor("U8", [True], 0, 1)}, b"0"), "impossible shape", id="a bool as a size"),
        pytest.param(with_header({"w": tensor("U8", [4], 4, 0)}, b"0000"), "impossible offsets", id="backwards"),
        pytest.param(
            with_header({"v": tensor("U8", [4], 0, 4), "w": tensor("U8", [4], 2, 6)}, b"000000"),
            "overlaps",
            id="overlap",
        ),
        pytest.param(
            with_header({"v": tensor("U8", [1], 0, 1), "w": tensor("U8", [1], 2, 3)}, b"000"), "hole", id="hole"
        ),
        pytest.param(with_header({"w": tensor("U8", [10**9], 0, 10**9)}, b"0"), "cut off", id="past the end"),
    ],
)
def test_corrupt_files_are_refused_by_name(tmp_path: Path, content: bytes, text: str) -> None:
    with pytest.raises(CorruptWeights) as error:
        check_file(file_of(tmp_path, content))
    assert "model.safetensors" in str(error.value) and text in str(error.value)
    assert "\n" not in str(error.value)


@settings(deadline=None)
@given(cuts=st.lists(st.tuples(st.integers(0, len(INTACT) - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_changed_bytes_pass_only_if_the_layout_is_still_sound(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[tuple[int, int]]
) -> None:
    content = bytearray(INTACT)
    for place, value in cuts:
        content[place] = value
    path = file_of(tmp_path_factory.mktemp("fuzz"), bytes(content))
    try:
        spans = check_file(path)
    except CorruptWeights:
        return
    end = 0
    for span in spans:
        assert span.begin == end
        end = span.end


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "BF16", "F4", "nope"]) | JSON, "shape": JSON, "data_offsets": JSON}
)


@pytest.mark.fault("F17", "random headers of safetensors", "accepted or refused, never a crash")
@settings(deadline=None)
@given(header=st.dictionaries(st.text(max_size=5), ENTRY | JSON, max_size=4), data=st.binary(max_size=20))
def test_any_header_is_accepted_or_refused(
    tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any], data: bytes
) -> None:
    try:
        check_file(file_of(tmp_path_factory.mktemp("fuzz"), with_header(header, data)))
    except CorruptWeights as error:
        assert str(error)


def sharded(folder: Path, weight_map: dict[str, str], files: dict[str, list[str]]) -> Path:
    for name, tensors in files.items():
        save_file({tensor: torch.ones(2) for tensor in tensors}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_an_index_with_all_its_files_passes(tmp_path: Path) -> None:
    assert weight_files(tmp_path) == ["model.safetensors"], "without an index there is one file"
    check_folder(
        sharded(
            tmp_path, {"a": "1.safetensors", "b": "2.safetensors"}, {"1.safetensors": ["a"], "2.safetensors": ["b"]}
        )
    )
    assert weight_files(tmp_path) == ["1.safetensors", "2.safetensors"]


@pytest.mark.parametrize(
    ("weight_map", "files", "text"),
    [
        (
            {"a": "1.safetensors", "b": "2.safetensors"},
            {"1.safetensors": ["a"]},
            "names 2.safetensors, which is missing",
        ),
        ({"a": "1.safetensors", "b": "1.safetensors"}, {"1.safetensors": ["a"]}, "`b` is in 1.safetensors"),
        (
            {"a": "1.safetensors", "b": "2.safetensors"},
            {"1.safetensors": ["a"], "2.safetensors": ["a", "b"]},
            "`a` is in 1.safetensors and again in 2.safetensors",
        ),
        ({"a": "../1.safetensors"}, {}, "own folder"),
        ({}, {}, "own folder"),
    ],
)
def test_an_index_that_lies_is_refused(
    tmp_path: Path, weight_map: dict[str, str], files: dict[str, list[str]], text: str
) -> None:
    with pytest.raises(CorruptWeights, match=text.replace("`", ".")):
        check_folder(sharded(tmp_path, weight_map, files))


def test_a_folder_without_safetensors_says_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no model\.safetensors"):
        check_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ConfigError, match=r"pickled weights \(pytorch_model\.bin\)"):
        check_folder(tmp_path)
