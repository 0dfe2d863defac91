"""From the token ids of one request to the events its client gets."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from text_generation_router.detokenizer import Detokenizer, SequenceDetokenizer
from text_generation_router.scheduling.requests import (
    Finished,
    PrefillEvent,
    PrefillToken,
    QueuedRequest,
    RequestTimings,
    Token,
    TokenEvent,
)
from text_generation_router.shards.convert import PrefillLogprobs
from text_generation_router.stopping import StoppingRules, StopTextMatcher


@dataclass(slots=True)
class Answer:
    """The text side of a request. It outlives pre-emption: the shards only ever see ids."""

    queued: QueuedRequest
    detokenizer: Detokenizer
    rules: StoppingRules
    text: SequenceDetokenizer
    pieces: list[str] = field(default_factory=list)
    prefill_logprobs: list[float] = field(default_factory=list)
    prefill_top: list[list[tuple[int, float]]] = field(default_factory=list)
    last_token_at: float = 0.0

    def add_token(self, token_id: int, logprob: float | None, top: list[tuple[int, float]] | None) -> TokenEvent:
        """Take the next output id; the event says whether it was the last."""
        queued, detokenizer = self.queued, self.detokenizer
        queued.output_ids.append(token_id)
        index = len(queued.output_ids)
        special = token_id in detokenizer.special_ids
        reason, piece = self.rules.check(index, token_id, self.text.step(token_id), special=special)
        if piece and not special:
            self.pieces.append(piece)
        top_tokens = None
        if top is not None:
            top_tokens = [Token(i, detokenizer.text_of(i), p, i in detokenizer.special_ids) for i, p in top]
        event = TokenEvent(index, Token(token_id, piece, logprob, special), top_tokens)
        self.last_token_at = time.perf_counter()
        if reason is not None:
            started_at = queued.started_at or queued.enqueued_at
            event.finished = Finished(
                generated_text="".join(self.pieces),
                finish_reason=reason,
                generated_tokens=index,
                seed=queued.request.sampling.seed if queued.request.sampling.do_sample else None,
                input_length=queued.num_prompt_tokens,
                cached_tokens=queued.num_cached_tokens,
                timings=RequestTimings(
                    validation_s=queued.validation_s,
                    queue_s=started_at - queued.enqueued_at,
                    inference_s=self.last_token_at - started_at,
                    total_s=queued.validation_s + self.last_token_at - queued.enqueued_at,
                ),
            )
        return event

    def add_prefill(self, prefill: PrefillLogprobs) -> None:
        """Take the logprobs of a chunk of the prompt. After a pre-emption positions come a second time."""
        del self.prefill_logprobs[prefill.first_position :]
        self.prefill_logprobs += prefill.logprobs
        del self.prefill_top[prefill.first_position :]
        self.prefill_top += prefill.top_tokens

    def prefill_event(self) -> PrefillEvent:
        """The prompt's tokens; logprobs are None where none were computed, as for the first token always."""
        ids = self.queued.request.input_ids
        logprobs: list[float | None] = [None, *self.prefill_logprobs[1 : len(ids)]]
        logprobs += [None] * (len(ids) - len(logprobs))
        tops = self.prefill_top + [[]] * (len(ids) - len(self.prefill_top))
        text_of = self.detokenizer.text_of
        return PrefillEvent(
            [PrefillToken(i, text_of(i), p, top) for i, p, top in zip(ids, logprobs, tops, strict=True)]
        )


def start_answer(queued: QueuedRequest, detokenizer: Detokenizer, eos_token_ids: frozenset[int]) -> Answer:
    """The answer to a request that has just been queued."""
    request = queued.request
    return Answer(
        queued=queued,
        detokenizer=detokenizer,
        rules=StoppingRules(
            max_new_tokens=request.max_new_tokens,
            eos_token_ids=frozenset() if request.ignore_eos else eos_token_ids,
            matcher=StopTextMatcher(request.stop_sequences) if request.stop_sequences else None,
        ),
        text=detokenizer.start(request.input_ids),
    )
