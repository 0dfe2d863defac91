"""The service over real gRPC on a real unix socket; only the model is a fake."""

from __future__ import annotations

import asyncio
import os
import stat
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from engine_driver import NUM_BLOCKS, oracle_tokens, prompt
from fake_runner import BLOCK_SIZE, NAN_TOKEN, FakeRunner
from text_generation_proto.v1 import generate_pb2 as pb
from text_generation_proto.v1 import generate_pb2_grpc as pb_grpc
from text_generation_server.config import ConfigError
from text_generation_server.engine.engine import Engine, compute_thread
from text_generation_server.engine.memory import DoesNotFit, KVPlan, WarmupLimits
from text_generation_server.model.runner import ModelRunner
from text_generation_server.rpc.server import Listener, listen, own
from text_generation_server.rpc.service import MAX_OUTSTANDING_STEPS, TextGenerationService

GREEDY = pb.SamplingParameters(temperature=1, top_p=1, typical_p=1, repetition_penalty=1)


class Shard:
    """A served engine and a client of it."""

    def __init__(self, runner: FakeRunner, engine: Engine, listener: Listener, channel: grpc.aio.Channel) -> None:
        self.runner, self.engine, self.listener = runner, engine, listener
        self.stub = pb_grpc.TextGenerationStub(channel)  # type: ignore[no-untyped-call]


def plan(runner: ModelRunner, limits: WarmupLimits) -> KVPlan:
    if limits.max_batch_total_tokens > NUM_BLOCKS * BLOCK_SIZE:
        raise DoesNotFit("`--max-batch-total-tokens` is too much")
    return KVPlan(num_blocks=NUM_BLOCKS, derivation="fixed")


@pytest.fixture
async def shard(tmp_path: Path) -> AsyncIterator[Shard]:
    runner = FakeRunner()
    engine = Engine(runner, plan, block_size=BLOCK_SIZE, compute=compute_thread(1))
    engine.start()
    info = pb.InfoResponse(launcher_nonce="n", incarnation=3, model_id="fake")
    listener = await listen(TextGenerationService(engine, info), tmp_path / "shard-0")
    async with grpc.aio.insecure_channel(listener.url) as channel:
        made = Shard(runner, engine, listener, channel)
        await made.stub.Warmup(pb.WarmupRequest())
        yield made
    await listener.close()
    assert engine.stop(10)


def new(sequence_id: int, token_ids: list[int], sampling: pb.SamplingParameters = GREEDY) -> pb.NewSequence:
    return pb.NewSequence(
        sequence_id=sequence_id,
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids),
        blocks=range(1 + 8 * sequence_id, 9 + 8 * sequence_id),
        sampling=sampling,
    )


def prefill(step_id: int, sequence: pb.NewSequence, epoch: int = 0) -> pb.StepRequest:
    chunk = pb.Chunk(sequence_id=sequence.sequence_id, num_tokens=len(sequence.token_ids))
    return pb.StepRequest(epoch=epoch, step_id=step_id, prefill=pb.Prefill(new_sequences=[sequence], chunks=[chunk]))


def decode(step_id: int, *ids: int, epoch: int = 0) -> pb.StepRequest:
    return pb.StepRequest(epoch=epoch, step_id=step_id, decode=pb.Decode(sequence_ids=ids))


async def test_a_stream_answers_every_step_in_order(shard: Shard) -> None:
    call = shard.stub.Steps()
    for request in (prefill(1, new(1, prompt(1, 5))), decode(2, 1)):
        await call.write(request)
    found: list[int] = []
    for step_id in range(1, 7):
        result = await call.read()
        assert result.step_id == step_id and not result.HasField("failure")
        found += result.tokens.token_ids
        if step_id < 5:
            await call.write(decode(step_id + 2, 1))
        elif step_id == 5:
            await call.done_writing()
    assert found == oracle_tokens(prompt(1, 5), 6)
    assert await call.read() is grpc.aio.EOF
    health = await shard.stub.Health(pb.HealthRequest())
    assert (health.incarnation, health.last_step_id, health.last_progress_ns, health.num_sequences) == (3, 6, 0, 1)
    assert 0 < health.started_ns <= time.time_ns()


async def test_prefill_and_decode_do_what_a_step_does(shard: Shard) -> None:
    request = prefill(1, new(1, prompt(1, 5)))
    first = await shard.stub.Prefill(pb.PrefillRequest(step_id=1, prefill=request.prefill))
    second = await shard.stub.Decode(pb.DecodeRequest(step_id=2, decode=pb.Decode(sequence_ids=[1])))
    assert [*first.tokens.token_ids, *second.tokens.token_ids] == oracle_tokens(prompt(1, 5), 2)
    third = await shard.stub.Decode(pb.DecodeRequest(step_id=3, drops=[1]))
    assert not (third.generations or third.HasField("tokens") or third.HasField("failure"))


async def test_failures_say_which_sequence_or_why_the_step(shard: Shard) -> None:
    call = shard.stub.Steps()
    await call.write(prefill(1, new(1, [5, NAN_TOKEN])))
    result = await call.read()
    assert [(failure.sequence_id, failure.message) for failure in result.failures] == [
        (1, "the model's logits were not finite")
    ]
    await call.write(prefill(2, new(2, [5], pb.SamplingParameters(temperature=-1))))
    await call.write(decode(3, 2))
    result = await call.read()
    assert result.failure.message == "sequence 2: temperature must be a positive number, got -1.0"
    assert "ended with a failed step" in (await call.read()).failure.message
    await shard.stub.ClearCache(pb.ClearCacheRequest(epoch=1))
    await call.write(prefill(1, new(1, prompt(1, 3)), epoch=1))
    assert len((await call.read()).tokens.token_ids) == 1
    call.cancel()


