"""A model whose code fails when it sees certain tokens: what a defect in a kernel looks like from outside."""

from __future__ import annotations

import json
from pathlib import Path

from tiny_models import make_tiny_model

MODULE = """
import os
import signal
import time

import torch
from transformers import LlamaForCausalLM


class Embedding(torch.nn.Embedding):
    def forward(self, ids):
        flat = ids.flatten().tolist()
        # Three in a row: one alone is said by other answers as well.
        seen = {a for a, b, c in zip(flat, flat[1:], flat[2:]) if a == b == c}
        if ord("\\x01") in seen:
            os.kill(os.getpid(), signal.SIGKILL)
        if ord("\\x02") in seen:
            time.sleep(3600)
        if ord("\\x03") in seen:
            raise RuntimeError("a defect")
        if ord("\\x04") in seen:
            raise torch.OutOfMemoryError("made up")
        vectors = super().forward(ids)
        if ord("\\x05") in seen:
            vectors = torch.where((ids == ord("\\x05")).unsqueeze(-1), float("nan"), vectors)
        return vectors


class HostileForCausalLM(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.embed_tokens.__class__ = Embedding
"""

KILL, HANG, RAISE, OUT_OF_MEMORY, NAN = (character * 3 for character in "\x01\x02\x03\x04\x05")
"""Parts of a prompt, and what the model does that reads them."""


def make_hostile_model(folder: Path) -> Path:
    make_tiny_model("llama", folder, max_position_embeddings=2048)
    (folder / "modeling_hostile.py").write_text(MODULE)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["HostileForCausalLM"]
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_hostile.HostileForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
