"""Which layers may be launched together: those that a forward pass calls one after another, with nothing in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from text_generation_server.model.swaps.layer_stack import Order
from torch import Tensor, nn

Between = Callable[[Tensor], Tensor]


class Layer(nn.Module):
    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states + 1


def recorded(layers: list[Layer], between: Between, *, angles: Callable[[], Any]) -> Order:
    order = Order()
    for layer in set(layers):
        layer.register_forward_hook(order.note, with_kwargs=True)
    hidden = torch.zeros(1, 3, 4)
    for layer in layers:
        hidden = between(layer(hidden, position_embeddings=angles()))
    return order


def same(hidden: Tensor) -> Tensor:
    return hidden


def test_layers_that_hand_over_what_they_return() -> None:
    first, second, third = layers = [Layer(), Layer(), Layer()]
    angles = torch.zeros(2), torch.zeros(2)
    order = recorded(layers, same, angles=lambda: angles)
    assert order.follows(second, first)
    assert order.follows(third, second)
    assert not order.follows(third, first)
    assert not order.follows(first, third)


@pytest.mark.parametrize(
    "between",
    [
        pytest.param(lambda hidden: hidden * 2, id="another tensor"),
        pytest.param(lambda hidden: hidden.mul_(2), id="changed in place"),
        pytest.param(lambda hidden: hidden.clone(), id="a copy"),
    ],
)
def test_something_between_layers(between: Between) -> None:
    first, second = layers = [Layer(), Layer()]
    angles = torch.zeros(2), torch.zeros(2)
    assert not recorded(layers, between, angles=lambda: angles).follows(second, first)


def test_layers_with_angles_of_their_own() -> None:
    first, second = layers = [Layer(), Layer()]
    order = recorded(layers, same, angles=lambda: (torch.zeros(2), torch.zeros(2)))
    assert not order.follows(second, first)


@pytest.mark.parametrize("calls", [[0, 1, 2, 0, 1, 2], [0, 1, 2, 0], [0, 0, 1, 2]])
def test_a_layer_that_is_called_twice(calls: list[int]) -> None:
    layers = [Layer(), Layer(), Layer()]
    angles = torch.zeros(2), torch.zeros(2)
    order = recorded([layers[index] for index in calls], same, angles=lambda: angles)
    assert not order.follows(layers[1], layers[0])
    assert order.follows(layers[2], layers[1]) == (calls.count(1) == 1)
