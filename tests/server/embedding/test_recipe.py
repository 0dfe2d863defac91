"""`embedding.recipe`: sentence-transformers' files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from text_generation_server.config import ConfigError
from text_generation_server.embedding.recipe import Pooling, Recipe, read_recipe

TRANSFORMER = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
POOLING = {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
NORMALIZE = {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}
MEAN = {"word_embedding_dimension": 4, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}


def write(folder: Path, modules: Any, pooling: dict[str, Any] = MEAN, **files: Any) -> Path:
    (folder / "1_Pooling").mkdir()
    contents = {"modules.json": modules, "1_Pooling/config.json": pooling, "config.json": {}, **files}
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def test_without_files_the_mean_is_taken(tmp_path: Path) -> None:
    assert read_recipe(tmp_path) == Recipe(poolings=(Pooling.MEAN,), normalizes=False)


def test_all_there_is(tmp_path: Path) -> None:
    dense = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    files: dict[str, Any] = {
        "sentence_bert_config.json": {"max_seq_length": 256, "do_lower_case": True},
        "config_sentence_transformers.json": {"prompts": {"query": "q: "}, "default_prompt_name": "query"},
        "config.json": {"matryoshka_dimensions": [256, 64]},
    }
    write(tmp_path, [TRANSFORMER, POOLING, dense, NORMALIZE], **files)
    assert read_recipe(tmp_path) == Recipe(
        poolings=(Pooling.MEAN,),
        dense=(tmp_path / "2_Dense",),
        normalizes=True,
        max_tokens=256,
        lower_case=True,
        prompts={"query": "q: "},
        default_prompt="query",
        shorter=(64, 256),
    )


@pytest.mark.parametrize(
    ("settings", "poolings"),
    [
        ({"pooling_mode_cls_token": True}, (Pooling.CLS,)),
        ({"pooling_mode_lasttoken": True}, (Pooling.LAST,)),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, (Pooling.MAX, Pooling.MEAN)),
        ({"pooling_mode": "weightedmean"}, (Pooling.WEIGHTED_MEAN,)),
        ({"pooling_mode": ["cls", "mean"]}, (Pooling.CLS, Pooling.MEAN)),
    ],
)
def test_poolings(settings: dict[str, Any], poolings: tuple[Pooling, ...], tmp_path: Path) -> None:
    assert read_recipe(write(tmp_path, [TRANSFORMER, POOLING], settings)).poolings == poolings


def test_prompts_that_are_left_out_of_the_pooling_are_none(tmp_path: Path) -> None:
    settings = {**MEAN, "include_prompt": False}
    prompts = {"config_sentence_transformers.json": {"prompts": {"query": "q: "}}}
    assert read_recipe(write(tmp_path, [TRANSFORMER, POOLING], settings, **prompts)).prompts == {}


@pytest.mark.parametrize(
    ("modules", "settings", "message"),
    [
        ({}, MEAN, "not a list of JSON objects"),
        ([{"type": "x.Asym", "path": ""}], MEAN, "a module of the type `Asym`"),
        ([{"type": "x.Transformer", "path": "0_T"}], MEAN, "`Transformer` in `0_T`"),
        ([TRANSFORMER, NORMALIZE], MEAN, "of the type `Normalize`"),
        ([{"type": "x.Pooling", "path": "../other"}], MEAN, "outside of the model's"),
        ([{"type": "x.Pooling", "path": ".."}], MEAN, "outside of the model's"),
        ([TRANSFORMER, POOLING], {}, "names none"),
        ([TRANSFORMER, POOLING], {"pooling_mode": "median"}, "not supported: 'median'"),
    ],
)
def test_what_is_not_known_is_refused(modules: Any, settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        read_recipe(write(tmp_path, modules, settings))
