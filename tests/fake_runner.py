"""A model runner without a model: logits are a pure function of the tokens that its paged cache holds.

It really goes through slots and block tables, so a wrong slot, a stale block or a missing token changes the output,
and `oracle_logits` says what the output must be. Blocks are read whole, as attention does: not-a-number in a slot
behind the context spoils the row.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterable

import numpy as np
import torch
from text_generation_server.engine.inputs import ForwardInputs
from text_generation_server.model.runner import ModelInfo
from torch import Tensor

VOCAB_SIZE = 64
BLOCK_SIZE = 4
NAN_TOKEN = 60
"""A context that holds it gives logits that are not a number, and so do blocks that hold it behind the context."""
MEMORY_TOKEN = 61
"""A step that computes it runs out of memory."""
CRASH_TOKEN = 62
"""A step that computes it raises."""
DEVICE_TOKEN = 63
"""A step that computes it leaves the device unusable."""


def oracle_logits(context: Iterable[int]) -> Tensor:
    """float32 [V] for the token that follows ``context``."""
    tokens = np.array(list(context), dtype=np.int64)
    if NAN_TOKEN in tokens:
        return torch.full((VOCAB_SIZE,), torch.nan)
    generator = torch.Generator().manual_seed(zlib.crc32(tokens.tobytes()))
    logits = torch.randn(VOCAB_SIZE, generator=generator) * 3
    logits[NAN_TOKEN:] = -50.0  # the special tokens come from tests, never from the model
    return logits


class FakeRunner:
    """Implements the engine's ModelRunner on the CPU."""

    def __init__(self, *, block_size: int = BLOCK_SIZE, max_positions: int = 0) -> None:
        self.info = ModelInfo(
            model_type="fake",
            dtype=torch.float32,
            device=torch.device("cpu"),
            attention="fake",
            vocab_size=VOCAB_SIZE,
            eos_token_ids=(2,),
            max_position_embeddings=max_positions,
            window_size=0,
            kv_bytes_per_token=8,
            hidden_size=2,
        )
        self.pads_steps = True
        self.block_size = block_size
        self.cache = torch.zeros(0, dtype=torch.int64)
        self.zeroed: list[int] = []
        self.forwards: list[ForwardInputs] = []
        self.entered = threading.Event()
        """Set by the first forward pass."""
        self.gate: threading.Event | None = None
        """A forward pass waits for it when it is set to one."""
        self.on_progress: Callable[[], None] = lambda: None

    def allocate_kv_cache(self, num_blocks: int) -> None:
        self.cache = torch.full(((num_blocks + 1) * self.block_size,), -1)

    def release_kv_cache(self) -> None:
        self.cache = torch.zeros(0, dtype=torch.int64)

    def zero_blocks(self, block_ids: Iterable[int]) -> None:
        for block in block_ids:
            self.zeroed.append(block)
            self.cache[block * self.block_size : (block + 1) * self.block_size] = 0

    def forward(self, inputs: ForwardInputs) -> Tensor:
        self.forwards.append(inputs)
        self.entered.set()
        if self.gate is not None:
            self.gate.wait(10)
        ids = inputs.input_ids_T
        assert bool(((ids >= 0) & (ids < VOCAB_SIZE)).all())
        if MEMORY_TOKEN in ids:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        if CRASH_TOKEN in ids:
            raise ValueError("the model is broken")
        if DEVICE_TOKEN in ids:
            raise torch.AcceleratorError("CUDA error: device-side assert triggered\nand many more lines")
        self.cache[inputs.slots_T] = ids[: inputs.slots_T.shape[0]]
        wanted = set(inputs.logits_indices_L.tolist())
        rows: list[Tensor] = []
        offset = 0
        for query_len, context_len, table in zip(
            inputs.query_lens, inputs.context_lens, inputs.block_tables, strict=True
        ):
            num_blocks = -(-context_len // self.block_size)
            slots = [
                block * self.block_size + place for block in table[:num_blocks] for place in range(self.block_size)
            ]
            read = self.cache[slots].tolist()
            context = read[:context_len]
            if NAN_TOKEN in context:  # what is computed from not-a-number is none either
                self.cache[slots[context.index(NAN_TOKEN) : context_len]] = NAN_TOKEN
            for place in range(query_len):
                position = context_len - query_len + place
                assert int(inputs.position_ids_T[offset + place]) == position
                if offset + place in wanted:
                    rows.append(oracle_logits(read if NAN_TOKEN in read else context[: position + 1]))
            offset += query_len
        return torch.stack(rows) if rows else torch.empty(0, VOCAB_SIZE)

    def forward_with_states(self, inputs: ForwardInputs) -> tuple[Tensor, Tensor]:
        """The state of a token is its id and its position."""
        states_TH = torch.stack([inputs.input_ids_T, inputs.position_ids_T], -1).float()
        return self.forward(inputs), states_TH