async def test_a_client_may_leave_and_another_begin(shard: Shard) -> None:
    call = shard.stub.Steps()
    await call.write(prefill(1, new(1, prompt(1, 5))))
    await call.write(decode(2, 1))
    call.cancel()
    await shard.stub.ClearCache(pb.ClearCacheRequest(epoch=7))
    again = shard.stub.Steps()
    await again.write(prefill(1, new(1, prompt(1, 5)), epoch=7))
    result = await again.read()
    assert list(result.tokens.token_ids) == oracle_tokens(prompt(1, 5), 1)
    again.cancel()


async def test_a_reset_that_was_given_up_is_tried_again(shard: Shard) -> None:
    shard.runner.gate = threading.Event()
    call = shard.stub.Steps()
    await call.write(prefill(1, new(1, prompt(1, 5))))
    await asyncio.to_thread(shard.runner.entered.wait, 10)
    for given_up in (
        shard.stub.ClearCache(pb.ClearCacheRequest(epoch=1), timeout=0.05),
        shard.stub.ClearCache(pb.ClearCacheRequest(epoch=2), timeout=0.05),
        shard.stub.Warmup(pb.WarmupRequest(max_batch_size=1), timeout=0.05),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await given_up
        assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    call.cancel()
    shard.runner.gate.set()
    await shard.stub.ClearCache(pb.ClearCacheRequest(epoch=3), timeout=10)
    again = shard.stub.Steps()
    await again.write(prefill(1, new(1, prompt(1, 5)), epoch=3))
    result = await again.read()
    assert list(result.tokens.token_ids) == oracle_tokens(prompt(1, 5), 1)
    again.cancel()


async def test_health_is_answered_while_a_step_runs(shard: Shard) -> None:
    shard.runner.gate = threading.Event()
    call = shard.stub.Steps()
    await call.write(prefill(1, new(1, prompt(1, 5))))
    await asyncio.to_thread(shard.runner.entered.wait, 10)
    await asyncio.sleep(0.02)
    asked = time.monotonic()
    health = await shard.stub.Health(pb.HealthRequest())
    assert time.monotonic() - asked < 0.5
    assert health.last_progress_ns > 10_000_000
    shard.runner.gate.set()
    assert not (await call.read()).HasField("failure")
    call.cancel()


async def test_a_peer_that_sends_too_much_waits(shard: Shard) -> None:
    shard.runner.gate = threading.Event()

    async def flood() -> AsyncIterator[pb.StepRequest]:
        yield prefill(1, new(1, prompt(1, 5)))
        for step_id in range(2, 20):
            yield decode(step_id, 1)

    call = shard.stub.Steps(flood())
    await asyncio.sleep(0.1)
    assert shard.engine._jobs.qsize() == MAX_OUTSTANDING_STEPS - 1, "one is executed, the others are queued"
    shard.runner.gate.set()
    assert [result.step_id async for result in call] == list(range(1, 20))


async def test_what_cannot_be_is_refused_with_a_status(shard: Shard) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await shard.stub.Warmup(pb.WarmupRequest(max_batch_total_tokens=1_000_000))
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "--max-batch-total-tokens" in (refused.value.details() or "")
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await shard.stub.ClearCache(pb.ClearCacheRequest(epoch=0))
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION


@pytest.mark.parametrize("method", ["Steps", "Prefill", "Warmup", "ClearCache"])
async def test_random_bytes_do_no_harm(shard: Shard, method: str) -> None:
    noise = [os.urandom(size) for size in (1, 7, 100, 5000)] + [b"\x80\x04\x95", b""]
    async with grpc.aio.insecure_channel(shard.listener.url) as channel:
        path = f"/text_generation.v1.TextGeneration/{method}"
        for data in noise:
            call = _stream(channel, path, data) if method == "Steps" else _unary(channel, path, data)
            (outcome,) = await asyncio.gather(call, return_exceptions=True)
            assert isinstance(outcome, bytes | grpc.aio.AioRpcError | type(grpc.aio.EOF))
    assert (await shard.stub.Info(pb.InfoRequest())).model_id == "fake"


async def _unary(channel: grpc.aio.Channel, path: str, data: bytes) -> object:
    callable_: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(path)
    return await callable_(data)


async def _stream(channel: grpc.aio.Channel, path: str, data: bytes) -> object:
    callable_: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(path)
    call = callable_()
    await call.write(data)
    await call.done_writing()
    return await call.read()


async def test_the_socket_is_private_and_has_one_owner(shard: Shard) -> None:
    path = shard.listener.path
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(ConfigError, match="belongs to another running server"):
        await listen(TextGenerationService(shard.engine, pb.InfoResponse()), path)
    assert (await shard.stub.Info(pb.InfoRequest())).model_id == "fake"


async def test_a_socket_left_over_is_replaced_and_nothing_is_left_behind(tmp_path: Path) -> None:
    path = tmp_path / "shard-0"
    path.write_text("left over")
    engine = Engine(FakeRunner(), plan, block_size=BLOCK_SIZE)
    listener = await listen(TextGenerationService(engine, pb.InfoResponse(model_id="x")), path)
    async with grpc.aio.insecure_channel(listener.url) as channel:
        stub = pb_grpc.TextGenerationStub(channel)  # type: ignore[no-untyped-call]
        assert (await stub.Info(pb.InfoRequest())).model_id == "x"
    await listener.close()
    assert os.listdir(tmp_path) == []


def test_a_path_that_cannot_be_made_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="choose another --uds-path"):
        own(tmp_path / "missing" / "shard-0")
