"""What is alive at once: counted on any device, without numbers on the meta device."""

from __future__ import annotations

import pytest
import torch
from text_generation_server.model.live_bytes import LiveBytes
from torch import Tensor

devices = pytest.mark.parametrize("device", ["cpu", "meta"])


def peak(function: object, *arguments: Tensor) -> int:
    assert callable(function)
    with torch.inference_mode(), LiveBytes() as live:
        function(*arguments)
    peak: int = live.peak
    return peak


@devices
def test_what_is_gone_does_not_count(device: str) -> None:
    def chain(x: Tensor) -> Tensor:
        for _ in range(10):
            x = x * 2
        return x

    assert peak(chain, torch.zeros(100, device=device)) == 2 * 400


@devices
def test_views_and_what_is_done_in_place_are_free(device: str) -> None:
    assert peak(lambda x: x.view(10, 10)[3:].transpose(0, 1).add_(1), torch.zeros(100, device=device)) == 0


@devices
def test_parts_of_composed_operations_count(device: str) -> None:
    linear = torch.nn.Linear(100, 300, device=device).requires_grad_(False)
    assert peak(linear, torch.zeros((2, 100), device=device)) == 2 * 300 * 4


@devices
def test_the_same_count_the_second_time(device: str) -> None:
    def twice(x: Tensor) -> None:
        for dtype in (torch.float32, torch.float64):
            x.to(dtype) + 1
            x.to(dtype) + 1

    assert peak(twice, torch.zeros(100, dtype=torch.float16, device=device)) == 2 * 800


def test_without_numbers_there_are_as_many_indices_as_can_be() -> None:
    with torch.no_grad(), LiveBytes():
        mask = torch.zeros((3, 4), dtype=torch.bool, device="meta")
        assert mask.nonzero().shape == (12, 2)
        assert [index.shape for index in torch.where(mask)] == [(12,), (12,)]
        assert 5 not in torch.zeros(3, dtype=torch.int64, device="meta")
