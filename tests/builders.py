"""Small objects that tests are made of."""

from __future__ import annotations

from typing import Any

from text_generation_router.scheduling.requests import QueuedRequest, Sampling, ValidRequest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers


def queued(num_prompt_tokens: int, max_new_tokens: int = 4, **options: Any) -> QueuedRequest:
    """A waiting request with the prompt 1, 2, 3 ..."""
    request = ValidRequest(
        inputs="x" * num_prompt_tokens,
        input_ids=list(range(1, num_prompt_tokens + 1)),
        sampling=Sampling(),
        max_new_tokens=max_new_tokens,
        **options,
    )
    return QueuedRequest(request, validation_s=0.0)


def byte_tokenizer(specials: tuple[str, ...] = ("</s>",)) -> Tokenizer:
    """One id a byte (0 .. 255 in the order of their characters), then the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(specials))
    return tokenizer
