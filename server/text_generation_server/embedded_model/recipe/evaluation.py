"""Measures a finished model folder: it answers held-out examples greedily, in bf16, and must end by itself."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from text_generation_server.embedded_model.recipe.corpus import HELD_OUT, held_out
from text_generation_server.embedded_model.recipe.example import Example

MAX_NEW_TOKENS = 128
ROWS = 50


@dataclass(frozen=True, slots=True)
class Answered:
    """What the model made of an example; `ended` says that it wrote an end token."""

    example: Example
    answer: str
    ended: bool

    @property
    def right(self) -> bool:
        """The answer ends and holds what is expected. Of a sum the last number counts: before it come its terms."""
        if self.example.kind.startswith("sum"):
            return self.ended and re.findall(r"\d+", self.answer)[-1:] == [self.example.expected]
        return self.ended and self.example.expected in self.answer


class Evaluator:
    """A model folder, loaded as `transformers` loads it."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()

    def answer(self, examples: list[Example]) -> list[Answered]:
        """Greedy answers, in the order of the examples."""
        by_length = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt))
        answers: dict[int, Answered] = {}
        for at in range(0, len(by_length), ROWS):
            chosen = by_length[at : at + ROWS]
            answers |= zip(chosen, self._answer_batch([examples[i] for i in chosen]), strict=True)
        return [answers[i] for i in range(len(examples))]

    def score(self, name: str, count: int) -> float:
        """Part of the first `count` examples of an evaluation set that is answered right."""
        answered = self.answer(held_out(name, count))
        return sum(a.right for a in answered) / len(answered)

    def scores(self, count: int) -> dict[str, float]:
        return {name: self.score(name, count) for name in HELD_OUT}

    @torch.inference_mode()
    def _answer_batch(self, examples: list[Example]) -> list[Answered]:
        # as the server does: BOS before a plain prompt, nothing before a chat
        ids = [
            self._tokenizer(e.prompt, add_special_tokens=not e.prompt.startswith("<|im_start|>"))["input_ids"]
            for e in examples
        ]
        inputs = self._tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(self._model.device)
        output = self._model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        new = output[:, inputs["input_ids"].shape[1] :]
        texts = self._tokenizer.batch_decode(new, skip_special_tokens=True)
        ends = (
            torch.isin(new, torch.tensor(self._model.generation_config.eos_token_id, device=new.device))
            .any(-1)
            .tolist()
        )
        return [Answered(*row) for row in zip(examples, texts, ends, strict=True)]
