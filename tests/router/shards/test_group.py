from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from fake_shard import FakeShard, serve_fake_shards
from text_generation_proto.v1 import generate_pb2 as pb
from text_generation_router.config import ConfigError
from text_generation_router.shards.convert import StepResult
from text_generation_router.shards.group import GroupFailure, ShardUnreachable, connect


async def test_connect_learns_of_all_ranks(tmp_path: Path) -> None:
    async with serve_fake_shards(tmp_path, FakeShard(), FakeShard()) as path:
        group = await connect(path, "nonce", timeout_s=5)
        assert len(group._clients) == 2
        await group.close()


async def test_a_shard_of_another_launcher_is_refused(tmp_path: Path) -> None:
    async with serve_fake_shards(tmp_path, FakeShard(), FakeShard(nonce="other")) as path:
        with pytest.raises(ConfigError, match="belongs to another launcher"):
            await connect(path, "nonce", timeout_s=5)


async def test_no_shard_is_an_error_and_no_hang(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Unable to connect to the Python model shards"):
        await connect(f"{tmp_path}/nobody", "nonce", timeout_s=0.2)


async def test_connect_waits_for_a_shard_that_is_still_loading(tmp_path: Path) -> None:
    connecting = asyncio.create_task(connect(f"{tmp_path}/shard-0", "nonce", timeout_s=20))
    await asyncio.sleep(0.3)
    async with serve_fake_shards(tmp_path, FakeShard()):
        await (await connecting).close()


async def test_a_step_is_done_when_every_rank_has_acknowledged_it(tmp_path: Path) -> None:
    slow = FakeShard(step_s=0.3)
    async with serve_fake_shards(tmp_path, FakeShard(), slow) as path:
        group = await connect(path, "nonce", timeout_s=5)
        results: asyncio.Queue[StepResult] = asyncio.Queue()
        group.on_result = results.put_nowait
        await group.reset()
        step = pb.StepRequest()
        step.prefill.new_sequences.add(sequence_id=1, token_ids=[5, 6], num_prompt_tokens=2, blocks=[1])
        step.prefill.chunks.add(sequence_id=1, num_tokens=2)
        assert await group.send(step) == 1
        assert group.num_in_flight == 1
        assert group.ready()
        result = await results.get()
        assert slow.num_steps == 1
        assert result.generations[0].token_ids == [5]
        assert group.num_in_flight == 0
        await group.close()


async def test_a_refused_step_is_reported_once_and_reset_helps(tmp_path: Path) -> None:
    shard = FakeShard(fail_steps=1)
    async with serve_fake_shards(tmp_path, shard) as path:
        group = await connect(path, "nonce", timeout_s=5)
        failures: asyncio.Queue[GroupFailure] = asyncio.Queue()
        group.on_failure = failures.put_nowait
        await group.reset()
        await group.send(pb.StepRequest())
        assert await failures.get() == GroupFailure("made to fail", is_lost=False, step_id=1)
        assert not group.ready()
        await group.reset()
        assert group.ready()
        assert shard.epoch == 2
        await group.close()


async def test_a_reset_goes_on_behind_the_epochs_of_others(tmp_path: Path) -> None:
    shard = FakeShard(epoch=7)
    async with serve_fake_shards(tmp_path, shard) as path:
        group = await connect(path, "nonce", timeout_s=5)
        await group.reset()
        assert shard.epoch == group.epoch == 8
        await group.close()


async def test_a_shard_that_goes_away_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failures: asyncio.Queue[GroupFailure] = asyncio.Queue()
    async with serve_fake_shards(tmp_path, FakeShard()) as path:
        group = await connect(path, "nonce", timeout_s=5)
        group.on_failure = failures.put_nowait
        await group.reset()
    assert await asyncio.wait_for(failures.get(), 10)
    assert not group.ready()
    monkeypatch.setattr("text_generation_router.shards.group._RESET_TIMEOUT_S", 0.2)
    with pytest.raises(ShardUnreachable):
        await group.reset()
    await group.close()


@pytest.mark.parametrize(
    ("ages_s", "hangs"),
    [
        pytest.param((0.1, 0.1), False, id="a long step that goes on is no hang"),
        pytest.param((0.1, 0.0), False, id="one rank has ended the step"),
        pytest.param((0.1, 9.0), True, id="one rank stands still"),
        pytest.param((0.0, 0.0), True, id="the step never began"),
    ],
)
async def test_shards_that_hang_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ages_s: tuple[float, float], hangs: bool
) -> None:
    monkeypatch.setattr("text_generation_router.shards.group._WATCH_EVERY_S", 0.1)
    gate = asyncio.Event()
    shards = [FakeShard(progress_age_s=age, gate=gate) for age in ages_s]
    async with serve_fake_shards(tmp_path, *shards) as path:
        group = await connect(path, "nonce", timeout_s=5, stall_timeout_s=0.5)
        outcomes: asyncio.Queue[StepResult | GroupFailure] = asyncio.Queue()
        group.on_failure = outcomes.put_nowait
        group.on_result = outcomes.put_nowait
        await group.reset()
        watching = asyncio.create_task(group.watch())
        await group.send(pb.StepRequest())
        if not hangs:
            await asyncio.sleep(1)
            assert outcomes.empty()
            gate.set()
        outcome = await asyncio.wait_for(outcomes.get(), 10)
        assert (outcome == GroupFailure("a shard hangs", is_lost=True)) is hangs
        assert group.ready() is not hangs
        gate.set()
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await group.close()


async def test_a_result_that_cannot_be_read_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(result: pb.StepResult) -> StepResult:
        raise ValueError("made up")

    monkeypatch.setattr("text_generation_router.shards.group.step_result", unreadable)
    async with serve_fake_shards(tmp_path, FakeShard()) as path:
        group = await connect(path, "nonce", timeout_s=5)
        failures: asyncio.Queue[GroupFailure] = asyncio.Queue()
        group.on_failure = failures.put_nowait
        await group.reset()
        await group.send(pb.StepRequest())
        assert await asyncio.wait_for(failures.get(), 10) == GroupFailure("a shard was lost", is_lost=True)
        assert not group.ready()
        await group.close()
