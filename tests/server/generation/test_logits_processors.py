"""Every processor against a slow and obvious one, a row at a time, in plain Python."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from text_generation_server.generation.logits_processors import (
    History,
    divide_by_temperature,
    keep_likely,
    keep_likely_in_place,
    penalise_frequency,
    penalise_repetition,
)
from torch import Tensor

Row = list[float]
# Few values, so that ties are the rule; and some that nothing shares.
LOGIT = st.sampled_from([-4.0, -1.0, 0.0, 0.5, 0.5, 2.0, 3.0]) | st.floats(-30, 30, width=32)
ROWS = st.integers(2, 24).flatmap(
    lambda vocab: st.lists(st.lists(LOGIT, min_size=vocab, max_size=vocab), min_size=1, max_size=4)
)


def softmax(row: Row) -> Row:
    best = max(row)
    weights = [math.exp(value - best) for value in row]
    return [weight / math.fsum(weights) for weight in weights]


def top_k_reference(row: Row, k: int) -> Row:
    if k == 0 or k >= len(row):
        return row
    kth = sorted(row, reverse=True)[k - 1]
    return [value if value >= kth else -math.inf for value in row]


def top_p_reference(row: Row, p: float) -> set[int]:
    """The ids kept; only where no running sum is so near to p that rounding may decide."""
    probabilities = softmax(row)
    order = sorted((i for i in range(len(row)) if row[i] > -math.inf), key=lambda i: (-row[i], i))
    kept: set[int] = set()
    before = 0.0
    for token in order:
        if p < 1 and abs(before - p) < 1e-7:
            raise Undecided
        if before >= p and p < 1:
            break
        kept.add(token)
        before += probabilities[token]
    return kept


def typical_reference(row: Row, p: float) -> set[int]:
    probabilities = softmax(row)
    alive = [i for i in range(len(row)) if row[i] > -math.inf and probabilities[i] > 0]
    entropy = -math.fsum(probabilities[i] * math.log(probabilities[i]) for i in alive)
    distance = {i: abs(-math.log(probabilities[i]) - entropy) for i in alive}
    if p >= 1:
        return set(alive)
    reached = 0.0
    last = alive[0]
    for token in sorted(alive, key=lambda i: (distance[i], i)):
        last = token
        reached += probabilities[token]
        if abs(reached - p) < 1e-7:
            raise Undecided
        if reached >= p:
            break
    # Equal logits are as far away; others may happen to be, one on each side of the entropy.
    near = [i for i in alive if row[i] != row[last] and abs(distance[i] - distance[last]) < 1e-9]
    if near:
        raise Undecided
    return {i for i in alive if distance[i] <= distance[last] + 1e-12}


class Undecided(Exception):
    """Two orders of summation may answer differently here."""


Keep = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
both_ways = pytest.mark.parametrize(
    "keep", [pytest.param(keep_likely, id="binned"), pytest.param(keep_likely_in_place, id="sorted")]
)


def filtered(keep: Keep, rows: list[Row], k: list[int], p: list[float], typical: list[float]) -> list[set[int]]:
    scores = torch.tensor(rows)
    out = keep(
        scores.clone(),
        torch.tensor(k),
        torch.tensor(p, dtype=torch.float64),
        torch.tensor(typical, dtype=torch.float64),
    )
    kept = [{i for i, value in enumerate(row) if value > -math.inf} for row in out.tolist()]
    assert all(out[r, i] == scores[r, i] for r, ids in enumerate(kept) for i in ids), "a kept score never changes"
    return kept


@settings(max_examples=150, deadline=None)
@given(rows=ROWS, data=st.data())
@both_ways
def test_filters_keep_what_the_reference_keeps(keep: Keep, rows: list[Row], data: st.DataObject) -> None:
    rows = torch.tensor(rows).tolist()
    count = len(rows)
    probability = st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0]) | st.floats(1e-3, 1.0)
    k = data.draw(st.lists(st.sampled_from([0, 1, 2, 5, 23, 10_000]), min_size=count, max_size=count))
    p = data.draw(st.lists(probability, min_size=count, max_size=count))
    typical = data.draw(st.lists(probability, min_size=count, max_size=count))
    kept = filtered(keep, rows, k, p, typical)
    for row, row_k, row_p, row_typical, ids in zip(rows, k, p, typical, kept, strict=True):
        try:
            after_k = top_k_reference(row, row_k)
            within_p = top_p_reference(after_k, row_p)
            after_p = [value if i in within_p else -math.inf for i, value in enumerate(after_k)]
            expected = typical_reference(after_p, row_typical)
        except Undecided:
            assert ids
            continue
        if row_typical >= 1:
            expected |= within_p
        assert ids == expected


@pytest.mark.parametrize(
    ("row", "k", "p", "typical", "kept"),
    [
        pytest.param([1.0, 3.0, 2.0], 1, 1.0, 1.0, {1}, id="top-k of one is the argmax"),
        pytest.param([2.0, 2.0, 2.0, 1.0], 2, 1.0, 1.0, {0, 1, 2}, id="top-k keeps what ties with the k-th"),
        pytest.param([1.0, 2.0], 99, 1.0, 1.0, {0, 1}, id="k above the vocabulary keeps all"),
        pytest.param([0.0, 0.0, 0.0, 0.0], 0, 0.4, 1.0, {0, 1}, id="top-p breaks ties towards lower ids"),
        pytest.param([0.0, 5.0, 0.0], 0, 1e-9, 1.0, {1}, id="a tiny top-p keeps one"),
        pytest.param([0.0, 5.0, 0.0], 0, 1.0, 1e-9, {1}, id="a tiny typical-p keeps one"),
        pytest.param([0.0, 5.0, 0.0], 0, 1.0, 1.0, {0, 1, 2}, id="neutral values keep all"),
        pytest.param([0.0, -200.0, 0.0], 0, 0.999999, 1.0, {0, 2}, id="an impossible token is never needed"),
        pytest.param([2.0, 2.0, 0.0, 0.0], 2, 0.6, 1.0, {0, 1}, id="top-p counts probabilities among the top k"),
    ],
)
@both_ways
def test_filter_cases(keep: Keep, row: Row, k: int, p: float, typical: float, kept: set[int]) -> None:
    assert filtered(keep, [row], [k], [p], [typical]) == [kept]


@both_ways
def test_a_large_vocabulary_is_filtered_as_the_reference_does(keep: Keep) -> None:
    generator = torch.Generator().manual_seed(5)
    scores = torch.randn(6, 5000, generator=generator) * torch.tensor([0.01, 0.3, 1, 3, 6, 20]).unsqueeze(-1)
    rows: list[Row] = scores.tolist()
    assert filtered(keep, rows, [0] * 6, [0.9] * 6, [1.0] * 6) == [top_p_reference(row, 0.9) for row in rows]


def history(rows: list[list[int]]) -> History:
    return History(
        torch.tensor([index for index, row in enumerate(rows) for _ in row]),
        torch.tensor([token for row in rows for token in row]),
        torch.tensor([float(len(row)) for row in rows]),
    )


@settings(deadline=None)
@given(rows=ROWS, data=st.data())
def test_penalties_change_what_the_reference_changes(rows: list[Row], data: st.DataObject) -> None:
    rows = torch.tensor(rows).tolist()
    count, vocab = len(rows), len(rows[0])
    seen = data.draw(
        st.lists(st.lists(st.integers(0, vocab - 1), min_size=1, max_size=9), min_size=count, max_size=count)
    )
    repetition = data.draw(st.lists(st.sampled_from([0.5, 1.0, 1.3]), min_size=count, max_size=count))
    frequency = data.draw(st.lists(st.sampled_from([-1.5, 0.0, 0.7]), min_size=count, max_size=count))
    logits = torch.tensor(rows)
    penalise_repetition(logits, history(seen), torch.tensor(repetition))
    penalise_frequency(logits, history(seen), torch.tensor(frequency))
    for row, row_seen, r, f, result in zip(rows, seen, repetition, frequency, logits.tolist(), strict=True):
        counts = Counter(row_seen)
        expected = [
            (value * r if value < 0 else value / r) - f * counts[token] / len(row_seen) if token in counts else value
            for token, value in enumerate(row)
        ]
        assert result == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_extreme_parameters_leave_finite_logits() -> None:
    logits = torch.tensor([[10.0, -10.0, 1.0]])
    penalise_repetition(logits, history([[0, 1]]), torch.tensor([1e-38]))
    penalise_frequency(logits, history([[0, 1]]), torch.tensor([-3e38]))
    assert bool(logits.isfinite().all())
    divide_by_temperature(logits, torch.tensor([1e-45]))
    assert bool((logits.amax(-1) == 0).all()) and not bool(logits.isnan().any())


def test_temperature_leaves_the_distribution_of_the_quotient() -> None:
    logits = torch.tensor([[1.0, 2.0, 4.0], [3.0, -1.0, 0.0]])
    expected = torch.log_softmax(logits / torch.tensor([[0.5], [2.0]]), -1)
    divide_by_temperature(logits, torch.tensor([0.5, 2.0]))
    torch.testing.assert_close(torch.log_softmax(logits, -1), expected)
