"""A model that knows a few texts by heart: what it says next depends on the last letter alone, so tests can spell it.

    >>> "a" -> "bcdefghijklmnopqrstuvwxyz." and then the end of the text
    >>> "A" -> "BCDEFGHIJKLMNOPQRSTUVWXYZABC..." without an end
    >>> "!" -> "🦊é→!🦊é→!..." without an end

A token is one byte: the fox is four of them. It is a real checkpoint of a real architecture: a llama of one layer whose
attention and MLP add nothing, whose embedding is the identity and whose head is the table of successors.
"""

from __future__ import annotations

import string
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_models import EOS_ID, VOCAB_SIZE, make_tiny_model

ENDLESS = "A"
FOXES = "🦊é→!"
ALPHABET = "bcdefghijklmnopqrstuvwxyz."
"""The answer to "a", with the end-of-sequence token behind it."""
POSITIONS = 4096
"""So many that a stream without an end outlasts any test that wants it to run."""


def make_reciting_model(folder: Path) -> Path:
    make_tiny_model(
        "llama",
        folder,
        hidden_size=VOCAB_SIZE,
        num_hidden_layers=1,
        tie_word_embeddings=False,
        max_position_embeddings=POSITIONS,
    )
    file = folder / "model.safetensors"
    weights = load_file(file)
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.zero_()
        elif name.endswith("norm.weight"):
            weight.fill_(1.0)
    weights["model.embed_tokens.weight"] = torch.eye(VOCAB_SIZE)
    weights["lm_head.weight"] = _successors()
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def _successors() -> torch.Tensor:
    """[next id, id]: 1 where the one follows the other. What is in no text is followed by a question mark."""
    follows = dict.fromkeys(range(VOCAB_SIZE), ord("?"))
    alphabet, capitals, foxes = "a" + ALPHABET, string.ascii_uppercase + "A", "!" + FOXES
    for text in (alphabet, capitals, foxes):
        follows |= dict(pairwise(text.encode()))
    follows[ord(".")] = EOS_ID
    table = torch.zeros(VOCAB_SIZE, VOCAB_SIZE)
    for token_id, next_id in follows.items():
        table[next_id, token_id] = 1.0
    return table
