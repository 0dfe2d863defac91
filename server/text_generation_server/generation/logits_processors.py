"""Logits -> logits, in TGI's order: watermark, repetition penalty, frequency penalty, OpenAI's penalties and biases,
temperature, top-k, top-p, typical-p.

Every function takes the rows that want it, several at once, and works in float32; sums of probabilities are float64,
so that a row's result does not depend on the rows beside it. A row keeps at least one token, and ties are broken
towards the lower id wherever an order is needed.

Shape legend: P penalised rows, N tokens in their histories; F filtered rows, N candidates of all of them, B bins,
K (in rows) and M (in all) members of the bin that is sorted; V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_HUGE = 3e38
"""Processed logits stay finite: parameters of any size must not turn a sound row into not-a-number."""
_BOUND_MARGIN = 1e-3
"""Slack, in logits, of a bound that only saves work: rounding must never let it decide."""

_ROWS_AT_ONCE = 32
"""Where all tokens of a row are sorted: their probabilities, and sums of these, are float64."""
_BINS = 1024
"""Of scores, between a row's best token and the lowest that can matter."""


@dataclass(frozen=True, slots=True)
class History:
    """Prompt and output tokens of penalised rows, all rows in one ragged list."""

    rows_N: Tensor
    """int64; row of each token, an index into P."""
    ids_N: Tensor
    """int64."""
    lengths_P: Tensor
    """float32; tokens of each row."""


def penalise_repetition(logits_PV: Tensor, history: History, penalties_P: Tensor) -> None:
    """Divide positive logits of tokens seen so far by the row's penalty and multiply negative ones; in place."""
    scores_N = logits_PV[history.rows_N, history.ids_N]
    penalties_N = penalties_P[history.rows_N]
    scores_N = torch.where(scores_N < 0, scores_N * penalties_N, scores_N / penalties_N)
    # A token that occurs several times is written several times with the same value.
    logits_PV[history.rows_N, history.ids_N] = scores_N.clamp(-_HUGE, _HUGE)


def penalise_frequency(logits_PV: Tensor, history: History, penalties_P: Tensor) -> None:
    """Subtract penalty * count(token) / length of prompt and output; in place. Padding is never counted."""
    counts_PV = torch.zeros_like(logits_PV)
    ones_N = torch.ones_like(history.ids_N, dtype=counts_PV.dtype)
    counts_PV.index_put_((history.rows_N, history.ids_N), ones_N, accumulate=True)
    counts_N = counts_PV[history.rows_N, history.ids_N]
    share_N = counts_N / history.lengths_P[history.rows_N]
    scores_N = logits_PV[history.rows_N, history.ids_N] - penalties_P[history.rows_N] * share_N
    logits_PV[history.rows_N, history.ids_N] = scores_N.clamp(-_HUGE, _HUGE)


def penalise_output(logits_PV: Tensor, outputs: History, presence_P: Tensor, count_P: Tensor) -> None:
    """Subtract presence once, and count for each time, from the tokens that a row has generated; in place.

    Source: OpenAI's API reference, `presence_penalty` and `frequency_penalty`.
    """
    counts_PV = torch.zeros_like(logits_PV)
    ones_N = torch.ones_like(outputs.ids_N, dtype=counts_PV.dtype)
    counts_PV.index_put_((outputs.rows_N, outputs.ids_N), ones_N, accumulate=True)
    counts_N = counts_PV[outputs.rows_N, outputs.ids_N]
    scores_N = logits_PV[outputs.rows_N, outputs.ids_N]
    scores_N = scores_N - presence_P[outputs.rows_N] - count_P[outputs.rows_N] * counts_N
    logits_PV[outputs.rows_N, outputs.ids_N] = scores_N.clamp(-_HUGE, _HUGE)


def add_biases(logits_SV: Tensor, rows_N: Tensor, ids_N: Tensor, biases_N: Tensor) -> None:
    """Add to single logits, each named once; in place. What the model rules out (-inf) stays out."""
    logits_SV[rows_N, ids_N] = (logits_SV[rows_N, ids_N] + biases_N).clamp(max=_HUGE)


def divide_by_temperature(logits_SV: Tensor, temperatures_S: Tensor) -> None:
    """Divide by the row's temperature after moving its maximum to 0, which keeps tiny temperatures finite; in place.

    Softmax does not see the shift. A temperature below 1e-10 counts as 1e-10: the argmax takes all either way.
    """
    logits_SV -= logits_SV.amax(-1, keepdim=True)
    logits_SV /= temperatures_S.clamp(min=1e-10).unsqueeze(-1)


