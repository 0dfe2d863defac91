"""A shard without a model: answers every step at once. What is left to measure is the router.

    python tests/bench/null_shard.py --model DIR --uds-path PATH

Speaks the whole contract for one rank on the socket `PATH-0`; needs tokenizer.json and config.json of the model.
"""

import argparse
import json
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import grpc.aio
import uvloop
from text_generation_proto.v1 import generate_pb2 as pb
from text_generation_proto.v1 import generate_pb2_grpc as pb_grpc

BLOCK_SIZE = 16
FIRST_ID = 300
"""Above the special tokens and single bytes: every emitted id is a piece of text by itself."""

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


@dataclass(slots=True)
class NullSequence:
    to_compute: int
    """Prompt tokens that no chunk has covered yet."""
    output_index: int


class NullShard(pb_grpc.TextGenerationServicer):
    """Token ids count upwards, from another start in every sequence. Never ends a sequence by EOS."""

    def __init__(self, info: pb.InfoResponse, num_blocks: int) -> None:
        self._info = info
        self._num_blocks = num_blocks
        self._sequences: dict[int, NullSequence] = {}
        self._epoch = 0
        self._last_step_id = 0
        self._started_ns = time.time_ns()

    async def Info(self, request: pb.InfoRequest, context: Context) -> pb.InfoResponse:
        return self._info

    async def Health(self, request: pb.HealthRequest, context: Context) -> pb.HealthResponse:
        return pb.HealthResponse(
            incarnation=self._info.incarnation,
            epoch=self._epoch,
            last_step_id=self._last_step_id,
            num_sequences=len(self._sequences),
            started_ns=self._started_ns,
        )

    async def Warmup(self, request: pb.WarmupRequest, context: Context) -> pb.WarmupResponse:
        asked = request.max_batch_total_tokens // BLOCK_SIZE
        return pb.WarmupResponse(num_blocks=asked or self._num_blocks, derivation="a null shard computes nothing")

    async def ClearCache(self, request: pb.ClearCacheRequest, context: Context) -> pb.ClearCacheResponse:
        self._sequences.clear()
        self._epoch = request.epoch
        return pb.ClearCacheResponse()

    async def Steps(self, requests: AsyncIterator[pb.StepRequest], context: Context) -> AsyncIterator[pb.StepResult]:
        async for request in requests:
            yield self.step(request)

    async def Prefill(self, request: pb.PrefillRequest, context: Context) -> pb.StepResult:
        return self.step(pb.StepRequest(epoch=request.epoch, step_id=request.step_id, prefill=request.prefill))

    async def Decode(self, request: pb.DecodeRequest, context: Context) -> pb.StepResult:
        step = pb.StepRequest(epoch=request.epoch, step_id=request.step_id, decode=request.decode, drops=request.drops)
        return self.step(step)

    def step(self, request: pb.StepRequest) -> pb.StepResult:
        if request.epoch != self._epoch:
            failure = pb.StepFailure(message=f"epoch {request.epoch} is over, this is {self._epoch}")
            return pb.StepResult(epoch=request.epoch, step_id=request.step_id, failure=failure)
        self._last_step_id = request.step_id
        for sequence_id in request.drops:
            self._sequences.pop(sequence_id, None)
        advancing = [*request.decode.sequence_ids, *self._prefill(request.prefill)]
        tokens = self._generate([sequence_id for sequence_id in advancing if sequence_id in self._sequences])
        timings = pb.Timings(forward_ns=1, sample_ns=1, total_ns=2, num_decode_rows=len(request.decode.sequence_ids))
        return pb.StepResult(epoch=request.epoch, step_id=request.step_id, tokens=tokens, timings=timings)

    def _prefill(self, prefill: pb.Prefill) -> list[int]:
        """The sequences whose prompt is complete with this step."""
        for new in prefill.new_sequences:
            self._sequences[new.sequence_id] = NullSequence(
                to_compute=len(new.token_ids) - new.num_cached_tokens,
                output_index=len(new.token_ids) - new.num_prompt_tokens,
            )
        complete = []
        for chunk in prefill.chunks:
            sequence = self._sequences[chunk.sequence_id]
            sequence.to_compute -= chunk.num_tokens
            if sequence.to_compute <= 0:
                complete.append(chunk.sequence_id)
        return complete

    def _generate(self, sequence_ids: list[int]) -> pb.Tokens:
        """The next token of each, as a shard reports them."""
        indices = [self._sequences[sequence_id].output_index for sequence_id in sequence_ids]
        for sequence_id in sequence_ids:
            self._sequences[sequence_id].output_index += 1
        num_ids = self._info.vocab_size - FIRST_ID
        pairs = zip(sequence_ids, indices, strict=True)
        return pb.Tokens(
            sequence_ids=sequence_ids,
            output_indices=indices,
            token_ids=[FIRST_ID + (sequence_id * 997 + index) % num_ids for sequence_id, index in pairs],
            logprobs=[-1.5] * len(sequence_ids),
        )


def describe(model: Path, socket: str, nonce: str) -> pb.InfoResponse:
    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    return pb.InfoResponse(
        launcher_nonce=nonce,
        incarnation=1,
        rank=0,
        world_size=1,
        urls=[f"unix://{socket}"],
        model_id=str(model),
        model_type=config["model_type"],
        dtype="bfloat16",
        device_type="cpu",
        attention_impl="null",
        block_size=BLOCK_SIZE,
        tokenizer_path=str(model),
        eos_token_ids=[],
        vocab_size=config["vocab_size"],
        max_position_embeddings=config["max_position_embeddings"],
    )


async def serve(info: pb.InfoResponse, num_blocks: int) -> None:
    server = grpc.aio.server(options=[("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)])
    pb_grpc.add_TextGenerationServicer_to_server(NullShard(info, num_blocks), server)  # type: ignore[no-untyped-call]
    server.add_insecure_port(info.urls[0])
    await server.start()
    print(f"null shard on {info.urls[0]}", file=sys.stderr)
    await server.wait_for_termination()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--uds-path", type=Path, required=True)
    parser.add_argument("--num-blocks", type=int, default=65_536)
    parser.add_argument("--nonce", default="")
    arguments = parser.parse_args()
    info = describe(arguments.model.absolute(), f"{arguments.uds_path.absolute()}-0", arguments.nonce)
    uvloop.run(serve(info, arguments.num_blocks))


if __name__ == "__main__":
    main()
