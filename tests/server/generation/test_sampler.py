from __future__ import annotations

import math
from array import array
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from text_generation_server.generation import sampler
from text_generation_server.generation.parameters import SamplingParameters
from text_generation_server.generation.sampler import Sampled, SamplingRow, inverse_cdf, read_top_tokens, sample

GREEDY = SamplingParameters()
KINDS = [
    GREEDY,
    SamplingParameters(do_sample=True),
    SamplingParameters(do_sample=True, temperature=0.7),
    SamplingParameters(do_sample=True, top_k=5),
    SamplingParameters(do_sample=True, top_p=0.8, temperature=1.4),
    SamplingParameters(do_sample=True, typical_p=0.6),
    SamplingParameters(do_sample=True, repetition_penalty=1.3, frequency_penalty=0.4),
    SamplingParameters(repetition_penalty=1.3, top_k=3),
    SamplingParameters(
        do_sample=True, temperature=0.8, top_k=40, top_p=0.9, typical_p=0.9, repetition_penalty=1.1,
        frequency_penalty=0.2,
    ),
    SamplingParameters(do_sample=True, presence_penalty=0.9, count_penalty=0.3, bias_ids=(5, 2), biases=(1.5, -100.0)),
]  # fmt: skip


def with_seed(parameters: SamplingParameters, seed: int) -> SamplingParameters:
    values = {name: getattr(parameters, name) for name in SamplingParameters.__slots__}
    return SamplingParameters(**(values | {"seed": seed}))


def random_logits(rows: int, vocab: int = 300, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def top_tokens(sampled: Sampled, row: int = 0) -> tuple[list[int], list[float]]:
    top = sampled.top
    assert top is not None
    values, ids, counts = top.values_RN.tolist(), top.ids_RN.tolist(), top.counts_R.tolist()
    return read_top_tokens(top.logprobs_RV[row], values[row], ids[row], top.wanted[row], counts[row])


def test_greedy_takes_the_lowest_of_equal_best_ids_and_its_logprob() -> None:
    logits = torch.zeros(1, 1000)
    logits[0, [400, 30, 777]] = 2.0
    sampled = sample(logits.clone(), [SamplingRow(GREEDY, 0)])
    assert sampled.ids_S.tolist() == [30]
    torch.testing.assert_close(sampled.logprobs_S, torch.log_softmax(logits, -1)[:, 30])


@pytest.mark.parametrize("vocab", [300, 304], ids=["by torch", "by a kernel"])
def test_a_row_gets_the_same_token_alone_and_among_32(vocab: int) -> None:
    rows = [
        SamplingRow(
            with_seed(KINDS[index % len(KINDS)], 1000 + index), index, 2, array("q", [index, 5, 5, 9]), index % 3
        )
        for index in range(32)
    ]
    logits = random_logits(32, vocab)
    together = sample(logits.clone(), rows)
    for index, row in enumerate(rows):
        alone = sample(logits[index : index + 1].clone(), [row])
        assert alone.ids_S.item() == together.ids_S[index].item()
        assert alone.logprobs_S.item() == pytest.approx(together.logprobs_S[index].item(), abs=1e-6)
        assert top_tokens(alone)[0] == top_tokens(together, index)[0]


def test_logprobs_are_of_the_filtered_distribution() -> None:
    logits = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.1]]))
    parameters = SamplingParameters(do_sample=True, top_k=2)
    sampled = sample(logits.clone(), [SamplingRow(parameters, 0, 4)])
    ids, logprobs = top_tokens(sampled)
    assert ids == [0, 1], "what the filter removed is no candidate"
    assert logprobs == pytest.approx([math.log(4 / 7), math.log(3 / 7)], abs=1e-6)
    assert sampled.logprobs_S.item() == pytest.approx(logprobs[ids.index(int(sampled.ids_S))], abs=1e-6)


def test_top_tokens_list_every_tie_at_the_last_place() -> None:
    logits = torch.zeros(1, 200)
    logits[0, 7] = 5.0
    assert top_tokens(sample(logits.clone(), [SamplingRow(GREEDY, 0, 1)]))[0] == [7]
    ids, logprobs = top_tokens(sample(logits.clone(), [SamplingRow(GREEDY, 0, 2)]))
    assert ids == [7, *(token for token in range(200) if token != 7)]
    assert logprobs == sorted(logprobs, reverse=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [300, 304])
