"""Logits -> token ids and logprobs, for the rows of a step that produce a token.

A batch pays only for what its rows ask: all-greedy rows without penalties cost one maximum and one sum of exponentials,
taken from the logits as the model computed them. Nothing here waits for a GPU, but a watermark: how many operations
there are, and their sizes, follow from what rows ask alone.

Shape legend: S sampled rows, V vocabulary, N largest number of top tokens asked for, T tokens of the step.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from text_generation_server.cpu_kernels.row_peaks import row_peaks, supports
from text_generation_server.generation.guidance import Allowed
from text_generation_server.generation.logits_processors import (
    History,
    add_biases,
    divide_by_temperature,
    keep_likely,
    keep_likely_in_place,
    penalise_frequency,
    penalise_output,
    penalise_repetition,
)
from text_generation_server.generation.parameters import SamplingParameters
from text_generation_server.generation.uniform import uniform
from text_generation_server.generation.watermark import DEFAULT_WATERMARK, Watermark, green_ids
from text_generation_server.transfer import to_device

_BLOCK = 256
"""Tokens that the inverse CDF sums up at once: two short searches instead of a running sum over the vocabulary."""
FILTERED_ROWS = 32
"""Rows that the filters look at together: they hold two dozen copies of each, and more rows are no faster."""
_SPARE_TOP_TOKENS = 8
"""Places for ties at the last top token; more ties than that are read in a second, slower step."""


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """One row of logits and what is wanted of it."""

    parameters: SamplingParameters
    output_index: int
    """Index of the token among the generated ones, from 0."""
    top_n_tokens: int = 0
    known_ids: array[int] | None = None
    """Prompt and output where they have a say, else None. Without its last id when that is only on the device."""
    num_prompt_tokens: int = 0
    """Leading ``known_ids`` that were not generated."""
    allowed: Allowed | None = None
    """bool [V]; what a grammar lets through. None: everything."""
    pending_index: int | None = None
    """Where in the step's input ids the last token of the history is, when ``known_ids`` lacks it."""

    @property
    def is_processed(self) -> bool:
        """Whether more is wanted of its logits than the largest and their sum of exponentials."""
        return self.parameters.do_sample or self.top_n_tokens > 0 or not self.is_neutral

    @property
    def is_neutral(self) -> bool:
        """Whether the logits reach the choice as the model gave them."""
        return self.allowed is None and self.parameters.is_neutral


@dataclass(slots=True)
class TopCandidates:
    """The top tokens of the rows that asked for some, still on the device."""

    rows: list[int]
    """Indices into S."""
    wanted: list[int]
    logprobs_RV: Tensor
    values_RN: Tensor
    ids_RN: Tensor
    counts_R: Tensor
    """How many tokens reach the row's last wanted logprob; beyond N the whole row has to be read."""


@dataclass(slots=True)
class Sampled:
    ids_S: Tensor
    """int64; -1 where the logits were not finite."""
    logprobs_S: Tensor
    """float32; log-softmax of the processed logits."""
    top: TopCandidates | None


def sample(
    logits_SV: Tensor,
    rows: list[SamplingRow],
    input_ids_T: Tensor | None = None,
    *,
    kernels: bool = True,
    watermark: Watermark = DEFAULT_WATERMARK,
) -> Sampled:
    """Choose a token for each row. ``logits_SV``: of any floating dtype; float32 ones are overwritten.

    A row's token and logprob depend on its logits, parameters and key alone, never on the other rows. ``kernels``:
    whether those for the processor may be used.
    """
    kernels = kernels and _has_kernel(logits_SV)
    if any(row.is_processed for row in rows) or not kernels:
        logits_SV = logits_SV.float()
    finite_S = _process(logits_SV, rows, input_ids_T, watermark)
    weights_SV: Tensor | None = None
    if kernels:
        best_S, ids_S, totals_S = row_peaks(logits_SV)
    else:
        best_S, ids_S = logits_SV.max(-1)  # the first of equal values: the lowest id
        weights_SV = _weights(logits_SV, best_S)
        totals_S = _totals(weights_SV)
    drawn = [index for index, row in enumerate(rows) if row.parameters.do_sample]
    if drawn:
        uniforms = to_device(_uniforms([rows[index] for index in drawn]), torch.float64, logits_SV.device)
        which = slice(None) if len(drawn) == len(rows) else to_device(drawn, torch.int64, logits_SV.device)
        weights_DV = _weights(logits_SV[which], best_S[which]) if weights_SV is None else weights_SV[which]
        ids_S[which] = inverse_cdf(weights_DV, uniforms)
    log_totals_S = totals_S.log()
    # NaN and infinities end up here whatever the row asked for.
    finite_S = finite_S & torch.isfinite(best_S) & torch.isfinite(log_totals_S)
    chosen_S = logits_SV.gather(-1, ids_S.unsqueeze(-1)).squeeze(-1).float()
    logprobs_S = ((chosen_S - best_S).double() - log_totals_S).float()
    top = _top_candidates(logits_SV, best_S, log_totals_S, rows)
    return Sampled(torch.where(finite_S, ids_S, -1), logprobs_S, top)


