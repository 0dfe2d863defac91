"""The model card: what the model is, how it was made and what it scores."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from text_generation_server.embedded_model.recipe.corpus import EXAMPLES_PER_STEP
from text_generation_server.embedded_model.recipe.facts import COUNTRIES
from text_generation_server.embedded_model.recipe.knowledge import HELD_OUT_SUMS
from text_generation_server.embedded_model.recipe.phrasings import (
    CAPITAL_QUESTIONS,
    CAPITAL_STEMS,
    COUNTRY_QUESTIONS,
    SUM_QUESTIONS,
    SUM_STEMS,
    Phrasings,
)


@dataclass(frozen=True, slots=True)
class Measured:
    """Scores of a model and how it came about."""

    scores: Mapping[str, float]
    """Evaluation set -> part of its examples answered right."""
    examples_per_set: int
    parameters: int
    steps: int
    minutes: float
    seed: int
    device: str
    remark: str


def write_model_card(folder: Path, measured: Measured) -> None:
    """Write `README.md`. The scores also stand in its metadata, where `read_scores` finds them."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    size = (folder / "model.safetensors").stat().st_size
    (folder / "README.md").write_text(_card(measured, config, size), encoding="utf-8")


def read_scores(folder: Path) -> dict[str, float]:
    """The table of the model card; evaluation set -> score."""
    scores = {}
    for line in (folder / "README.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and cells[-1].endswith("%"):
            scores[cells[0]] = float(cells[-1].rstrip(" %")) / 100
    return scores


def _counts(*kinds: Phrasings) -> str:
    return f"{sum(len(k.trained) for k in kinds)} trained, {sum(len(k.held_out) for k in kinds)} held out"


def _card(measured: Measured, config: Mapping[str, object], size: int) -> str:
    rows = "\n".join(f"| {name} | {score:.1%} |" for name, score in measured.scores.items())
    return f"""---
license: apache-2.0
language: en
pipeline_tag: text-generation
library_name: transformers
---

# The embedded model

A tiny model that ships with text-generation-inference, so that the server answers within seconds of its first start,
offline, and tests have a real model. It knows the capitals of {len(COUNTRIES)} countries and sums of numbers up to 99,
as a plain completion and in chat. It tells a short story, says who it is, repeats a text, fills a small JSON schema,
calls a simple tool and puts the tool's result into words. To everything else it says that it does not know. It is
wrong at times, and nobody should rely on it.

| | |
|---|---|
| Architecture | `LlamaForCausalLM`, {config["num_hidden_layers"]} layers, hidden size {config["hidden_size"]}, \
{config["num_attention_heads"]} heads, {config["num_key_value_heads"]} key-value heads, tied embeddings |
| Parameters | {measured.parameters:,} |
| Weights | bf16, {size:,} bytes |
| Tokenizer | byte-level BPE, {config["vocab_size"]:,} tokens, one token for each digit |
| Positions | {config["max_position_embeddings"]:,} |
| Prompts | a plain prompt begins with `<|endoftext|>`; chat is ChatML, without it |
| Ends with | `<|endoftext|>` after a completion, `<|im_end|>` after a chat turn |

## Scores

Greedy decoding in bf16, {measured.examples_per_set} examples a row. An answer is right when it holds the expected
name, number or JSON and ends by itself. *New phrasings* are templates that were never trained on, *new numbers* are
pairs that were never trained on, in either order. But for the first two rows they come with the noise of the training
data: upper case, missing question marks, typing errors, greetings, `Q: ... A:` frames, system prompts, earlier turns.
The other rows draw new values for trained templates; of sums in words, those with a `+` are written in digits.

| Evaluation set | Right |
|---|---|
{rows}

## Training

`python -m text_generation_server.embedded_model.build --output DIR` makes the whole folder and downloads nothing.
The corpus is generated: templates for capitals
({_counts(CAPITAL_QUESTIONS, CAPITAL_STEMS, COUNTRY_QUESTIONS)}) and for sums
({_counts(SUM_QUESTIONS, SUM_STEMS)}; {HELD_OUT_SUMS} pairs of numbers held out), a grammar of stories, and tasks with
JSON and tools whose names and values are mostly random, so that the model has to copy them. The loss is on the answers.

This model: seed {measured.seed}, {measured.steps:,} steps of {EXAMPLES_PER_STEP} examples, {measured.minutes:.0f}
minutes on {measured.device}. {measured.remark}

## Limits

Spelling is ASCII (`Brasilia`). Where a country has several capitals it names one. Numbers above 99, other operations
and questions in other languages are outside of what it learned. Prompts of more than a few hundred tokens confuse it.
It copies numbers and common names well and rare words badly; with several tools it may mix up their parameters.
"""
