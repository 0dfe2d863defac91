"""Steps through the memory of CUDA graphs equal plain steps, exactly. In the place of a graph is a plain call."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import paged_driver
import pytest
import torch
from text_generation_server.attention.triton_paged import Plan, TritonPaged
from text_generation_server.config import Dtype, ShardConfig
from text_generation_server.engine import cuda_graphs
from text_generation_server.engine.cuda_graphs import GraphedRunner, with_graphs
from text_generation_server.engine.inputs import ForwardInputs
from text_generation_server.model.loader import load_model
from text_generation_server.model.transformers_runner import TransformersRunner
from torch import Tensor

pytest.importorskip("triton")
from text_generation_server.attention import triton_paged
from text_generation_server.gpu_kernels import arithmetic

pytestmark = pytest.mark.skipif(not arithmetic.INTERPRETED, reason="kernels run on a GPU here: pytest -m gpu")

MakeModel = Callable[..., Path]
BLOCK_SIZE = 16


def call(compute: Callable[[], object]) -> Callable[[], object]:
    """In the place of a CUDA graph."""
    return compute


@pytest.fixture(scope="module")
def runner(tiny_model: MakeModel) -> TransformersRunner:
    config = ShardConfig(model_id="tiny", uds_path=Path("unused"), dtype=Dtype.FLOAT32, attention="triton")
    return load_model(config, tiny_model("llama", num_hidden_layers=1))


@pytest.fixture(autouse=True)
def as_in_the_engine() -> Iterator[None]:
    with torch.inference_mode():
        yield


def graphed(runner: TransformersRunner, sizes: list[int], **options: Any) -> GraphedRunner:
    assert isinstance(runner.backend, TritonPaged)
    return GraphedRunner(runner, runner.backend, sizes, **{"capture": call, **options})


def decode_rows(lengths: list[int], first_block: int = 1) -> ForwardInputs:
    """The last token of sequences whose keys and values are whatever the cache holds."""
    tables = []
    for length in lengths:
        count = -(-length // BLOCK_SIZE)
        tables.append(list(range(first_block + count - 1, first_block - 1, -1)))
        first_block += count
    last = [length - 1 for length in lengths]
    places = [
        table[place // BLOCK_SIZE] * BLOCK_SIZE + place % BLOCK_SIZE for table, place in zip(tables, last, strict=True)
    ]
    return ForwardInputs(
        input_ids_T=torch.arange(10, 10 + len(lengths)),
        position_ids_T=torch.tensor(last),
        slots_T=torch.tensor(places),
        num_decode_rows=len(lengths),
        query_lens=[1] * len(lengths),
        context_lens=lengths,
        block_tables=tables,
        logits_indices_L=torch.arange(len(lengths)),
    )


def fill(runner: TransformersRunner) -> None:
    """The same numbers each time."""
    torch.manual_seed(0)
    assert runner.cache is not None
    for layer in runner.cache.layers:
        layer.keys_KSD.normal_()
        layer.values_KSE.normal_()


def both(runner: TransformersRunner, through: GraphedRunner, inputs: ForwardInputs) -> tuple[Tensor, Tensor]:
    """Logits without and with graphs, and the same cache before."""
    fill(runner)
    plain = runner.forward(inputs).clone()
    fill(runner)
    return plain, through.forward(inputs).clone()


def test_a_step_equals_the_plain_step_whatever_steps_were_before_it(runner: TransformersRunner) -> None:
    through = graphed(runner, [1, 4, 2])
    through.allocate_kv_cache(40)
    assert through.sizes == [1, 2, 4]
    for count, lengths in enumerate([[5, 40, 17, 300], [90], [3, 3, 33], [16, 17], [500], [1, 2, 3, 4]], 1):
        plain, ours = both(runner, through, decode_rows(lengths))
        if len(lengths) in through.sizes:
            assert torch.equal(plain, ours)
        torch.testing.assert_close(plain, ours, rtol=1e-5, atol=1e-5)  # of another number of rows, products round so
        assert through.num_replays == count


def test_rows_that_a_graph_has_too_many_touch_nobody(runner: TransformersRunner) -> None:
    through = graphed(runner, [4])
    through.allocate_kv_cache(20)
    through.forward(decode_rows([20, 20, 20, 20]))  # its rows stay in the graph's memory
    fill(runner)
    assert runner.cache is not None
    before = [layer.keys_KSD.clone() for layer in runner.cache.layers]
    through.forward(decode_rows([40]))
    for kept, layer in zip(before, runner.cache.layers, strict=True):
        changed = (kept != layer.keys_KSD).any(-1).any(0).nonzero().flatten().tolist()
        assert changed == [0, 1 * BLOCK_SIZE + 39 % BLOCK_SIZE]  # slot 0 is nobody's


@pytest.mark.slow
def test_generation_through_graphs_gives_the_same_tokens(runner: TransformersRunner) -> None:
    prompts = paged_driver.random_prompts(3, lengths=(20, 7))
    expected = paged_driver.greedy(runner, prompts, max_new_tokens=5)
    through = graphed(runner, [1, 2])
    assert paged_driver.greedy(through, prompts, max_new_tokens=5, arrive_within=3) == expected
    assert through.num_replays > 0


@pytest.mark.parametrize(
    "inputs",
    [
        pytest.param(decode_rows([5, 6, 7]), id="more rows than the largest graph has"),
        pytest.param(decode_rows([400]), id="a longer row than was promised"),
    ],
)
def test_steps_that_fit_no_graph_are_computed_without(runner: TransformersRunner, inputs: ForwardInputs) -> None:
    through = graphed(runner, [1, 2], max_total_tokens=200)
    through.allocate_kv_cache(40)
    plain, ours = both(runner, through, inputs)
    assert torch.equal(plain, ours)
    assert through.num_replays == 0


def test_a_step_with_more_parts_than_there_is_room_for_is_computed_without(
    runner: TransformersRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_paged, "STATIC_PARTS", 2)
    through = graphed(runner, [2])
    through.allocate_kv_cache(60)
    for lengths, replays in (([100, 100], 1), ([300, 300], 1), ([20, 100], 2)):
        plain, ours = both(runner, through, decode_rows(lengths))
        assert torch.equal(plain, ours)
        assert through.num_replays == replays


def test_a_prompt_chunk_in_the_step_is_computed_without(runner: TransformersRunner) -> None:
    through = graphed(runner, [1, 2])
    through.allocate_kv_cache(20)
    inputs = decode_rows([5, 20])
    inputs.num_decode_rows = 1
    through.forward(inputs)
    assert through.num_replays == 0


def test_the_cache_is_clean_after_graphs_are_made(runner: TransformersRunner) -> None:
    graphed(runner, [1, 2]).allocate_kv_cache(3)
    assert runner.cache is not None
    assert not any(cached.any() for layer in runner.cache.layers for cached in (layer.keys_KSD, layer.values_KSE))


def test_a_step_tells_of_its_progress(runner: TransformersRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    through = graphed(runner, [1], capture=lambda compute: lambda: None)
    monkeypatch.setattr(GraphedRunner, "_check", lambda *_: None)
    through.allocate_kv_cache(3)
    noted: list[None] = []
    monkeypatch.setattr(runner, "on_progress", lambda: noted.append(None))
    through.forward(decode_rows([2]))
    assert len(noted) == 1


def test_no_graph_outlives_its_cache(runner: TransformersRunner) -> None:
    through = graphed(runner, [1])
    through.allocate_kv_cache(3)
    through.release_kv_cache()
    assert through.sizes == []
    assert runner.cache is None


def fail(compute: Callable[[], object]) -> Callable[[], object]:
    raise RuntimeError("operation not permitted when stream is capturing\nand so on")


def test_a_model_that_cannot_be_captured_runs_without(
    runner: TransformersRunner, caplog: pytest.LogCaptureFixture
) -> None:
    through = graphed(runner, [1, 2], capture=fail)
    through.allocate_kv_cache(5)
    assert through.sizes == []
    assert caplog.messages == [
        "decode steps run without CUDA graphs, which is slower: "
        "RuntimeError: operation not permitted when stream is capturing"
    ]
    plain, ours = both(runner, through, decode_rows([20]))
    assert torch.equal(plain, ours)


def test_a_graph_that_gives_other_logits_is_not_used(
    runner: TransformersRunner, caplog: pytest.LogCaptureFixture
) -> None:
    """A graph that ignores its inputs, as one of a model that reads the host's memory does."""

    def frozen(compute: Callable[[], object]) -> Callable[[], object]:
        compute()
        return lambda: None

    through = graphed(runner, [1], capture=frozen)
    through.allocate_kv_cache(5)
    assert through.sizes == []
    assert "GraphDiffers: a graph of 1 rows gives other logits" in caplog.text


