from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch
from text_generation_server.embedded_model import embedded_model_path
from text_generation_server.embedded_model.recipe.training import Budget, new_model, train
from tokenizers import Tokenizer

STEPS = 3


def trained(state_file: Path, interrupted_after: int | None = None) -> tuple[int, list[torch.Tensor]]:
    """The last step and the weights after so many steps of a run that is planned for `STEPS`."""
    model = new_model(0)
    tokenizer = Tokenizer.from_file(str(embedded_model_path() / "tokenizer.json"))
    run = train(
        model,
        tokenizer,
        seed=0,
        budget=Budget(STEPS, minutes=0),
        learning_rate=4e-3,
        report_every_s=0,
        state_file=state_file,
    )
    step = [step for step, _ in islice(run, interrupted_after)][-1]
    return step, [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.slow
def test_an_interrupted_training_comes_to_the_same_end(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order
    try:
        _, whole = trained(tmp_path / "whole.pt")
        trained(tmp_path / "parts.pt", interrupted_after=1)
        for _ in range(2):  # the second time there is nothing left to train
            step, parts = trained(tmp_path / "parts.pt")
            assert step == STEPS
            assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    finally:
        torch.set_num_threads(threads)
