"""Texts that are to become vectors, checked and tokenised; and vectors as they are answered."""

from __future__ import annotations

import asyncio
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from text_generation_router.errors import ValidationError
from text_generation_router.shards.convert import EmbeddingInfo
from text_generation_router.tokenizer import RouterTokenizer

VECTORS_AT_ONCE = 64
"""In one turn on the event loop: milliseconds."""
MAX_INPUTS = 2048
"""Texts of one request: OpenAI's limit."""


class TextsRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What every embedding route asks for, whatever its body looks like."""

    inputs: Sequence[str | Sequence[int]]
    """Texts, or their token ids."""
    normalize: bool | None = None
    """None: as the model's configuration says."""
    dimensions: int | None = None
    """None: all of them."""
    prompt_name: str | None = None
    truncate: bool = False
    """Whether a text that is too long is cut, instead of refused."""
    keep_end: bool = False
    """Of a text that is cut."""


@dataclass(frozen=True, slots=True)
class Vectors:
    """In the order of the texts."""

    raw: list[bytes]
    """Float32 as the processor writes it."""
    num_tokens: int

    def as_lists(self, start: int, stop: int) -> list[list[float]]:
        return [array("f", vector).tolist() for vector in self.raw[start:stop]]


async def tokenise(
    request: TextsRequest, tokenizer: RouterTokenizer, info: EmbeddingInfo, *, max_tokens: int, vocab_size: int
) -> list[list[int]]:
    """Token ids of each text: at least one, at most ``max_tokens``. Raises: ValidationError."""
    _check(request, info, vocab_size)
    prompt = info.prompts.get(info.default_prompt if request.prompt_name is None else request.prompt_name, "")
    ids: list[list[int]] = [[] for _ in request.inputs]
    texts: dict[int, str] = {}
    for index, given in enumerate(request.inputs):
        if isinstance(given, str):
            texts[index] = (prompt + given).lower() if info.lower_case else prompt + given
        else:
            ids[index] = list(given)
    if texts:
        for index, encoded in zip(texts, await tokenizer.encode_texts(list(texts.values())), strict=True):
            ids[index] = encoded
    for index, each in enumerate(ids):
        if not each:
            raise ValidationError(f"`inputs` cannot be empty: input {index} has no tokens")
        if len(each) > max_tokens:
            if not request.truncate:
                raise ValidationError(
                    f"`inputs` must have at most {max_tokens} tokens. Given: {len(each)} in input {index}; "
                    "`truncate` would cut it"
                )
            if index in texts:
                ids[index] = await tokenizer.encode_cut(texts[index], max_tokens, keep_end=request.keep_end)
            else:
                ids[index] = each[-max_tokens:] if request.keep_end else each[:max_tokens]
    return ids


async def finish(vectors: Sequence[bytes], request: TextsRequest, info: EmbeddingInfo) -> list[bytes]:
    """Cut and normalize as asked; others get their turn meanwhile."""
    normalizes = info.normalizes if request.normalize is None else request.normalize
    width = request.dimensions or info.dimensions
    if not normalizes and width == info.dimensions:
        return list(vectors)
    finished: list[bytes] = []
    for vector in vectors:
        if len(finished) % VECTORS_AT_ONCE == 0:
            await asyncio.sleep(0)
        finished.append(_finished(vector[: width * 4], normalizes=normalizes))
    return finished


def _finished(raw: bytes, *, normalizes: bool) -> bytes:
    if not normalizes:
        return raw
    vector = array("f", raw)
    length = math.hypot(*vector)
    if length == 0.0:
        return raw
    return array("f", [value / length for value in vector]).tobytes()


def _check(request: TextsRequest, info: EmbeddingInfo, vocab_size: int) -> None:
    """All that can be said without tokens. Raises: ValidationError."""
    if not request.inputs:
        raise ValidationError("`inputs` cannot be empty")
    if len(request.inputs) > MAX_INPUTS:
        raise ValidationError(f"`inputs` may be {MAX_INPUTS} at most. Given: {len(request.inputs)}")
    for index, given in enumerate(request.inputs):
        if not given:
            raise ValidationError(f"`inputs` cannot be empty: input {index} is")
        if not isinstance(given, str) and max(given) >= vocab_size:
            raise ValidationError(f"token ids of an input must be less than {vocab_size}")
    if request.prompt_name is not None and request.prompt_name not in info.prompts:
        known = ", ".join(f"`{name}`" for name in info.prompts) or "none"
        raise ValidationError(f"the model has no prompt of the name `{request.prompt_name}`; what it has: {known}")
    width = request.dimensions
    if width is not None and width != info.dimensions and width not in info.shorter:
        known = ", ".join(map(str, sorted({*info.shorter, info.dimensions})))
        raise ValidationError(f"`dimensions` must be what the model was trained for: {known}. Given: {width}")
