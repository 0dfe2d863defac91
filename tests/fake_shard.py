"""A shard without a model: it keeps the contract, checks that the router does, and echoes the prompt."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from text_generation_proto.v1 import generate_pb2 as pb
from text_generation_proto.v1.generate_pb2_grpc import (
    TextGenerationServicer,
    add_TextGenerationServicer_to_server,
)


@dataclass
class EchoSequence:
    """Output i is prompt token i (around and around)."""

    new: pb.NewSequence
    token_ids: list[int]
    blocks: list[int]
    num_computed: int
    num_outputs: int = 0
    failed: bool = False


@dataclass
class FakeShard(TextGenerationServicer):
    """Attributes are knobs for tests; set them before or while it runs."""

    tokenizer_path: str = ""
    eos_token_ids: tuple[int, ...] = ()
    nonce: str = "nonce"
    rank: int = 0
    urls: tuple[str, ...] = ()
    num_blocks: int = 256
    block_size: int = 4
    vocab_size: int = 512
    max_position_embeddings: int = 512
    prefill_logprobs: bool = False
    step_s: float = 0.0
    gate: asyncio.Event | None = None
    """Steps wait until it is set."""
    progress_age_s: float = 0.0
    """What Health says."""
    fail_steps: int = 0
    """That many of the next steps fail as a whole."""
    poisoned_token: int | None = None
    """A sequence whose prompt holds it fails alone."""
    crash_token: int | None = None
    """A step that computes a sequence whose prompt holds it fails as a whole."""
    most_rows: int | None = None
    """A step with more decode rows fails as a whole."""
    out_of_memory: bool = False
    """Whether that is why steps fail."""
    incarnation: int = 1
    epoch: int = 0
    sequences: dict[int, EchoSequence] = field(default_factory=dict)
    warmups: list[pb.WarmupRequest] = field(default_factory=list)
    num_steps: int = 0
    kv: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """What each slot holds of a token depends on it and on all before it: so here they are."""
    last_unary_step: int = 0
    epoch_failed: int = -1
    """The epoch in which a step failed: it takes no others."""

    async def Info(self, request: pb.InfoRequest, context: Any) -> pb.InfoResponse:
        return pb.InfoResponse(
            launcher_nonce=self.nonce,
            incarnation=self.incarnation,
            rank=self.rank,
            world_size=len(self.urls),
            urls=self.urls,
            model_id="fake/echo",
            model_type="echo",
            dtype="float32",
            device_type="cpu",
            attention_impl="none",
            block_size=self.block_size,
            tokenizer_path=self.tokenizer_path,
            eos_token_ids=self.eos_token_ids,
            vocab_size=self.vocab_size,
            max_position_embeddings=self.max_position_embeddings,
            prefill_logprobs=self.prefill_logprobs,
        )

    async def Health(self, request: pb.HealthRequest, context: Any) -> pb.HealthResponse:
        return pb.HealthResponse(
            incarnation=self.incarnation,
            epoch=self.epoch,
            num_sequences=len(self.sequences),
            num_blocks=self.num_blocks if self.warmups else 0,
            last_progress_ns=int(self.progress_age_s * 1e9),
        )

    async def Warmup(self, request: pb.WarmupRequest, context: Any) -> pb.WarmupResponse:
        self.warmups.append(request)
        return pb.WarmupResponse(num_blocks=self.num_blocks, derivation="fake")

    async def ClearCache(self, request: pb.ClearCacheRequest, context: Any) -> pb.ClearCacheResponse:
        assert request.epoch > self.epoch
        self.epoch = request.epoch
        self.last_unary_step = 0
        self.sequences.clear()
        self.kv.clear()
        return pb.ClearCacheResponse()

    async def Steps(self, requests: AsyncIterator[pb.StepRequest], context: Any) -> AsyncIterator[pb.StepResult]:
        last = 0
        async for step in requests:
            assert step.step_id == last + 1
            last = step.step_id
            if self.step_s:
                await asyncio.sleep(self.step_s)
            if self.gate is not None:
                await self.gate.wait()
            yield self.run(step)

    async def Prefill(self, request: pb.PrefillRequest, context: Any) -> pb.StepResult:
        return await self._run_alone(
            pb.StepRequest(epoch=request.epoch, step_id=request.step_id, prefill=request.prefill)
        )

    async def Decode(self, request: pb.DecodeRequest, context: Any) -> pb.StepResult:
        return await self._run_alone(
            pb.StepRequest(epoch=request.epoch, step_id=request.step_id, decode=request.decode, drops=request.drops)
        )

    async def _run_alone(self, step: pb.StepRequest) -> pb.StepResult:
        if step.epoch == self.epoch:
            assert step.step_id == self.last_unary_step + 1
            self.last_unary_step = step.step_id
        if self.gate is not None:
            await self.gate.wait()
        return self.run(step)

    def run(self, step: pb.StepRequest) -> pb.StepResult:
        self.num_steps += 1
        result = pb.StepResult(epoch=step.epoch, step_id=step.step_id)
        if step.epoch != self.epoch or self.epoch == self.epoch_failed or self.fail_steps:
            self.fail_steps = max(self.fail_steps - 1, 0)
            return self._refuse(result)
        for sequence_id in step.drops:
            self.sequences.pop(sequence_id, None)
        has_too_many = self.most_rows is not None and len(step.decode.sequence_ids) > self.most_rows
        if has_too_many or self._crashes(step):
            return self._refuse(result)
        for new in step.prefill.new_sequences:
            assert new.num_cached_tokens < len(new.token_ids)
            self.sequences[new.sequence_id] = EchoSequence(
                new, list(new.token_ids), list(new.blocks), new.num_cached_tokens
            )
        for chunk in step.prefill.chunks:
            self._prefill(chunk, result)
        for addition in step.decode.additions:
            self.sequences[addition.sequence_id].blocks += addition.blocks
        for sequence_id in step.decode.sequence_ids:
            sequence = self.sequences[sequence_id]
            if sequence.failed:
                continue
            assert sequence.num_computed >= len(sequence.new.token_ids)
            self._compute(sequence, 1)
            self._yield_token(sequence, result)
        result.timings.num_prefill_tokens = sum(chunk.num_tokens for chunk in step.prefill.chunks)
        result.timings.num_decode_rows = len(step.decode.sequence_ids)
        if self.rank:
            del result.generations[:]
        return result

    def _crashes(self, step: pb.StepRequest) -> bool:
        prompts = {new.sequence_id: new.token_ids for new in step.prefill.new_sequences}
        prompts |= {sequence_id: sequence.new.token_ids for sequence_id, sequence in self.sequences.items()}
        rows = [*step.decode.sequence_ids, *(chunk.sequence_id for chunk in step.prefill.chunks)]
        return any(self.crash_token in prompts[sequence_id] for sequence_id in rows)

    def _refuse(self, result: pb.StepResult) -> pb.StepResult:
        self.epoch_failed = result.epoch
        result.failure.message = "made to fail"
        result.failure.out_of_memory = self.out_of_memory
        return result

    def _prefill(self, chunk: pb.Chunk, result: pb.StepResult) -> None:
        sequence = self.sequences[chunk.sequence_id]
        first = sequence.num_computed
        sequence.blocks += chunk.new_blocks
        self._compute(sequence, chunk.num_tokens)
        assert sequence.num_computed <= len(sequence.new.token_ids)
        if self.poisoned_token in sequence.new.token_ids:
            result.failures.add(sequence_id=chunk.sequence_id, message="poisoned")
            sequence.failed = True
            return
        if sequence.num_computed == len(sequence.new.token_ids):
            sequence.num_outputs = len(sequence.new.token_ids) - sequence.new.num_prompt_tokens
            generation = self._yield_token(sequence, result)
        elif sequence.new.prefill_logprobs:
            generation = result.generations.add(sequence_id=chunk.sequence_id)
        else:
            return
        if sequence.new.prefill_logprobs:
            generation.prefill.first_position = first
            generation.prefill.logprobs.extend(
                float("nan") if i == 0 else -float(i) for i in range(first, sequence.num_computed)
            )

    def _compute(self, sequence: EchoSequence, num_tokens: int) -> None:
        ids, size = sequence.token_ids, self.block_size
        slots = [block * size + place for block in sequence.blocks for place in range(size)]
        before, stop = sequence.num_computed, sequence.num_computed + num_tokens
        assert stop <= len(slots), "a token without a slot"
        assert all(0 < block <= self.num_blocks for block in sequence.blocks)
        for position in range(before):
            assert self.kv.get(slots[position]) == tuple(ids[: position + 1]), "another's keys and values"
        for position in range(before, stop):
            self.kv[slots[position]] = tuple(ids[: position + 1])
        sequence.num_computed = stop

    def _yield_token(self, sequence: EchoSequence, result: pb.StepResult) -> pb.Generation:
        new = sequence.new
        token_id = new.token_ids[sequence.num_outputs % new.num_prompt_tokens]
        generation = result.generations.add(
            sequence_id=new.sequence_id, first_output_index=sequence.num_outputs, token_ids=[token_id], logprobs=[-0.5]
        )
        if new.top_n_tokens:
            ids = range(token_id, token_id + new.top_n_tokens)
            generation.top_tokens.add(ids=ids, logprobs=[-0.5 - i for i in range(len(ids))])
        sequence.num_outputs += 1
        sequence.token_ids.append(token_id)
        return generation


@contextlib.asynccontextmanager
async def serve_fake_shards(folder: Path, *shards: FakeShard) -> AsyncIterator[str]:
    """Serve a rank group on unix sockets in ``folder``; gives the socket path of rank 0."""
    urls = tuple(f"unix://{folder}/shard-{rank}" for rank in range(len(shards)))
    servers = []
    for rank, (url, shard) in enumerate(zip(urls, shards, strict=True)):
        shard.rank, shard.urls = rank, urls
        server = grpc.aio.server()
        add_TextGenerationServicer_to_server(shard, server)  # type: ignore[no-untyped-call]
        server.add_insecure_port(url)
        await server.start()
        servers.append(server)
    try:
        yield f"{folder}/shard-0"
    finally:
        await asyncio.gather(*(server.stop(0) for server in servers))