def keep_likely(scores_FV: Tensor, top_k_F: Tensor, top_p_F: Tensor, typical_p_F: Tensor) -> Tensor:
    """Apply top-k, then top-p, then typical-p; returns scores [F, V] with -inf for every token left out.

    ``top_k_F`` int64, 0 is off; ``top_p_F`` and ``typical_p_F`` float64, 1 is off. Top-k keeps all tokens that tie with
    the k-th, and typical-p all that tie with its last, as TGI does; top-p keeps the smallest set.
    """
    num_rows, vocab_size = scores_FV.shape
    bounds_F = _bounds(scores_FV, top_k_F, top_p_F)
    rows_N, ids_N = (scores_FV >= bounds_F.unsqueeze(-1)).nonzero(as_tuple=True)
    values_N = scores_FV[rows_N, ids_N]
    if bool((top_p_F < 1).any()):
        # With top-k the probabilities are those among the k tokens, else those of the whole row.
        has_top_k_F = (top_k_F > 0) & (top_k_F < vocab_size)
        log_totals_F = torch.where(
            has_top_k_F, _log_totals(rows_N, values_N, num_rows), torch.logsumexp(scores_FV, -1).double()
        )
        keep_N = _within_top_p(rows_N, values_N, bounds_F, log_totals_F, top_p_F)
        rows_N, ids_N, values_N = rows_N[keep_N], ids_N[keep_N], values_N[keep_N]
    kept_FV = torch.full_like(scores_FV, -torch.inf)
    kept_FV[rows_N, ids_N] = values_N
    typical_T = (typical_p_F < 1).nonzero().squeeze(-1)
    if typical_T.numel():
        kept_FV[typical_T] = _keep_typical(kept_FV[typical_T], typical_p_F[typical_T])
    return kept_FV


def keep_likely_in_place(scores_FV: Tensor, top_k_F: Tensor, top_p_F: Tensor, typical_p_F: Tensor | None) -> Tensor:
    """The same as `keep_likely`, in ``scores_FV``, without a look at the numbers: on a GPU each look is a stall.

    All tokens are sorted, which a processor would take long for. ``typical_p_F``: None if it is off in all rows.
    """
    for first in range(0, scores_FV.shape[0], _ROWS_AT_ONCE):
        rows = slice(first, first + _ROWS_AT_ONCE)
        typical_p = None if typical_p_F is None else typical_p_F[rows]
        scores_FV[rows] = _keep_sorted(scores_FV[rows], top_k_F[rows], top_p_F[rows], typical_p)
    return scores_FV


def _keep_sorted(scores_FV: Tensor, top_k_F: Tensor, top_p_F: Tensor, typical_p_F: Tensor | None) -> Tensor:
    vocab_size = scores_FV.shape[-1]
    # Ids ascend within equal scores.
    values_FV, order_FV = torch.sort(scores_FV, dim=-1, descending=True, stable=True)
    has_top_k_F1 = ((top_k_F > 0) & (top_k_F < vocab_size)).unsqueeze(-1)
    kth_F1 = values_FV.gather(-1, (top_k_F.clamp(1, vocab_size) - 1).unsqueeze(-1))
    values_FV = values_FV.masked_fill(has_top_k_F1 & (values_FV < kth_F1), -torch.inf)
    probabilities_FV = torch.softmax(values_FV.double(), -1)
    before_FV = torch.cumsum(probabilities_FV, -1).roll(1, -1)
    before_FV[:, 0] = 0.0
    # p = 1 is off, and rounding must not cut its tail.
    limit_F1 = torch.where(top_p_F < 1, top_p_F, torch.inf).unsqueeze(-1)
    values_FV = values_FV.masked_fill(before_FV >= limit_F1, -torch.inf)
    kept_FV = torch.empty_like(scores_FV).scatter_(-1, order_FV, values_FV)
    if typical_p_F is None:
        return kept_FV
    return torch.where((typical_p_F < 1).unsqueeze(-1), _keep_typical(kept_FV, typical_p_F), kept_FV)


def _bounds(scores_FV: Tensor, top_k_F: Tensor, top_p_F: Tensor) -> Tensor:
    """A score that every token which passes top-k and top-p reaches; float64 [F]. With top-k it is the k-th one's."""
    vocab_size = scores_FV.shape[-1]
    bounds_F = torch.full_like(top_p_F, -torch.inf)
    if bool((top_p_F < 1).any()):
        # All tokens with a probability of at most (1 - p) / V together have at most 1 - p, so the rest has p or more.
        log_totals_F = torch.logsumexp(scores_FV, -1).double()
        bounds_F = torch.log((1 - top_p_F).clamp(min=0) / vocab_size) + log_totals_F - _BOUND_MARGIN
    has_top_k_F = (top_k_F > 0) & (top_k_F < vocab_size)
    if bool(has_top_k_F.any()):
        largest = int(torch.where(has_top_k_F, top_k_F, 1).max())
        kth_F = scores_FV.topk(largest).values.gather(-1, (top_k_F.clamp(1, largest) - 1).unsqueeze(-1)).squeeze(-1)
        bounds_F = torch.where(has_top_k_F, kth_F.double(), bounds_F)
    return bounds_F


