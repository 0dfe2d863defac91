"""The folder that ships: what lies in it, how large it is, and that its tokenizer loses nothing."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from text_generation_server.embedded_model import embedded_model_path
from tokenizers import Tokenizer

FOLDER = embedded_model_path()
TOKENIZER = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ],
)
def test_the_folder_is_a_whole_model(name: str) -> None:
    assert (FOLDER / name).is_file()


def test_it_holds_nothing_else() -> None:
    assert len(list(FOLDER.iterdir())) == 7


def test_it_stays_small() -> None:
    with safe_open(FOLDER / "model.safetensors", framework="pt") as weights:
        tensors = [weights.get_slice(name) for name in weights.keys()]  # noqa: SIM118  # not a dict, has no __iter__
        sizes = [_product(tensor.get_shape()) for tensor in tensors]
        assert {tensor.get_dtype() for tensor in tensors} == {"BF16"}
    assert sum(sizes) <= 5_000_000
    assert (FOLDER / "model.safetensors").stat().st_size <= 10_000_000


def test_it_is_a_llama_that_ends_in_two_ways() -> None:
    config = _json(FOLDER / "config.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["max_position_embeddings"] == 2048
    ends = [TOKENIZER.token_to_id("<|im_end|>"), TOKENIZER.token_to_id("<|endoftext|>")]
    assert _json(FOLDER / "generation_config.json")["eos_token_id"] == ends
    assert _json(FOLDER / "tokenizer_config.json")["eos_token"] == "<|im_end|>"


def test_the_chat_template_is_written_once() -> None:
    assert "chat_template" not in _json(FOLDER / "tokenizer_config.json")


@given(st.text())
def test_text_comes_back_unchanged(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


@given(st.integers(0, 10**9))
def test_a_digit_is_a_token(number: int) -> None:
    assert TOKENIZER.encode(str(number), add_special_tokens=False).tokens == list(str(number))


def test_a_plain_prompt_begins_with_bos_and_a_chat_does_not() -> None:
    assert TOKENIZER.encode("Hello").ids[0] == TOKENIZER.token_to_id("<|endoftext|>")
    assert TOKENIZER.encode("Hello", add_special_tokens=False).ids[0] != TOKENIZER.token_to_id("<|endoftext|>")


@pytest.mark.parametrize("token", ["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
def test_special_tokens_are_one_token_and_leave_the_text(token: str) -> None:
    ids = TOKENIZER.encode(f"a{token}b", add_special_tokens=False).ids
    assert TOKENIZER.token_to_id(token) in ids
    assert TOKENIZER.decode(ids) == "ab"


@pytest.mark.parametrize("token", ["<tool_call>", "</tool_call>"])
def test_tool_call_marks_stay_in_the_text(token: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(f"a{token}b").ids) == f"a{token}b"


def _json(path: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _product(shape: list[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