def test_a_greedy_row_beside_one_that_is_not_has_the_same_logprob(vocab: int, dtype: torch.dtype) -> None:
    """Alone its logits are read as the model computed them, beside the other one they become float32."""
    logits = random_logits(2, vocab).to(dtype)
    alone = sample(logits[:1].clone(), [SamplingRow(GREEDY, 0)])
    beside = sample(logits.clone(), [SamplingRow(GREEDY, 0), SamplingRow(KINDS[2], 0, 3)])
    assert alone.ids_S.item() == beside.ids_S[0].item() == logits[0].argmax().item()
    assert alone.logprobs_S.dtype == torch.float32
    assert alone.logprobs_S.item() == beside.logprobs_S[0].item()
    assert alone.logprobs_S.item() == pytest.approx(torch.log_softmax(logits[0].double(), -1).max().item(), abs=1e-5)


@pytest.mark.parametrize("parameters", KINDS)
@pytest.mark.parametrize("vocab", [300, 304], ids=["by torch", "by a kernel"])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_row_that_is_not_finite_fails_alone(parameters: SamplingParameters, vocab: int, broken: float) -> None:
    rows = [SamplingRow(parameters, 0, 1, array("q", [1, 2])) for _ in range(3)]
    logits = random_logits(3, vocab)
    sound = sample(logits.clone(), rows)
    logits[1, 17] = broken
    sampled = sample(logits.clone(), rows)
    assert sampled.ids_S.tolist() == [sound.ids_S[0].item(), -1, sound.ids_S[2].item()]
    assert sampled.logprobs_S[[0, 2]].tolist() == sound.logprobs_S[[0, 2]].tolist()


def test_a_token_that_the_model_rules_out_is_no_failure() -> None:
    logits = torch.tensor([[1.0, -math.inf, 0.0, -9.0, -9.0, -9.0]])
    for parameters in KINDS:
        rows = [SamplingRow(parameters, 0, known_ids=array("q", [0, 1]))]
        assert sample(logits.clone(), rows).ids_S.item() != 1


def test_the_penalties_see_a_token_that_only_the_device_knows() -> None:
    parameters = SamplingParameters(
        repetition_penalty=1.5, frequency_penalty=0.5, presence_penalty=0.7, count_penalty=0.2
    )
    logits = random_logits(1, 50)
    known = sample(logits.clone(), [SamplingRow(parameters, 3, 5, array("q", [4, 9, 9, 30]), 2)])
    pending = sample(
        logits.clone(),
        [SamplingRow(parameters, 3, 5, array("q", [4, 9, 9]), 2, pending_index=1)],
        input_ids_T=torch.tensor([8, 30, 2]),
    )
    assert top_tokens(known) == top_tokens(pending)


def test_20000_draws_fit_the_distribution() -> None:
    logits = random_logits(1, 700, seed=3).repeat(1000, 1)
    parameters = SamplingParameters(do_sample=True, temperature=1.7, top_p=0.97)
    expected: np.ndarray[tuple[int], np.dtype[np.float64]] | None = None
    counts = np.zeros(700)
    for batch in range(20):
        rows = [
            SamplingRow(with_seed(parameters, 7), batch * 1000 + index, 700 if index == 0 else 0)
            for index in range(1000)
        ]
        sampled = sample(logits.clone(), rows)
        counts += np.bincount(sampled.ids_S.numpy(), minlength=700)
        if expected is None:
            ids, logprobs = top_tokens(sampled)
            expected = np.zeros(700)
            expected[ids] = np.exp(logprobs)
    assert expected is not None
    assert counts[expected == 0].sum() == 0, "a filtered token was drawn"
    common = expected * 20_000 >= 5
    observed = np.append(counts[common], counts[~common].sum())
    fitting = np.append(expected[common], expected[~common].sum()) * 20_000
    assert stats.chisquare(observed, fitting * observed.sum() / fitting.sum()).pvalue > 1e-3


