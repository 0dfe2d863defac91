"""Prompt -> ids, on worker threads; the raw tokenizer for the way back."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import Tokenizer

from text_generation_router.config import ConfigError
from text_generation_router.errors import ValidationError
from text_generation_router.token_length import longest_token_bytes

MAX_CHARACTERS_IN_FLIGHT = 8 * 2**20
"""Text inside the tokenizer at one time; what comes on top waits outside, in arrival order."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Encoding:
    """A tokenised text."""

    ids: list[int]
    offsets: list[tuple[int, int]] = field(default_factory=list)
    """Start and end of each token in characters of the text; only where they were asked for."""


class RouterTokenizer:
    """The model's tokenizer and the threads it runs on."""

    def __init__(
        self, tokenizer: Tokenizer, *, vocab_size: int, num_workers: int, special_tokens: Iterable[str] = ()
    ) -> None:
        """``vocab_size`` is the width of the logits: a tokenizer may know ids that the model does not.

        ``special_tokens`` are special beside those that the tokenizer itself marks; unknown ones do no harm.
        """
        # Settings of training runs: they would pad a prompt, or cut it without a word.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.tokenizer = tokenizer
        marked = (token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        named = (tokenizer.token_to_id(token) for token in special_tokens)
        self.special_ids = frozenset((*marked, *(token_id for token_id in named if token_id is not None)))
        self.model_max_length: int | None = None
        """The longest text that the tokenizer's configuration allows for; None is no limit."""
        self._longest_token_bytes = longest_token_bytes(tokenizer)
        self._vocab_size = vocab_size
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="tokenizer")
        self._budget = _Budget(MAX_CHARACTERS_IN_FLIGHT)

    @classmethod
    def load(cls, path: str, *, vocab_size: int, num_workers: int) -> RouterTokenizer:
        """From a ``tokenizer.json``, or the folder that holds one, and what lies beside it. Raises: ConfigError."""
        file = Path(path)
        if file.is_dir():
            file /= "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare exceptions
            raise ConfigError(f"Unable to load tokenizer {file}: {error}") from None
        config = _json_object(file.parent / "tokenizer_config.json")
        special_tokens = {
            *_named_special_tokens(config),
            *_named_special_tokens(_json_object(file.parent / "special_tokens_map.json")),
        }
        loaded = cls(tokenizer, vocab_size=vocab_size, num_workers=num_workers, special_tokens=special_tokens)
        length = config.get("model_max_length")
        if isinstance(length, int | float) and length > 0:  # "no limit" is written as 1e30
            loaded.model_max_length = int(length)
        return loaded

    def least_tokens(self, text: str) -> int:
        """How many a text has at least; costs nothing."""
        longest = self._longest_token_bytes
        return 0 if longest is None else -(-len(text.encode()) // longest)

    async def encode(self, text: str, add_special_tokens: bool = True) -> Encoding:
        """Ids of a whole prompt, without offsets. Raises: ValidationError."""
        return await self._on_worker(len(text), lambda: self._encode(text, add_special_tokens))

    async def encode_pieces(self, pieces: Sequence[tuple[str, bool]]) -> Encoding:
        """Ids of a prompt in pieces, with offsets; in those that are marked true nothing is special.

        Raises: ValidationError.
        """
        return await self._on_worker(sum(len(text) for text, _ in pieces), lambda: self._encode_pieces(pieces))

    async def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts, special tokens included. Raises: ValidationError."""
        return await self._on_worker(sum(map(len, texts)), lambda: self._encode_texts(texts))

    async def encode_cut(self, text: str, max_tokens: int, *, keep_end: bool = False) -> list[int]:
        """Ids of as much of a text as fits, special tokens around it; of its beginning unless ``keep_end``.

        Raises: ValidationError.
        """
        return await self._on_worker(len(text), lambda: self._encode_cut(text, max_tokens, keep_end=keep_end))

    async def encode_then(
        self, text: str, then: Callable[[Encoding], Result], *, add_special_tokens: bool = True
    ) -> Result:
        """``then`` of ids and offsets, on the worker thread as well: a long prompt has a million of each.

        Raises: ValidationError.
        """
        return await self._on_worker(len(text), lambda: then(self._encode_with_offsets(text, add_special_tokens)))

    def special_texts(self) -> list[str]:
        """Of the tokens that a text becomes wherever it stands, special or not."""
        return [token.content for token in self.tokenizer.get_added_tokens_decoder().values()]

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    # `encode` holds the interpreter lock for its whole run (2 MB: 1.3 s); the batch calls let go of it.

    def _encode(self, text: str, add_special_tokens: bool) -> Encoding:
        try:
            (encoding,) = self.tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except BaseException as error:  # a panic of the library is no Exception
            raise ValidationError(f"tokenizer error {error}") from None
        return Encoding(self._known(encoding.ids))

    def _encode_pieces(self, pieces: Sequence[tuple[str, bool]]) -> Encoding:
        whole = Encoding([])
        place = 0
        for text, is_plain in pieces:
            tokenizer = self._plain_tokenizer if is_plain else self.tokenizer
            try:
                (encoding,) = tokenizer.encode_batch([text], add_special_tokens=False)
            except BaseException as error:
                raise ValidationError(f"tokenizer error {error}") from None
            whole.ids.extend(self._known(encoding.ids))
            whole.offsets.extend((start + place, end + place) for start, end in encoding.offsets)
            place += len(text)
        return whole

    @cached_property
    def _plain_tokenizer(self) -> Tokenizer:
        """One that knows no special tokens: a setting of its own, not of a call."""
        tokenizer = Tokenizer.from_str(self.tokenizer.to_str())
        tokenizer.encode_special_tokens = True
        return tokenizer

    def _encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            encodings = self.tokenizer.encode_batch_fast(list(texts))
        except BaseException as error:
            raise ValidationError(f"tokenizer error {error}") from None
        return [self._known(encoding.ids) for encoding in encodings]

    def _encode_cut(self, text: str, max_tokens: int, *, keep_end: bool) -> list[int]:
        try:
            (encoding,) = self.tokenizer.encode_batch_fast([text], add_special_tokens=False)
            room = max(max_tokens - self.tokenizer.num_special_tokens_to_add(is_pair=False), 0)
            encoding.truncate(room, direction="left" if keep_end else "right")
            encoding = self.tokenizer.post_process(encoding)
        except BaseException as error:
            raise ValidationError(f"tokenizer error {error}") from None
        return self._known(encoding.ids)

    def _encode_with_offsets(self, text: str, add_special_tokens: bool) -> Encoding:
        try:
            (encoding,) = self.tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
        except BaseException as error:
            raise ValidationError(f"tokenizer error {error}") from None
        return Encoding(encoding.ids, encoding.offsets)

    def _known(self, ids: list[int]) -> list[int]:
        largest = max(ids, default=0)
        if largest >= self._vocab_size:
            raise ValidationError(
                f"tokenizer error the text holds token {largest}, the model knows {self._vocab_size} tokens"
            )
        return ids

    async def _on_worker(self, size: int, work: Callable[[], Result]) -> Result:
        size = await self._budget.take(size)
        loop = asyncio.get_running_loop()
        try:
            future = self._threads.submit(work)
        except BaseException:
            self._budget.give_back(size)
            raise
        # When its client leaves, a text that waits for a thread is dropped; one on a thread is not interrupted, and
        # its share of the budget is free when the thread is.
        future.add_done_callback(lambda _: _call_on(loop, self._budget.give_back, size))
        return await asyncio.wrap_future(future)


def _json_object(file: Path) -> dict[str, Any]:
    """What a file of the model's folder says; nothing if it is missing or no JSON object."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _named_special_tokens(config: Mapping[str, Any]) -> Iterator[str]:
    """Tokens that transformers takes for special by their role; tokenizer.json may not mark them."""
    for key, value in config.items():
        if key.endswith("_token"):
            yield from _contents([value])
        elif key in ("additional_special_tokens", "extra_special_tokens"):
            yield from _contents(value.values() if isinstance(value, dict) else value or ())


def _contents(tokens: Iterable[object]) -> Iterator[str]:
    """Texts of tokens that are written as a text or as an object with ``content``."""
    for token in tokens:
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            yield content


class _Budget:
    """A count that tasks take from in arrival order."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._left = size
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, amount: int) -> int:
        """Wait for ``amount``, or for everything when it is more than there ever is; returns what was taken."""
        amount = min(amount, self._size)
        if not self._waiting and amount <= self._left:
            self._left -= amount
            return amount
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (amount, turn)
        self._waiting.append(entry)
        try:
            await turn
        except asyncio.CancelledError:
            if entry in self._waiting:
                self._waiting.remove(entry)
                self._admit()
            elif not turn.cancelled():  # admitted; a cancelled turn took nothing
                self.give_back(amount)
            raise
        return amount

    def give_back(self, amount: int) -> None:
        self._left += amount
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._left:
            amount, turn = self._waiting.popleft()
            self._left -= amount
            if turn.cancelled():
                self._left += amount
            else:
                turn.set_result(None)


def _call_on(loop: asyncio.AbstractEventLoop, function: Callable[[int], None], amount: int) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(function, amount)