def _log_totals(rows_N: Tensor, values_N: Tensor, num_rows: int) -> Tensor:
    """Log-sum-exp of each row's candidates; float64 [F]."""
    best_F = values_N.new_full((num_rows,), -torch.inf).scatter_reduce(0, rows_N, values_N, "amax")
    weights_N = torch.exp((values_N - best_F[rows_N]).double())
    return torch.bincount(rows_N, weights_N, minlength=num_rows).log() + best_F.double()


def _within_top_p(rows_N: Tensor, values_N: Tensor, bounds_F: Tensor, log_totals_F: Tensor, top_p_F: Tensor) -> Tensor:
    """Which candidates are in the smallest set of most likely tokens whose probabilities reach p; bool [N].

    Candidates are in the order of rows and ids. Sorting them all would cost more than all the rest of sampling, so
    they are counted into bins by score, and only the bin in which the sum passes p is sorted.
    """
    num_rows = top_p_F.shape[0]
    values_N = values_N.double()
    probabilities_N = torch.exp(values_N - log_totals_F[rows_N])
    best_F = values_N.new_full((num_rows,), -torch.inf).scatter_reduce(0, rows_N, values_N, "amax")
    lowest_F = torch.where(bounds_F.isfinite(), bounds_F, best_F - 1)
    scale_F = _BINS / (best_F - lowest_F).clamp(min=1e-9)
    bins_N = ((best_F[rows_N] - values_N) * scale_F[rows_N]).long().clamp(max=_BINS - 1)
    mass_FB = torch.bincount(rows_N * _BINS + bins_N, probabilities_N, minlength=num_rows * _BINS).view(num_rows, _BINS)
    ends_FB = torch.cumsum(mass_FB, -1)
    # p = 1 is off, and rounding must not cut its tail.
    limit_F = torch.where(top_p_F < 1, top_p_F, torch.inf)
    crossing_F = (ends_FB < limit_F.unsqueeze(-1)).sum(-1)
    keep_N = bins_N < crossing_F[rows_N]
    begin_F = torch.where(crossing_F > 0, ends_FB.gather(-1, (crossing_F - 1).clamp(min=0).unsqueeze(-1))[:, 0], 0.0)

    members_M = (bins_N == crossing_F[rows_N]).nonzero().squeeze(-1)
    values_FK, places_M = _pad(rows_N[members_M], values_N[members_M], num_rows)
    # Ids ascend within a row, so a stable sort leaves ties in the order of their ids.
    values_FK, order_FK = torch.sort(values_FK, dim=-1, descending=True, stable=True)
    ends_FK = torch.cumsum(torch.exp(values_FK - log_totals_F.unsqueeze(-1)), -1)
    before_FK = ends_FK.roll(1, -1)
    before_FK[:, 0] = 0.0
    keep_in_order_FK = begin_F.unsqueeze(-1) + before_FK < limit_F.unsqueeze(-1)
    keep_FK = torch.zeros_like(keep_in_order_FK).scatter_(-1, order_FK, keep_in_order_FK)
    keep_N[members_M] = keep_FK[rows_N[members_M], places_M]
    return keep_N


def _pad(rows_M: Tensor, values_M: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Ragged rows as a rectangle [F, K] padded with -inf, and each value's column in it; [M]."""
    counts_F = torch.bincount(rows_M, minlength=num_rows)
    starts_F = counts_F.cumsum(0) - counts_F
    places_M = torch.arange(rows_M.shape[0], device=rows_M.device) - starts_F[rows_M]
    values_FK = values_M.new_full((num_rows, max(1, int(counts_F.max()))), -torch.inf)
    values_FK[rows_M, places_M] = values_M
    return values_FK, places_M


def _keep_typical(scores_FV: Tensor, typical_p_F: Tensor) -> Tensor:
    """Keep the tokens whose surprise is nearest to the row's entropy, until their probabilities reach p.

    Source: Locally Typical Sampling, Meister et al. 2022.
    """
    logprobs = torch.log_softmax(scores_FV.double(), -1)
    probabilities = logprobs.exp()
    entropy = -torch.where(probabilities > 0, probabilities * logprobs, 0.0).sum(-1, keepdim=True)
    distance = (-logprobs - entropy).abs()  # +inf where the token is out already
    in_order, order = torch.sort(distance, dim=-1, stable=True)
    before_end = torch.cumsum(probabilities.gather(-1, order), -1) < typical_p_F.unsqueeze(-1)
    last = before_end.sum(-1, keepdim=True).clamp(max=distance.shape[-1] - 1)
    return scores_FV.masked_fill(distance > in_order.gather(-1, last), -torch.inf)
