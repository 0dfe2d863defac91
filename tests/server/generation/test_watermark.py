"""The watermark: what the authors' formula says, and what a detector finds."""

from __future__ import annotations

import itertools
import math
from array import array

import pytest
import torch
from text_generation_server.generation.parameters import SamplingParameters
from text_generation_server.generation.sampler import SamplingRow, sample
from text_generation_server.generation.watermark import DEFAULT_WATERMARK, Watermark, green_ids

VOCAB = 1000


def is_green(previous_id: int, token_id: int, gamma: float = 0.5) -> bool:
    """As a detector sees it, written from the paper."""
    generator = torch.Generator(device="cpu")
    generator.manual_seed(15485863 * previous_id)
    greenlist = torch.randperm(VOCAB, generator=generator)[: int(VOCAB * gamma)]
    return token_id in greenlist.tolist()


def test_the_green_tokens_are_the_detectors() -> None:
    ids = set(green_ids(17, VOCAB, 0.25).tolist())
    assert len(ids) == 250
    assert ids == {token_id for token_id in range(VOCAB) if is_green(17, token_id, 0.25)}


def generate(parameters: SamplingParameters, watermark: Watermark, count: int = 200) -> list[int]:
    ids = array("q", [3])
    generator = torch.Generator().manual_seed(1)
    for index in range(count):
        logits = torch.randn(1, VOCAB, generator=generator)
        row = SamplingRow(parameters, index, known_ids=ids if parameters.reads_history else None, num_prompt_tokens=1)
        ids.append(int(sample(logits, [row], watermark=watermark).ids_S))
    return list(ids)


def z_score(ids: list[int], gamma: float) -> float:
    pairs = list(itertools.pairwise(ids))
    green = sum(is_green(previous, token, gamma) for previous, token in pairs)
    return (green - gamma * len(pairs)) / math.sqrt(len(pairs) * gamma * (1 - gamma))


@pytest.mark.parametrize("gamma", [0.25, 0.5])
def test_a_detector_finds_the_mark_and_finds_none_where_there_is_none(gamma: float) -> None:
    watermark = Watermark(gamma, 2.0)
    marked = generate(SamplingParameters(do_sample=True, watermark=True), watermark)
    plain = generate(SamplingParameters(do_sample=True), watermark)
    assert z_score(marked, gamma) > 6
    assert abs(z_score(plain, gamma)) < 4


def test_only_the_rows_that_want_it_are_marked() -> None:
    logits = torch.zeros(2, VOCAB)
    rows = [
        SamplingRow(SamplingParameters(watermark=True), 0, known_ids=array("q", [5]), num_prompt_tokens=1),
        SamplingRow(SamplingParameters(), 0),
    ]
    sampled = sample(logits, rows)
    greenest = int(green_ids(5, VOCAB, DEFAULT_WATERMARK.gamma).min())
    assert sampled.ids_S.tolist() == [greenest, 0]
    half = VOCAB // 2
    expected = DEFAULT_WATERMARK.delta - math.log(half * math.exp(DEFAULT_WATERMARK.delta) + half)
    assert sampled.logprobs_S[0].item() == pytest.approx(expected, abs=1e-5)
    assert sampled.logprobs_S[1].item() == pytest.approx(-math.log(VOCAB), abs=1e-5)


def test_a_token_that_only_the_device_knows_counts() -> None:
    parameters = SamplingParameters(watermark=True)
    known = SamplingRow(parameters, 0, known_ids=array("q", [9, 5]), num_prompt_tokens=1)
    pending = SamplingRow(parameters, 0, known_ids=array("q", [9]), num_prompt_tokens=1, pending_index=1)
    logits = torch.zeros(1, VOCAB)
    ids = [
        sample(logits.clone(), [row], torch.tensor([7, 5])).ids_S.item()  # the pending one is the step's second input
        for row in (known, pending)
    ]
    assert ids[0] == ids[1]
