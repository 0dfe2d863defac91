"""What every answer of OpenAI's routes has: ids, names, usage, headers, logprobs, the form of errors."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from text_generation_router.api.headers import result_headers, stream_headers
from text_generation_router.api.openai.schemas import PromptTokensDetails, TokenLogprob, TopLogprob, Usage
from text_generation_router.api.reply import Headers
from text_generation_router.api.schemas import as_f32
from text_generation_router.api.served import Served
from text_generation_router.api.sse import frame
from text_generation_router.errors import RouterError, openai_error_body
from text_generation_router.inference import Inference
from text_generation_router.scheduling.requests import Event, Finished, PrefillEvent, Token, TokenEvent
from text_generation_router.token_bytes import TokenBytes
from text_generation_router.tokenizer import RouterTokenizer

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """The door to the model, and what its answers have in common."""

    served: Served
    inference: Inference
    tokenizer: RouterTokenizer
    texts: TokenBytes
    fingerprint: str
    """Version and build, as `system_fingerprint`."""
    max_client_batch_size: int
    prefill_logprobs: bool
    """Whether the shards can tell the logprobs of a prompt."""

    def new_id(self, prefix: str) -> str:
        return f"{prefix}-{secrets.token_hex(12)}"

    def stream_headers(self, num_characters: int) -> Headers:
        return stream_headers(self.served.compute_type, num_characters)

    def headers(self, num_characters: int, totals: Totals, total_s: float) -> Headers:
        usage = totals.usage()
        return result_headers(
            self.served.compute_type,
            num_characters,
            totals.finished(),
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.prompt_tokens_details.cached_tokens,
            total_s=total_s,
        )

    def error_frame(self, error: RouterError) -> bytes:
        return frame(openai_error_body(error.status, str(error), error.error_type))


@dataclass(slots=True)
class Totals:
    """How the generations of an answer ended. Copies of one request follow one another, and share its prompt."""

    num_copies: int = 1
    _ended: dict[int, Finished] = field(default_factory=dict)

    def take(self, index: int, events: Iterable[Event]) -> None:
        for event in events:
            if not isinstance(event, PrefillEvent) and event.finished is not None:
                self._ended[index] = event.finished

    def finished(self) -> Finished:
        """All as one: that which took longest, with the tokens of all."""
        longest = max(self._ended.values(), key=lambda each: each.timings.total_s)
        return replace(longest, generated_tokens=sum(each.generated_tokens for each in self._ended.values()))

    def usage(self) -> Usage:
        # The first copy has computed the prompt; to the others it was known.
        prompts = [each for index, each in self._ended.items() if index % self.num_copies == 0]
        prompt_tokens = sum(each.input_length for each in prompts)
        completion_tokens = sum(each.generated_tokens for each in self._ended.values())
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(sum(each.cached_tokens for each in prompts)),
        )


def logprob_bodies(events: Sequence[TokenEvent], texts: TokenBytes) -> list[TokenLogprob]:
    return [
        TokenLogprob(
            *_token(event.token, texts),
            top_logprobs=[TopLogprob(*_token(token, texts)) for token in event.top_tokens or ()],
        )
        for event in events
    ]


def _token(token: Token, texts: TokenBytes) -> tuple[str, float | None, list[int]]:
    raw = texts.of(token.id)
    return raw.decode(errors="replace"), as_f32(token.logprob), list(raw)
