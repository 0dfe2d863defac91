"""Runs one step: rows -> forward passes -> sampled ids; the device's part and the host's part apart.

``launch`` needs nothing that the device has not computed yet, so the next step can be launched before the results of
this one are read (``collect``). On a CPU the two simply follow each other.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import torch
from text_generation_proto.grammars import GrammarError
from torch import Tensor

from text_generation_server.engine.batch import Batch, Row, Sequence, SequenceLimits
from text_generation_server.engine.inputs import build_inputs, split_passes
from text_generation_server.engine.readback import Readback, Stopwatch
from text_generation_server.engine.steps import Generation, PrefillLogprobs, Step, StepResult, Timings, TopTokens
from text_generation_server.errors import InvalidStep
from text_generation_server.generation.guidance import Allowed, Guidance, GuidanceFailed
from text_generation_server.generation.sampler import (
    Sampled,
    SamplingRow,
    TopCandidates,
    likeliest,
    num_likely,
    prepare,
    read_top_tokens,
    sample,
)
from text_generation_server.generation.watermark import DEFAULT_WATERMARK, Watermark
from text_generation_server.model.runner import ModelRunner
from text_generation_server.transfer import to_device

MAX_PROMPT_LOGITS_ROWS = 256
"""Rows of logits that prompt logprobs may need at once; a longer chunk runs in several forward passes."""

NOT_FINITE = "the model's logits were not finite"

Broadcast = Callable[[Tensor], None]
"""Fill an int64 tensor of ids on every rank with the values it has on rank 0."""


@dataclass(slots=True)
class PromptLogprobs:
    """Of one sequence in a step, in parts."""

    sequence: Sequence
    first_position: int
    logprobs: list[Tensor] = field(default_factory=list)
    top_values: list[Tensor] = field(default_factory=list)
    """Logprobs of the most likely tokens, where these are wanted, [N, P]; and their ids."""
    top_ids: list[Tensor] = field(default_factory=list)
    readback: Readback | None = None
    """What these come to."""

    def read_back(self) -> None:
        self.readback = Readback(
            *(torch.cat(parts) for parts in (self.logprobs, self.top_values, self.top_ids) if parts)
        )

    def get(self) -> PrefillLogprobs:
        assert self.readback is not None
        logprobs_N, *top = self.readback.get()
        top_tokens = _read_prompt_top(*top, wanted=self.sequence.prefill_top_n_tokens) if top else []
        return PrefillLogprobs(self.first_position, logprobs_N.tolist(), top_tokens)


@dataclass(slots=True)
class Launched:
    """A step whose work is on the device, or done."""

    step: Step
    sampled: list[tuple[Sequence, int]] = field(default_factory=list)
    """Sequences that get a token, with its output index; [S]."""
    ids_S: Tensor | None = None
    readback: Readback | None = None
    """Ids, and on rank 0 logprobs, then the three tensors of the top tokens."""
    top: TopCandidates | None = None
    prompt_logprobs: dict[int, PromptLogprobs] = field(default_factory=dict)
    """By sequence id."""
    unguided: dict[int, str] = field(default_factory=dict)
    """Sequence id -> why its grammar cannot say what comes next."""
    embedded: list[Sequence] = field(default_factory=list)
    embeddings: Readback | None = None
    """The mean hidden states of each of these; float32 [E, H]."""
    timings: Timings = field(default_factory=Timings)
    forward: Stopwatch | None = None
    sampling: Stopwatch | None = None
    behind: Stopwatch | None = None
    """The last watch of the step before this one, if it had not been collected at launch."""


class StepExecutor:
    """Advances the sequences of one shard. Not thread-safe: the engine's thread owns it."""

    def __init__(
        self,
        runner: ModelRunner,
        limits: SequenceLimits,
        *,
        is_leader: bool = True,
        broadcast: Broadcast | None = None,
        on_progress: Callable[[], None] = lambda: None,
        guidance: Guidance | None = None,
        watermark: Watermark = DEFAULT_WATERMARK,
    ) -> None:
        self.batch = Batch()
        self._runner = runner
        self._limits = limits
        self._device = runner.info.device
        self._is_leader = is_leader
        self._broadcast = broadcast
        self._on_progress = on_progress
        self._guidance = guidance
        self._watermark = watermark
        self._suspect_blocks: list[int] = []
        """Blocks that sequences have left behind with what may be not-a-number; the next launch clears them."""
        self._kernels = runner.info.has_cpu_kernels
        if self._kernels and is_leader:
            prepare(runner.info.vocab_size, runner.info.dtype)

    def launch(self, step: Step, previous: Launched | None = None) -> Launched:
        """Start a step; ``previous`` is the one before it if its results are not collected yet.

        Raises: InvalidStep; whatever the model raises. The sequences are in an undefined state then.
        """
        self._let_go(self.batch.drop(step.drops))
        for new in step.new_sequences:
            if new.grammar is not None and self._is_leader and self._guidance is None:
                raise InvalidStep(f"sequence {new.sequence_id}: this shard knows no grammars")
            self.batch.add(new, self._limits)
        rows = self.batch.rows(step, self._limits)
        launched = Launched(step, forward=Stopwatch(self._device), sampling=Stopwatch(self._device))
        if previous is not None:
            launched.behind = previous.sampling if previous.sampled else previous.forward
        launched.timings.num_decode_rows = len(step.decodes)
        launched.timings.num_prefill_tokens = sum(row.num_tokens for row in rows if not row.is_decode)
        if rows:
            if self._suspect_blocks:
                # Behind all that was launched before, ahead of whoever was given these blocks.
                self._runner.zero_blocks(self._suspect_blocks)
                self._suspect_blocks = []
            ahead = self._allowed_ahead(rows) if self._is_leader else {}
            logits_SV, sampling_rows, input_ids_T = self._forward(rows, launched, previous)
            if sampling_rows:
                if self._is_leader:
                    sampling_rows = self._guided(sampling_rows, launched, previous, ahead)
                self._choose(logits_SV, sampling_rows, input_ids_T, launched)
            for reported in launched.prompt_logprobs.values():
                reported.read_back()
            if launched.embedded:
                launched.embeddings = Readback(_mean_states(launched.embedded))
        return launched

    def collect(self, launched: Launched) -> StepResult:
        """Wait for a step and record what it sampled. Steps are collected in the order of their launch."""
        result = StepResult(launched.step.epoch, launched.step.step_id, timings=launched.timings)
        generations: dict[int, Generation] = {}
        if launched.readback is not None:
            host = launched.readback.get()
            logprobs = host[1].tolist() if self._is_leader else [0.0] * len(launched.sampled)
            top_tokens = _read_top(launched.top, host[2:])
            for index, token_id in enumerate(host[0].tolist()):
                sequence, output_index = launched.sampled[index]
                if sequence.failed:
                    continue  # this step was launched before the failure of the one before it was known
                sequence.num_pending -= 1
                if sequence.sequence_id in launched.unguided:
                    self._fail(sequence, result, launched.unguided[sequence.sequence_id])
                    continue
                if token_id < 0:
                    self._fail(sequence, result, NOT_FINITE)
                    continue
                sequence.token_ids.append(token_id)
                sequence.num_verified = sequence.num_prompt_tokens + output_index
                generations[sequence.sequence_id] = Generation(
                    sequence.sequence_id,
                    output_index,
                    [token_id],
                    [logprobs[index]],
                    [top_tokens[index]] if index in top_tokens else [],
                )
        for sequence_id, reported in launched.prompt_logprobs.items():
            if not reported.sequence.failed:
                generations.setdefault(sequence_id, Generation(sequence_id)).prefill = reported.get()
        if launched.embeddings is not None:
            (vectors_EH,) = launched.embeddings.get()
            for sequence, vector_H in zip(launched.embedded, vectors_EH, strict=True):
                if sequence.sequence_id in generations:
                    generations[sequence.sequence_id].embedding = vector_H.numpy().astype("<f4", copy=False).tobytes()
        if self._is_leader:
            result.generations = list(generations.values())
        if launched.forward is not None and launched.sampling is not None:
            result.timings.forward_ns = launched.forward.total_ns()
            result.timings.sample_ns = launched.sampling.total_ns()
            if launched.behind is not None:
                result.timings.idle_ns = launched.forward.since_ns(launched.behind)
        return result

    def clear(self) -> None:
        """Drop every sequence. The device, which may have failed, is not asked for anything."""
        self._let_go(self.batch.clear())

    def _forward(
        self, rows: list[Row], launched: Launched, previous: Launched | None
    ) -> tuple[Tensor, list[SamplingRow], Tensor]:
        """Logits [S, V] of the rows that get a token, what is asked of them, and the input ids of the first pass."""
        assert launched.forward is not None
        picked: list[Tensor] = []
        sampling_rows: list[SamplingRow] = []
        first_ids_T: Tensor | None = None
        for pass_rows in split_passes(rows, MAX_PROMPT_LOGITS_ROWS):
            inputs, counts = build_inputs(
                pass_rows, block_size=self._limits.block_size, device=self._device, pads=self._runner.pads_steps
            )
            _fill_in_pending(inputs.input_ids_T, pass_rows, previous)
            first_ids_T = inputs.input_ids_T if first_ids_T is None else first_ids_T
            launched.forward.start()
            if any(row.embeds for row in pass_rows):
                logits_LV, states_TH = self._runner.forward_with_states(inputs)
                self._take_states(states_TH, pass_rows, launched)
            else:
                logits_LV = self._runner.forward(inputs)
            launched.forward.stop()
            self._on_progress()
            places: list[int] = []
            end = token_index = 0
            for row, count in zip(pass_rows, counts, strict=True):
                end += count
                if row.wants_prompt_logprobs and self._is_leader:
                    self._prompt_logprobs(row, logits_LV[end - count : end], launched)
                if row.samples:
                    places.append(end - 1)
                    sampling_rows.append(_sampling_row(row, token_index))
                    launched.sampled.append((row.sequence, row.end - row.sequence.num_prompt_tokens))
                token_index += row.num_tokens
            # All of them is the rule, and then there is nothing to copy.
            if len(places) < logits_LV.shape[0]:
                logits_LV = logits_LV.index_select(0, to_device(places, torch.int64, self._device))
            picked.append(logits_LV)
        assert first_ids_T is not None
        return picked[0] if len(picked) == 1 else torch.cat(picked), sampling_rows, first_ids_T

    def _take_states(self, states_TH: Tensor, rows: list[Row], launched: Launched) -> None:
        """Add up the hidden states of prompts that embed."""
        start = 0
        for row in rows:
            if row.embeds and self._is_leader:
                sequence = row.sequence
                size = min(row.end, sequence.num_prompt_tokens) - row.start
                total_H = states_TH[start : start + size].sum(0, dtype=torch.float32)
                sequence.states_sum = total_H if sequence.states_sum is None else sequence.states_sum + total_H
                if row.samples:
                    launched.embedded.append(sequence)
            start += row.num_tokens

    def _choose(self, logits_SV: Tensor, rows: list[SamplingRow], input_ids_T: Tensor, launched: Launched) -> None:
        assert launched.sampling is not None
        launched.sampling.start()
        sampled: Sampled | None = None
        if self._is_leader:
            sampled = sample(logits_SV, rows, input_ids_T, kernels=self._kernels, watermark=self._watermark)
            ids_S = sampled.ids_S
        else:
            ids_S = torch.empty(len(rows), dtype=torch.int64, device=self._device)
        if self._broadcast is not None:
            self._broadcast(ids_S)
        launched.sampling.stop()
        launched.ids_S = ids_S
        results = [ids_S]
        if sampled is not None:
            results.append(sampled.logprobs_S)
            launched.top = sampled.top
            if sampled.top is not None:
                results += [sampled.top.values_RN, sampled.top.ids_RN, sampled.top.counts_R]
        launched.readback = Readback(*results)
        for sequence, _ in launched.sampled:
            sequence.num_pending += 1

    def _prompt_logprobs(self, row: Row, logits_NV: Tensor, launched: Launched) -> None:
        """Report the logprobs at the row's prompt tokens; the one behind them waits in the sequence for the next."""
        sequence = row.sequence
        num_predicted = min(row.end, sequence.num_prompt_tokens - 1) - row.start
        targets = sequence.token_ids[row.start + 1 : row.start + 1 + num_predicted]
        targets_N = to_device(targets, torch.int64, self._device)
        logprobs_NV = torch.log_softmax(logits_NV[:num_predicted], -1, dtype=torch.float32)
        found = [logprobs_NV.gather(-1, targets_N.unsqueeze(-1)).squeeze(-1)]
        if sequence.prefill_top_n_tokens:
            found += logprobs_NV.topk(num_likely(sequence.prefill_top_n_tokens, logprobs_NV.shape[-1]))
        unknown = [math.nan, math.nan, 0]
        first = sequence.next_prompt_logprobs or [
            each.new_full(each.shape[1:], value) for each, value in zip(found, unknown[: len(found)], strict=True)
        ]
        known = [torch.cat([ahead[None], each]) for ahead, each in zip(first, found, strict=True)]
        num_reported = min(row.end, sequence.num_prompt_tokens) - row.start
        has_next = num_reported < known[0].shape[0]
        sequence.next_prompt_logprobs = [each[num_reported] for each in known] if has_next else None
        reported = launched.prompt_logprobs.setdefault(sequence.sequence_id, PromptLogprobs(sequence, row.start))
        for parts, each in zip((reported.logprobs, reported.top_values, reported.top_ids), known, strict=False):
            parts.append(each[:num_reported])

    def _allowed_ahead(self, rows: list[Row]) -> dict[int, Future[Allowed]]:
        """What grammars allow, by sequence id, found out on another thread while the model computes: for those whose
        tokens are all known."""
        if self._guidance is None:
            return {}
        return {
            row.sequence.sequence_id: self._guidance.submit(self._allowed, row.sequence, _outputs(row.sequence))
            for row in rows
            if row.samples and row.sequence.grammar is not None and not row.sequence.num_pending
        }

    def _allowed(self, sequence: Sequence, outputs: array[int]) -> Allowed:
        """What may follow these outputs. Raises: GrammarError, GuidanceFailed."""
        assert self._guidance is not None and sequence.grammar is not None, "the engine sees to it"
        if sequence.guide is None:
            sequence.guide = self._guidance.guide(sequence.grammar, outputs)
        sequence.guide.advance(outputs[sequence.guide.num_tokens :])
        return sequence.guide.allowed()

    def _guided(
        self,
        rows: list[SamplingRow],
        launched: Launched,
        previous: Launched | None,
        ahead: Mapping[int, Future[Allowed]],
    ) -> list[SamplingRow]:
        """The rows, with what the grammars of their sequences allow."""
        return [
            row if sequence.grammar is None else self._guided_row(row, sequence, launched, previous, ahead)
            for row, (sequence, _) in zip(rows, launched.sampled, strict=True)
        ]

    def _guided_row(
        self,
        row: SamplingRow,
        sequence: Sequence,
        launched: Launched,
        previous: Launched | None,
        ahead: Mapping[int, Future[Allowed]],
    ) -> SamplingRow:
        try:
            if sequence.sequence_id in ahead:
                return replace(row, allowed=ahead[sequence.sequence_id].result())
            # What the grammar allows depends on a token that is only on the device: here the host waits for it.
            assert previous is not None and previous.ids_S is not None
            sampled = [each is sequence for each, _ in previous.sampled].index(True)
            last_id = int(previous.ids_S[sampled])
            if last_id < 0:
                return row  # it has failed, which is known when that step is collected
            outputs = _outputs(sequence)
            outputs.append(last_id)
            return replace(row, allowed=self._allowed(sequence, outputs))
        except (GrammarError, GuidanceFailed) as error:
            launched.unguided[sequence.sequence_id] = str(error)
            return row

    def _fail(self, sequence: Sequence, result: StepResult, message: str) -> None:
        """End one sequence."""
        if self.batch.fail(sequence):
            self._let_go([sequence])
        result.sequence_failures[sequence.sequence_id] = message

    def _let_go(self, sequences: Iterable[Sequence]) -> None:
        """Remember what to clear of sequences that have ended: a masked slot that holds NaN still poisons attention.

        Whether their last logits were finite may not be known yet, and their blocks may have a new owner already.
        """
        for sequence in sequences:
            self._suspect_blocks += sequence.unverified_blocks(self._limits.block_size)


