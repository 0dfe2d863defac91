"""Decode steps held in CUDA graphs: one launch instead of hundreds, so that the GPU waits for no Python.

A graph reads and writes the same memory at each replay. A step's inputs are put in place before, on the device and in
stream order; rows that a graph has too many are empty: they read nothing, and write to block 0, which is nobody's.

Shape legend: R rows of a graph, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from text_generation_server.attention.interface import StaticBackend
from text_generation_server.engine.inputs import ForwardInputs
from text_generation_server.errors import first_line
from text_generation_server.model.runner import ModelInfo, ModelRunner
from text_generation_server.model.transformers_runner import TransformersRunner

logger = logging.getLogger(__name__)

TOLERANCE = 2e-2
"""Of the logits of a graph, relative to those of the same step without it: kernels are the same, so they mostly agree
exactly."""

Capture = Callable[[Callable[[], object]], Callable[[], object]]
"""What makes a replay of a computation."""


def with_graphs(runner: TransformersRunner, sizes: Sequence[int], *, max_total_tokens: int | None) -> ModelRunner:
    """``runner`` with graphs for decode steps of these sizes; as it is where there are none to make.

    ``max_total_tokens``: of a sequence, if that is known.
    """
    if not sizes or runner.info.device.type != "cuda":
        return runner
    if not isinstance(runner.backend, StaticBackend):
        logger.info("no CUDA graphs: attention `%s` takes no part in them", runner.info.attention)
        return runner
    return GraphedRunner(runner, runner.backend, sizes, max_total_tokens=max_total_tokens)


class GraphedRunner:
    """Implements ``model/runner.py``'s ModelRunner around another."""

    def __init__(
        self,
        runner: TransformersRunner,
        backend: StaticBackend,
        sizes: Sequence[int],
        *,
        max_total_tokens: int | None = None,
        capture: Capture | None = None,
    ) -> None:
        """``capture``: what takes the place of CUDA's graphs; for tests."""
        self.runner = runner
        self.num_replays = 0
        self._backend = backend
        self._sizes = sorted(set(sizes), reverse=True)  # the largest first: the others find its memory
        self._max_total_tokens = max_total_tokens
        self._capture = capture
        self._graphs: dict[int, DecodeGraph] = {}

    @property
    def info(self) -> ModelInfo:
        return self.runner.info

    @property
    def pads_steps(self) -> bool:
        return self.runner.pads_steps

    @property
    def sizes(self) -> list[int]:
        """Those that there are graphs of."""
        return sorted(self._graphs)

    @torch.inference_mode()
    def allocate_kv_cache(self, num_blocks: int) -> None:
        self._graphs.clear()  # they hold the addresses of the old one
        self.runner.allocate_kv_cache(num_blocks)
        limits = [num_blocks * self.runner.block_size, self.info.max_position_embeddings, self._max_total_tokens]
        max_tokens = min(limit for limit in limits if limit)
        capture = self._capture or cuda_capture()
        logits_RV = torch.empty((self._sizes[0], self.info.vocab_size), dtype=torch.float32, device=self.info.device)
        try:
            for size in self._sizes:
                graph = DecodeGraph(self.runner, self._backend, logits_RV[:size], max_tokens, capture)
                self._check(graph, max_tokens)
                self._graphs[size] = graph
        except Exception as error:  # whatever a model's code does that a graph cannot hold
            self._graphs.clear()
            logger.warning("decode steps run without CUDA graphs, which is slower: %s", first_line(error))
        else:
            logger.info("CUDA graphs of %s decode rows", ", ".join(str(size) for size in self.sizes))
        finally:
            self.runner.zero_blocks([0, 1])

    def release_kv_cache(self) -> None:
        self._graphs.clear()
        self.runner.release_kv_cache()

    def zero_blocks(self, block_ids: Iterable[int]) -> None:
        self.runner.zero_blocks(block_ids)

    @torch.inference_mode()
    def forward(self, inputs: ForwardInputs) -> Tensor:
        num_rows = inputs.num_decode_rows
        if num_rows == len(inputs.query_lens) == inputs.logits_indices_L.shape[0]:
            size = min((size for size in self._graphs if size >= num_rows), default=None)
            logits_LV = None if size is None else self._graphs[size].run(inputs)
            if logits_LV is not None:
                self.num_replays += 1
                self.runner.on_progress()
                return logits_LV
        return self.runner.forward(inputs)

    def forward_with_states(self, inputs: ForwardInputs) -> tuple[Tensor, Tensor]:
        return self.runner.forward_with_states(inputs)

    def _check(self, graph: DecodeGraph, max_tokens: int) -> None:
        """Compare a step of the graph with the same step without it. Raises: GraphDiffers."""
        if max_tokens < 2:
            return
        inputs = _second_tokens(graph.size, self.runner.block_size, self.info.device)
        plain = self.runner.forward(inputs).float()
        ours = graph.run(inputs)
        assert ours is not None
        error = (ours - plain).norm() / plain.norm()
        if not bool(error <= TOLERANCE):
            raise GraphDiffers(f"a graph of {graph.size} rows gives other logits (relative error {float(error):.2g})")


class GraphDiffers(Exception):
    """A model whose step depends on more than what is on the device."""


class DecodeGraph:
    """The decode step of a fixed number of rows, and the memory of its inputs."""

    def __init__(
        self,
        runner: TransformersRunner,
        backend: StaticBackend,
        logits_RV: Tensor,
        max_tokens: int,
        capture: Capture,
    ) -> None:
        self.size, device = logits_RV.shape[0], logits_RV.device
        self._backend = backend
        self._logits_RV = logits_RV
        self._ids_R, self._positions_R = torch.zeros((2, self.size), dtype=torch.int64, device=device)
        self._plan = backend.static_plan(self.size, max_tokens=max_tokens)
        every_R = torch.arange(self.size, device=device)

        def compute() -> None:
            logits_RV.copy_(runner.compute(self._ids_R, self._positions_R, every_R, self._plan))

        self._replay = capture(compute)

    def run(self, inputs: ForwardInputs) -> Tensor | None:
        """Logits of the step, which the next one overwrites; None where the back end has no room for its rows."""
        num_rows = inputs.num_decode_rows
        if not self._backend.update(self._plan, inputs):
            return None
        for target_R, source in ((self._ids_R, inputs.input_ids_T), (self._positions_R, inputs.position_ids_T)):
            target_R[:num_rows].copy_(source[:num_rows])
            target_R[num_rows:].zero_()
        self._replay()
        return self._logits_RV[:num_rows]


def cuda_capture() -> Capture:
    """What captures CUDA graphs that share their memory: no two of them run at a time."""
    pool = torch.cuda.graph_pool_handle()

    def capture(compute: Callable[[], object]) -> Callable[[], object]:
        # Kernels are compiled, and libraries take their memory, outside of the graph, on a stream of its kind.
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                compute()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            compute()
        return graph.replay

    return capture


def _second_tokens(num_rows: int, block_size: int, device: torch.device) -> ForwardInputs:
    """Rows that all read and write the same first two slots of block 1, where a cache is not in use yet."""
    return ForwardInputs(
        input_ids_T=torch.ones(num_rows, dtype=torch.int64, device=device),
        position_ids_T=torch.ones(num_rows, dtype=torch.int64, device=device),
        slots_T=torch.full((num_rows,), block_size + 1, dtype=torch.int64, device=device),
        num_decode_rows=num_rows,
        query_lens=[1] * num_rows,
        context_lens=[2] * num_rows,
        block_tables=[[1]] * num_rows,
        logits_indices_L=torch.arange(num_rows, device=device),
    )