def prepare(vocab_size: int, dtype: torch.dtype) -> None:
    """Compile the kernels of `sample` for logits of that dtype: the first request would wait for them."""
    for each in {dtype, torch.float32}:
        if supports(vocab_size, each):
            row_peaks(torch.zeros((1, vocab_size), dtype=each))


def inverse_cdf(weights_SV: Tensor, uniforms_S: Tensor) -> Tensor:
    """The first id at which the running sum of the weights exceeds ``uniform * total``; int64 [S].

    ``weights_SV``: float32, not negative, at least one of a row positive, not necessarily normalised. ``uniforms_S``:
    float64 in [0, 1). Sums are float64, and a token of weight 0 is never chosen.
    """
    num_rows, vocab_size = weights_SV.shape
    num_blocks = -(-vocab_size // _BLOCK)
    if vocab_size % _BLOCK:
        weights_SV = torch.nn.functional.pad(weights_SV, (0, num_blocks * _BLOCK - vocab_size))
    blocks_SBC = weights_SV.view(num_rows, num_blocks, _BLOCK)
    ends_SB = torch.cumsum(blocks_SBC.sum(-1, dtype=torch.float64), -1)
    targets_S1 = (uniforms_S * ends_SB[:, -1]).unsqueeze(-1)
    block_S1 = _first_above(ends_SB, targets_S1)
    begin_S1 = torch.where(block_S1 > 0, ends_SB.gather(-1, (block_S1 - 1).clamp(min=0)), 0.0)
    inside_SC = blocks_SBC.gather(1, block_S1.unsqueeze(-1).expand(-1, -1, _BLOCK)).squeeze(1).double()
    place_S1 = _first_above(begin_S1 + torch.cumsum(inside_SC, -1), targets_S1)
    return (block_S1 * _BLOCK + place_S1).squeeze(-1)


def _has_kernel(logits_SV: Tensor) -> bool:
    return logits_SV.device.type == "cpu" and supports(logits_SV.shape[-1], logits_SV.dtype)


def _totals(weights_SV: Tensor) -> Tensor:
    """Float64 sum of each row, from float32 sums of its blocks: to convert every weight takes five times as long."""
    num_rows, vocab_size = weights_SV.shape
    whole = vocab_size // _BLOCK * _BLOCK
    blocks_SBC = weights_SV[:, :whole].reshape(num_rows, whole // _BLOCK, _BLOCK)
    return blocks_SBC.sum(-1).sum(-1, dtype=torch.float64) + weights_SV[:, whole:].sum(-1, dtype=torch.float64)


def _weights(logits_SV: Tensor, best_S: Tensor) -> Tensor:
    """Probabilities, not normalised: 1 for the best."""
    return torch.sub(logits_SV, best_S.unsqueeze(-1)).exp_()


def _first_above(ends_SX: Tensor, targets_S1: Tensor) -> Tensor:
    """Index of the first running sum above the target, [S, 1].

    Where rounding leaves none, it is the first one that reaches the total: the last entry with a weight.
    """
    not_above = (ends_SX <= targets_S1).sum(-1, keepdim=True)
    below_total = (ends_SX < ends_SX[:, -1:]).sum(-1, keepdim=True)
    return torch.minimum(not_above, below_total)


def _process(logits_SV: Tensor, rows: list[SamplingRow], input_ids_T: Tensor | None, watermark: Watermark) -> Tensor:
    """Run the logits processors on the rows that want them, in place; returns which rows were finite, bool [S]."""
    device = logits_SV.device
    if all(row.is_neutral for row in rows):
        return torch.ones(len(rows), dtype=torch.bool, device=device)
    # Filters would hide a NaN, so look before, and let a neutral row take the place of a broken one.
    finite_S = torch.isfinite(logits_SV.amax(-1))
    if device.type != "cpu" or not bool(finite_S.all()):  # a look is free on a CPU and a stall elsewhere
        logits_SV.masked_fill_(~finite_S.unsqueeze(-1), 0.0)
    _mark(logits_SV, rows, input_ids_T, watermark)
    _penalise(logits_SV, rows, input_ids_T)
    _add_biases(logits_SV, rows)
    _rule_out(logits_SV, rows)
    if any(row.parameters.temperature != 1.0 for row in rows):
        temperatures = [row.parameters.temperature for row in rows]
        divide_by_temperature(logits_SV, to_device(temperatures, torch.float32, device))
    filtered = [index for index, row in enumerate(rows) if row.parameters.has_filter]
    for some in (filtered[first : first + FILTERED_ROWS] for first in range(0, len(filtered), FILTERED_ROWS)):
        wanted = [rows[index].parameters for index in some]
        some_F = to_device(some, torch.int64, device)
        top_k_F = to_device([parameters.top_k for parameters in wanted], torch.int64, device)
        top_p_F = to_device([parameters.top_p for parameters in wanted], torch.float64, device)
        typical_p_F = to_device([parameters.typical_p for parameters in wanted], torch.float64, device)
        if device.type == "cpu":
            logits_SV[some_F] = keep_likely(logits_SV[some_F], top_k_F, top_p_F, typical_p_F)
            continue
        has_typical_p = any(parameters.typical_p < 1 for parameters in wanted)
        logits_SV[some_F] = keep_likely_in_place(
            logits_SV[some_F], top_k_F, top_p_F, typical_p_F if has_typical_p else None
        )
    return finite_S


def _mark(logits_SV: Tensor, rows: list[SamplingRow], input_ids_T: Tensor | None, watermark: Watermark) -> None:
    """Prefer the green tokens of the rows that want a watermark."""
    for index, row in enumerate(rows):
        if not row.parameters.watermark:
            continue
        assert row.known_ids is not None, "the token before decides"
        if row.pending_index is None:
            previous_id = row.known_ids[-1]
        else:  # the host waits for it
            assert input_ids_T is not None
            previous_id = int(input_ids_T[row.pending_index])
        green_G = green_ids(previous_id, logits_SV.shape[-1], watermark.gamma).to(logits_SV.device)
        logits_SV[index, green_G] += watermark.delta


def _penalise(logits_SV: Tensor, rows: list[SamplingRow], input_ids_T: Tensor | None) -> None:
    penalised = [index for index, row in enumerate(rows) if row.parameters.has_penalty]
    if not penalised:
        return
    device = logits_SV.device
    history = _history(rows, penalised, input_ids_T, device, outputs_only=False)
    repetition = [row.parameters.repetition_penalty for row in rows]
    if any(penalty != 1.0 for penalty in repetition):
        penalise_repetition(logits_SV, history, to_device(repetition, torch.float32, device))
    frequency = [row.parameters.frequency_penalty for row in rows]
    if any(penalty != 0.0 for penalty in frequency):
        penalise_frequency(logits_SV, history, to_device(frequency, torch.float32, device))
    on_output = [index for index in penalised if rows[index].parameters.has_output_penalty]
    if on_output:
        outputs = _history(rows, on_output, input_ids_T, device, outputs_only=True)
        presence = to_device([row.parameters.presence_penalty for row in rows], torch.float32, device)
        count = to_device([row.parameters.count_penalty for row in rows], torch.float32, device)
        penalise_output(logits_SV, outputs, presence, count)


def _add_biases(logits_SV: Tensor, rows: list[SamplingRow]) -> None:
    biased = [
        (index, token_id, bias)
        for index, row in enumerate(rows)
        for token_id, bias in zip(row.parameters.bias_ids, row.parameters.biases, strict=True)
    ]
    if biased:
        owners, ids, biases = zip(*biased, strict=True)
        device = logits_SV.device
        add_biases(
            logits_SV,
            to_device(owners, torch.int64, device),
            to_device(ids, torch.int64, device),
            to_device(biases, torch.float32, device),
        )


def _rule_out(logits_SV: Tensor, rows: list[SamplingRow]) -> None:
    """Leave guided rows what their grammars allow, ahead of the filters: these choose among what is allowed."""
    for index, row in enumerate(rows):
        if row.allowed is not None:
            forbidden_V = to_device(~row.allowed, torch.bool, logits_SV.device)
            logits_SV[index].masked_fill_(forbidden_V, -torch.inf)


def _history(
    rows: list[SamplingRow],
    which: list[int],
    input_ids_T: Tensor | None,
    device: torch.device,
    *,
    outputs_only: bool,
) -> History:
    """The histories of some ``rows``, which all have one, by their places among all: only touched logits are read and
    written then. ``outputs_only``: without the prompts."""
    wanted = [rows[index] for index in which]
    known = [np.array(row.known_ids, dtype=np.int64)[row.num_prompt_tokens * outputs_only :] for row in wanted]
    known_lengths = np.array([ids.shape[0] for ids in known])
    pending = [
        (index, row.pending_index) for index, row in zip(which, wanted, strict=True) if row.pending_index is not None
    ]
    owners_N = to_device(np.repeat(np.array(which), known_lengths), torch.int64, device)
    ids_N = to_device(np.concatenate(known), torch.int64, device)
    lengths_S = np.ones(len(rows), dtype=np.float32)
    lengths_S[which] = known_lengths
    if pending:
        assert input_ids_T is not None
        owners, places = zip(*pending, strict=True)
        owners_N = torch.cat([owners_N, to_device(owners, torch.int64, device)])
        ids_N = torch.cat([ids_N, input_ids_T[to_device(places, torch.int64, device)]])
        lengths_S[list(owners)] += 1
    return History(owners_N, ids_N, to_device(lengths_S, torch.float32, device))


def _uniforms(rows: list[SamplingRow]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    keys = [(row.parameters.seed, row.parameters.choice_index, row.output_index) for row in rows]
    seeds, choices, indices = np.array(keys, dtype=np.uint64).T
    return uniform(seeds, choices, indices)


def _top_candidates(
    scores_SV: Tensor, best_S: Tensor, log_totals_S: Tensor, rows: list[SamplingRow]
) -> TopCandidates | None:
    asking = [index for index, row in enumerate(rows) if row.top_n_tokens > 0]
    if not asking:
        return None
    wanted = [rows[index].top_n_tokens for index in asking]
    asking_R = to_device(asking, torch.int64, scores_SV.device)
    # In the same two steps as the chosen token's, so that a token has one logprob wherever it is reported.
    below_best_RV = scores_SV[asking_R] - best_S[asking_R].unsqueeze(-1)
    logprobs_RV = (below_best_RV.double() - log_totals_S[asking_R].unsqueeze(-1)).float()
    values_RN, ids_RN = logprobs_RV.topk(num_likely(max(wanted), logprobs_RV.shape[-1]))
    last_R1 = values_RN.gather(-1, to_device(wanted, torch.int64, scores_SV.device).unsqueeze(-1) - 1)
    counts_R = ((logprobs_RV >= last_R1) & (logprobs_RV > -torch.inf)).sum(-1)
    return TopCandidates(asking, wanted, logprobs_RV, values_RN, ids_RN, counts_R)


def num_likely(wanted: int, vocab_size: int) -> int:
    """How many of a row's likeliest tokens to look at for those that are wanted: some tie with the last of these."""
    return min(wanted + _SPARE_TOP_TOKENS, vocab_size)


def likeliest(values_P: list[float], ids_P: list[int], count: int) -> tuple[list[int], list[float]]:
    """Ids and logprobs of so many: descending, lower ids first among ties."""
    pairs = sorted(zip(ids_P, values_P, strict=True), key=lambda pair: (-pair[1], pair[0]))[:count]
    return [token_id for token_id, _ in pairs], [value for _, value in pairs]


def read_top_tokens(
    logprobs_V: Tensor, values_N: list[float], ids_N: list[int], wanted: int, count: int
) -> tuple[list[int], list[float]]:
    """Ids and logprobs of one row's top tokens: descending, lower ids first among ties, all ties at the last place.

    ``count`` is how many tokens those are; when the prefetched ones do not cover them, the row itself is read.
    """
    if count > len(ids_N):
        last = values_N[wanted - 1]
        ids = (logprobs_V >= last).nonzero().squeeze(-1)
        ids_N, values_N = ids.tolist(), logprobs_V[ids].tolist()
    return likeliest(values_N, ids_N, count)