def _outputs(sequence: Sequence) -> array[int]:
    """Its tokens behind the prompt, as far as the host knows them."""
    return sequence.token_ids[sequence.num_prompt_tokens :]


def _mean_states(sequences: Iterable[Sequence]) -> Tensor:
    means = []
    for sequence in sequences:
        assert sequence.states_sum is not None
        means.append(sequence.states_sum / sequence.num_prompt_tokens)
    return torch.stack(means)


def _fill_in_pending(input_ids_T: Tensor, rows: list[Row], previous: Launched | None) -> None:
    """Put ids that were sampled by the previous step, and not read by the host yet, into the inputs; in place."""
    if previous is None or previous.ids_S is None:
        return
    sources = {id(sequence): index for index, (sequence, _) in enumerate(previous.sampled)}
    pairs = [
        (place, sources[id(row.sequence)])
        for place, row in enumerate(rows)  # decode rows come first: a row's place is its token's place
        if row.is_decode and row.start >= len(row.sequence.token_ids)
    ]
    if pairs:
        places, indices = to_device(pairs, torch.int64, input_ids_T.device).T
        # A failed row has id -1; nobody will read what its next step computes, but it has to be an id.
        input_ids_T[places] = previous.ids_S[indices].clamp(min=0)


def _sampling_row(row: Row, token_index: int) -> SamplingRow:
    sequence = row.sequence
    reads_history = sequence.sampling.reads_history
    return SamplingRow(
        sequence.sampling,
        output_index=row.end - sequence.num_prompt_tokens,
        top_n_tokens=sequence.top_n_tokens,
        known_ids=sequence.token_ids if reads_history else None,
        num_prompt_tokens=sequence.num_prompt_tokens,
        pending_index=token_index if reads_history and sequence.num_pending else None,
    )


def _read_prompt_top(values_NP: Tensor, ids_NP: Tensor, *, wanted: int) -> list[TopTokens]:
    rows = zip(values_NP.tolist(), ids_NP.tolist(), strict=True)
    return [
        TopTokens([], []) if math.isnan(values_P[0]) else TopTokens(*likeliest(values_P, ids_P, wanted))
        for values_P, ids_P in rows
    ]


def _read_top(top: TopCandidates | None, host: tuple[Tensor, ...]) -> dict[int, TopTokens]:
    """Row of the step -> its top tokens."""
    if top is None:
        return {}
    values, ids, counts = (tensor.tolist() for tensor in host)
    return {
        row: TopTokens(
            *read_top_tokens(top.logprobs_RV[index], values[index], ids[index], top.wanted[index], counts[index])
        )
        for index, row in enumerate(top.rows)
    }