@settings(max_examples=100, deadline=None)
@given(
    weights=st.lists(
        st.sampled_from([0.0, 0.0, 1.0, 1e-30, 0.3]) | st.floats(0, 1, width=32), min_size=1, max_size=600
    ).filter(any),
    u=st.sampled_from([0.0, 0.5, 1 - 2**-53]) | st.floats(0, 1, exclude_max=True),
)
def test_inverse_cdf_finds_what_a_running_sum_finds(weights: list[float], u: float) -> None:
    row = torch.tensor([weights], dtype=torch.float32)
    chosen = int(inverse_cdf(row, torch.tensor([u], dtype=torch.float64)))
    assert row[0, chosen] > 0, "a token without weight is never chosen"
    ends = np.cumsum(row[0].numpy().astype(np.float64))
    target = u * ends[-1]
    slack = 1e-12 * ends[-1]
    assert ends[chosen] >= target - slack
    assert (ends[chosen - 1] if chosen else 0.0) <= target + slack


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"typical_p": math.nan}, "typical_p"),
        ({"repetition_penalty": -1.0}, "repetition_penalty"),
        ({"frequency_penalty": math.inf}, "frequency_penalty"),
        ({"presence_penalty": math.nan}, "presence_penalty"),
        ({"count_penalty": -math.inf}, "count_penalty"),
        ({"bias_ids": (1, 1), "biases": (0.5, 0.5)}, "bias_ids"),
        ({"bias_ids": (1, 2), "biases": (0.5,)}, "bias_ids"),
        ({"bias_ids": (1,), "biases": (math.nan,)}, "biases"),
    ],
)
def test_parameters_without_a_meaning_are_refused(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        SamplingParameters(**values)


def test_a_chosen_token_has_the_logprob_it_has_among_the_top_tokens() -> None:
    logits = torch.randn(8, 300, generator=torch.Generator().manual_seed(0)) * 3 + 40
    rows = [SamplingRow(SamplingParameters(), output_index=0, top_n_tokens=2) for _ in range(8)]
    sampled = sample(logits, rows)
    assert sampled.top is not None
    assert torch.equal(sampled.top.values_RN[:, 0], sampled.logprobs_S)


class Waits(Exception):
    """The host would have to wait for the device."""


@pytest.mark.parametrize("top_n_tokens", [0, 3])
@pytest.mark.parametrize("kinds", [*([kind] for kind in KINDS), KINDS], ids=[*map(str, range(len(KINDS))), "all"])
def test_nothing_waits_for_a_gpu(
    kinds: list[SamplingParameters], top_n_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the device whose tensors have no numbers: whoever looks at any fails."""
    meta = torch.device("meta")

    def sent(numbers: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(torch.as_tensor(numbers).shape, dtype=dtype, device=device)

    def tensor(numbers: Any, device: Any = None, **options: Any) -> torch.Tensor:
        if device is not None and torch.device(device) != torch.device("cpu"):
            raise Waits
        return make_tensor(numbers, device=device, **options)

    make_tensor = torch.tensor
    monkeypatch.setattr(sampler, "to_device", sent)
    monkeypatch.setattr(torch, "tensor", tensor)
    rows = [SamplingRow(kind, index, top_n_tokens, array("q", [1, 2, 3]), index) for index, kind in enumerate(kinds)]
    logits, ids = torch.empty(len(rows), 600, device=meta), torch.empty(len(rows), dtype=torch.int64, device=meta)
    sampled = sample(logits, rows, ids)
    assert sampled.ids_S.device == sampled.logprobs_S.device == meta
    assert (sampled.top is None) == (top_n_tokens == 0)


def test_openai_penalties_see_what_was_generated_and_not_the_prompt() -> None:
    logits = torch.tensor([[1.0, 1.1, 1.2, 1.3]])
    parameters = SamplingParameters(presence_penalty=0.25, count_penalty=0.5)
    row = SamplingRow(parameters, 4, 4, array("q", [3, 3, 2, 1, 1]), num_prompt_tokens=2)
    ids, logprobs = top_tokens(sample(logits.clone(), [row]))
    expected = torch.log_softmax(torch.tensor([1.0, 1.1 - 0.25 - 2 * 0.5, 1.2 - 0.25 - 0.5, 1.3]), -1)
    assert ids == [3, 0, 2, 1]
    assert logprobs == pytest.approx(expected[ids].tolist(), abs=1e-6)


def test_a_bias_makes_a_token_likely_or_rules_it_out() -> None:
    logits = random_logits(2)
    best = int(logits[0].argmax())
    rows = [
        SamplingRow(SamplingParameters(bias_ids=(best, 7), biases=(-100.0, 100.0)), 0),
        SamplingRow(GREEDY, 0),
    ]
    assert sample(logits.clone(), rows).ids_S.tolist() == [7, int(logits[1].argmax())]
