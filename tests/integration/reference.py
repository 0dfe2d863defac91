"""What `transformers` itself does with a model folder and a prompt: slow, obvious, and one prompt at a time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

LENGTHS = (1, 2, 5, 16, 17, 33, 48, 63, 64, 65, 90, 128, 150, 7, 21, 200)
"""Tokens of sixteen prompts: around block borders, shorter and longer than a chunk or a window."""
NUM_NEW_TOKENS = (24, 1, 17, 32, 8, 20, 3, 40, 16, 15, 12, 30, 2, 33, 9, 25)


def prompts(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[str]:
    """Texts of so many characters; the tiny models' tokenizer makes one token of each."""
    letters = "".join(map(chr, range(32, 127)))
    rng = random.Random(seed)
    return ["".join(rng.choices(letters, k=length)) for length in lengths]


class Reference:
    def __init__(self, folder: Path) -> None:
        import transformers

        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    def greedy(self, prompt: str, max_new_tokens: int) -> list[int]:
        """The ids that `generate` appends to the prompt."""
        ids_1T = self._ids(prompt)
        output_1T = self._model.generate(
            ids_1T, attention_mask=torch.ones_like(ids_1T), do_sample=False, max_new_tokens=max_new_tokens
        )
        ids: list[int] = output_1T[0, ids_1T.shape[1] :].tolist()
        return ids

    @torch.inference_mode()
    def logprobs(self, prompt: str, continuation: Sequence[int] = ()) -> Tensor:
        """float32 [T, V]: row t holds the logprobs of the token behind position t."""
        ids_1T = torch.cat([self._ids(prompt), torch.tensor([continuation], dtype=torch.int64)], dim=1)
        logits_TV: Tensor = self._model(ids_1T, use_cache=False).logits[0]
        return logits_TV.float().log_softmax(-1)

    def ids(self, prompt: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(prompt).ids
        return ids

    def spelled(self, token_id: int) -> str:
        """The text of one token alone."""
        text: str = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return text

    def _ids(self, prompt: str) -> Tensor:
        return torch.tensor([self.ids(prompt)], dtype=torch.int64)
