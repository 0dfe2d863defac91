"""Logits -> logits, in TGI's order: repetition penalty, frequency penalty, temperature, top-k, top-p, typical-p.

Every function takes the rows that want it, several at once, and works in float32; sums of probabilities are float64,
so that a row's result does not depend on the rows beside it. A row keeps at least one token, and ties are broken
towards the lower id wherever an order is needed.

Shape legend: P penalised rows, N tokens in their histories, F filtered rows, V vocabulary, K candidates of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_HUGE = 3e38
"""Processed logits stay finite: parameters of any size must not turn a sound row into not-a-number."""
_BOUND_MARGIN = 1e-3
"""Slack, in logits, of a bound that only saves work: rounding must never let it decide."""


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
    vocab_size = scores_FV.shape[-1]
    top_k_F = torch.where(top_k_F > 0, top_k_F.clamp(max=vocab_size), vocab_size)
    bounds_F, log_totals_F = _bounds(scores_FV, top_k_F, top_p_F)
    values_FK, ids_FK = _candidates(scores_FV, bounds_F)

    num_candidates = values_FK.shape[-1]
    kth_F1 = values_FK.gather(-1, (top_k_F.clamp(max=num_candidates) - 1).unsqueeze(-1))
    values_FK = values_FK.masked_fill(values_FK < kth_F1, -torch.inf)
    values_FK = _keep_top_p(values_FK, top_p_F, log_totals_F)
    if bool((typical_p_F < 1).any()):
        values_FK = _keep_typical(values_FK, typical_p_F)

    # One column more than the vocabulary: padding of the candidates goes there, and is cut off.
    kept = scores_FV.new_full((scores_FV.shape[0], vocab_size + 1), -torch.inf)
    return kept.scatter_(-1, ids_FK, values_FK)[:, :vocab_size]


def _bounds(scores_FV: Tensor, top_k_F: Tensor, top_p_F: Tensor) -> tuple[Tensor, Tensor]:
    """A score below which no token of the row can pass top-k and top-p, and the row's log-sum-exp before top-p.

    The log-sum-exp is NaN for rows with top-k: it is that of the k tokens then, known only later.
    """
    vocab_size = scores_FV.shape[-1]
    has_top_k_F = top_k_F < vocab_size
    log_totals_F = torch.logsumexp(scores_FV, -1).double()
    # All tokens with a probability of at most (1 - p) / V together have at most 1 - p, so the rest has p or more.
    bounds_F = torch.log((1 - top_p_F).clamp(min=0) / vocab_size) + log_totals_F - _BOUND_MARGIN
    if bool(has_top_k_F.any()):
        largest = int(torch.where(has_top_k_F, top_k_F, 1).max())
        kth_F = scores_FV.topk(largest).values.gather(-1, (top_k_F.clamp(max=largest) - 1).unsqueeze(-1)).squeeze(-1)
        bounds_F = torch.where(has_top_k_F, kth_F.double(), bounds_F)
        log_totals_F = torch.where(has_top_k_F, torch.nan, log_totals_F)
    return bounds_F, log_totals_F


def _candidates(scores_FV: Tensor, bounds_F: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and ids of the tokens at or above each row's bound, best first; [F, K] padded with (-inf, V).

    Sorting a whole vocabulary costs more than all the rest of sampling, and nearly all of it lies below the bound.
    """
    num_rows, vocab_size = scores_FV.shape
    rows_N, ids_N = (scores_FV >= bounds_F.unsqueeze(-1)).nonzero(as_tuple=True)
    counts_F = torch.bincount(rows_N, minlength=num_rows)
    starts_F = counts_F.cumsum(0) - counts_F
    places_N = torch.arange(rows_N.shape[0], device=rows_N.device) - starts_F[rows_N]
    num_candidates = max(1, int(counts_F.max()))
    values_FK = scores_FV.new_full((num_rows, num_candidates), -torch.inf)
    ids_FK = torch.full_like(values_FK, vocab_size, dtype=torch.int64)
    values_FK[rows_N, places_N] = scores_FV[rows_N, ids_N]
    ids_FK[rows_N, places_N] = ids_N
    # Ids ascend within a row, so a stable sort leaves ties in the order of their ids.
    values_FK, order_FK = torch.sort(values_FK, dim=-1, descending=True, stable=True)
    return values_FK, ids_FK.gather(-1, order_FK)


def _keep_top_p(values_FK: Tensor, top_p_F: Tensor, log_totals_F: Tensor) -> Tensor:
    """Keep the smallest set of most likely tokens whose probabilities reach p."""
    values = values_FK.double()
    log_totals_F = torch.where(log_totals_F.isnan(), torch.logsumexp(values, -1), log_totals_F)
    probabilities = torch.exp(values - log_totals_F.unsqueeze(-1))
    before = torch.cumsum(probabilities, -1).roll(1, -1)
    before[:, 0] = 0.0
    # p = 1 is off: rounding must not cut the tail.
    limit = torch.where(top_p_F < 1, top_p_F, torch.inf).unsqueeze(-1)
    return values_FK.masked_fill(before >= limit, -torch.inf)


def _keep_typical(values_FK: Tensor, typical_p_F: Tensor) -> Tensor:
    """Keep the tokens whose surprise is nearest to the row's entropy, until their probabilities reach p.

    Source: Locally Typical Sampling, Meister et al. 2022.
    """
    logprobs = torch.log_softmax(values_FK.double(), -1)
    probabilities = logprobs.exp()
    entropy = -torch.where(probabilities > 0, probabilities * logprobs, 0.0).sum(-1, keepdim=True)
    distance = (-logprobs - entropy).abs()  # +inf where the token is out already
    distance, order = torch.sort(distance, dim=-1, stable=True)
    reached = torch.cumsum(probabilities.gather(-1, order), -1) < typical_p_F.unsqueeze(-1)
    last = reached.sum(-1, keepdim=True).clamp(max=distance.shape[-1] - 1)
    out_in_order = (distance > distance.gather(-1, last)) & (typical_p_F < 1).unsqueeze(-1)
    out = torch.zeros_like(out_in_order).scatter_(-1, order, out_in_order)
    return values_FK.masked_fill(out, -torch.inf)