# -- which runners get graphs ------------------------------------------------------------------------------------


def test_on_a_processor_there_are_none(runner: TransformersRunner) -> None:
    assert with_graphs(runner, [1, 2], max_total_tokens=None) is runner


class OnGpu:
    """A runner as far as the decision looks."""

    def __init__(self, backend: object) -> None:
        self.backend = backend
        self.info = type("Info", (), {"device": torch.device("cuda"), "attention": "torch"})


def test_a_back_end_without_static_plans_gets_none(caplog: pytest.LogCaptureFixture) -> None:
    runner: Any = OnGpu(backend=object())
    with caplog.at_level(logging.INFO, cuda_graphs.__name__):
        assert with_graphs(runner, [1, 2], max_total_tokens=None) is runner
    assert caplog.messages == ["no CUDA graphs: attention `torch` takes no part in them"]


def test_one_with_static_plans_gets_them_unless_there_are_no_sizes(runner: TransformersRunner) -> None:
    on_gpu: Any = OnGpu(runner.backend)
    assert isinstance(with_graphs(on_gpu, [1, 2], max_total_tokens=100), GraphedRunner)
    assert with_graphs(on_gpu, [], max_total_tokens=100) is on_gpu


def test_static_plans_share_their_scratch(runner: TransformersRunner) -> None:
    assert isinstance(runner.backend, TritonPaged)
    plans: list[Plan] = [runner.backend.static_plan(rows, max_tokens=1000) for rows in (8, 2)]
    assert plans[0].scratch.data_ptr() == plans[1].scratch.data_ptr()
