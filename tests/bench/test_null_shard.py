"""`bench.null_shard` answers steps as the contract says."""

from typing import Any, cast

import grpc.aio
import pytest
from bench.null_shard import NullShard
from text_generation_proto.v1 import generate_pb2 as pb


def new(sequence_id: int, num_tokens: int, **fields: int) -> pb.NewSequence:
    return pb.NewSequence(
        sequence_id=sequence_id,
        token_ids=range(1, num_tokens + 1),
        num_prompt_tokens=fields.pop("num_prompt_tokens", num_tokens),
        num_cached_tokens=fields.pop("num_cached_tokens", 0),
    )


def prefill(*sequences: pb.NewSequence, **chunks: int) -> pb.Prefill:
    parts = [pb.Chunk(sequence_id=int(name[1:]), num_tokens=count) for name, count in chunks.items()]
    return pb.Prefill(new_sequences=sequences, chunks=parts)


def indices(result: pb.StepResult) -> dict[int, int]:
    return dict(zip(result.tokens.sequence_ids, result.tokens.output_indices, strict=True))


async def begin(shard: NullShard, epoch: int) -> None:
    await shard.ClearCache(pb.ClearCacheRequest(epoch=epoch), cast("grpc.aio.ServicerContext[Any, Any]", None))


@pytest.fixture
async def shard() -> NullShard:
    shard = NullShard(pb.InfoResponse(vocab_size=1000), num_blocks=8)
    await begin(shard, epoch=1)
    return shard


async def test_a_token_comes_with_the_last_chunk_and_with_every_decode_row(shard: NullShard) -> None:
    steps = [
        pb.StepRequest(epoch=1, step_id=1, prefill=prefill(new(5, 10), s5=6)),
        pb.StepRequest(epoch=1, step_id=2, prefill=prefill(new(6, 3), s5=4, s6=3)),
        pb.StepRequest(epoch=1, step_id=3, decode=pb.Decode(sequence_ids=[5, 6])),
    ]
    assert [indices(shard.step(step)) for step in steps] == [{}, {5: 0, 6: 0}, {5: 1, 6: 1}]


async def test_cached_tokens_need_no_chunk_and_a_replay_goes_on(shard: NullShard) -> None:
    replayed = new(7, 12, num_prompt_tokens=9, num_cached_tokens=8)
    result = shard.step(pb.StepRequest(epoch=1, step_id=1, prefill=prefill(replayed, s7=4)))
    assert indices(result) == {7: 3}


async def test_a_dropped_sequence_is_gone(shard: NullShard) -> None:
    shard.step(pb.StepRequest(epoch=1, step_id=1, prefill=prefill(new(5, 2), s5=2)))
    result = shard.step(pb.StepRequest(epoch=1, step_id=2, drops=[5, 99], decode=pb.Decode(sequence_ids=[5])))
    assert indices(result) == {}


async def test_an_old_epoch_is_refused(shard: NullShard) -> None:
    await begin(shard, epoch=2)
    assert shard.step(pb.StepRequest(epoch=1, step_id=1)).HasField("failure")


async def test_ids_lie_in_the_vocabulary(shard: NullShard) -> None:
    shard.step(pb.StepRequest(epoch=1, step_id=1, prefill=prefill(new(5, 2), s5=2)))
    steps = (pb.StepRequest(epoch=1, step_id=i, decode=pb.Decode(sequence_ids=[5])) for i in range(2, 2000))
    assert all(300 <= token_id < 1000 for step in steps for token_id in shard.step(step).tokens.token_ids)
