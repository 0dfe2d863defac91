from __future__ import annotations

import json
from pathlib import Path

import pytest
from text_generation_server.config import ConfigError
from text_generation_server.weights.tokenizer import tokenizer_eos_ids, tokenizer_folder
from tiny_models import write_tokenizer
from tokenizers import Tokenizer


def test_a_tokenizer_of_our_format_is_used_where_it_is(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    with tokenizer_folder(tmp_path, trust_remote_code=False) as folder:
        assert folder == tmp_path


def test_another_format_is_converted_for_as_long_as_it_is_needed(tmp_path: Path) -> None:
    # GPT-2's own files: a vocabulary and merges.
    vocabulary = {token: index for index, token in enumerate(["a", "b", "ab", "Ġ", "<|endoftext|>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    before = sorted(path.name for path in tmp_path.iterdir())
    with tokenizer_folder(tmp_path, trust_remote_code=False) as folder:
        assert folder != tmp_path and folder.stat().st_mode & 0o077 == 0
        assert Tokenizer.from_file(str(folder / "tokenizer.json")).encode("abb").ids == [2, 1]
    assert not folder.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_code_of_the_repository_does_not_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", null]}}'
    )
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"), tokenizer_folder(tmp_path, trust_remote_code=False):
        pass
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("eos", ["</s>", {"content": "</s>"}])
def test_the_tokenizer_names_the_end(tmp_path: Path, eos: object) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    expected = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).token_to_id("</s>")
    assert tokenizer_eos_ids(tmp_path) == (expected,)


@pytest.mark.parametrize("settings", ["{}", '{"eos_token": null}', '{"eos_token": "<nope>"}', "broken"])
def test_a_tokenizer_without_an_end_has_none(tmp_path: Path, settings: str) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(settings)
    assert tokenizer_eos_ids(tmp_path) == ()
