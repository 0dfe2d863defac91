"""The shard driver against shards that check the contract."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_shard import FakeShard, serve_fake_shards
from text_generation_launcher.benchmark import shard_target
from text_generation_launcher.benchmark.config import Flags, Sampling, ShardAddress, resolve
from text_generation_launcher.benchmark.errors import BenchmarkError
from text_generation_launcher.benchmark.shard_target import ShardTarget, find_socket, sampling_parameters
from text_generation_proto.v1 import generate_pb2 as pb


def nothing() -> None:
    pass


async def opened(path: str, **flags: Any) -> ShardTarget:
    return await ShardTarget.open(resolve(Flags(**flags)), ShardAddress(socket=Path(path)))


def alone(folder: Path, **knobs: Any) -> FakeShard:
    return FakeShard(nonce="", tokenizer_path=str(folder), **knobs)


async def test_a_run_is_a_prefill_and_decode_steps(tmp_path: Path, tokenizer_folder: Path) -> None:
    shard = alone(tokenizer_folder, epoch=4)
    pauses = []
    async with serve_fake_shards(tmp_path, shard) as path:
        target = await opened(path, sequence_length=6, decode_length=4, batch_size=[3])
        assert shard.epoch == 5
        [warmup] = shard.warmups
        assert (warmup.max_batch_size, warmup.max_batch_prefill_tokens, warmup.max_total_tokens) == (3, 18, 10)
        assert warmup.max_batch_total_tokens == 3 * 3 * shard.block_size
        for _ in range(2):
            run = await target.run(3, lambda: pauses.append(1))
            assert shard.sequences == {}, "a run leaves nothing behind"
        assert shard.num_steps == 2 * (1 + 3 + 1)
        assert (len(run.prefill_s), len(run.token_s), len(run.decode_s)) == (1, 3, 1)
        assert run.decode_s[0] == sum(run.token_s) == run.decode_wall_s
        assert (run.prompt_tokens, run.decode_tokens) == (18, 9)
        assert len(pauses) == 6
        await target.close()
        assert shard.epoch == 6
    assert target.description.model == "fake/echo"
    assert target.description.notes == ()


async def test_every_rank_gets_every_step(tmp_path: Path, tokenizer_folder: Path) -> None:
    shards = [alone(tokenizer_folder), alone(tokenizer_folder, epoch=2)]
    async with serve_fake_shards(tmp_path, *shards) as path:
        target = await opened(path, batch_size=[2])
        await target.run(2, nothing)
        assert [shard.num_steps for shard in shards] == [9, 9]
        assert [shard.epoch for shard in shards] == [3, 3]
        await target.close()
        assert target.description.details["Shards"] == "2 shards"
        with pytest.raises(BenchmarkError, match="is rank 1 of a group"):
            await opened(path.removesuffix("0") + "1")


async def test_sampling_reaches_the_shard(tmp_path: Path, tokenizer_folder: Path) -> None:
    shard = alone(tokenizer_folder)
    seen: list[pb.StepRequest] = []
    run = shard.run

    def record(step: pb.StepRequest) -> pb.StepResult:
        seen.append(step)
        return run(step)

    shard.run = record  # type: ignore[method-assign]
    async with serve_fake_shards(tmp_path, shard) as path:
        target = await opened(path, top_p=0.5, temperature=0.25, top_n_tokens=3, batch_size=[1])
        await target.run(1, nothing)
        await target.close()
    [new] = seen[0].prefill.new_sequences
    assert (new.sampling.top_p, new.sampling.temperature, new.sampling.do_sample) == (0.5, 0.25, True)
    assert new.top_n_tokens == 3


def test_what_was_not_given_is_neutral() -> None:
    neutral = sampling_parameters(Sampling(), seed=3)
    assert (neutral.temperature, neutral.top_k, neutral.top_p, neutral.typical_p) == (1, 0, 1, 1)
    assert (neutral.repetition_penalty, neutral.frequency_penalty, neutral.do_sample, neutral.seed) == (1, 0, False, 3)


async def test_the_cache_of_a_launched_server_stays_as_it_is(tmp_path: Path, tokenizer_folder: Path) -> None:
    shard = FakeShard(tokenizer_path=str(tokenizer_folder), num_blocks=8)
    async with serve_fake_shards(tmp_path, shard) as path:
        with pytest.raises(BenchmarkError, match="is still starting"):
            await opened(path, batch_size=[1])
        shard.warmups.append(None)  # type: ignore[arg-type]  # its router has been there
        target = await opened(path, batch_size=[1], sequence_length=10, decode_length=8)
        assert "belongs to a launched server" in target.description.notes[0]
        await target.run(1, nothing)
        await target.close()
        assert len(shard.warmups) == 1
        with pytest.raises(BenchmarkError, match="needs 10 blocks of KV cache, this server has 8: choose a smaller"):
            await opened(path, batch_size=[2], sequence_length=10, decode_length=8)
        shard.sequences[1] = None  # type: ignore[assignment]
        with pytest.raises(BenchmarkError, match="at work on 1 sequences of others"):
            await opened(path, batch_size=[1])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        pytest.param({"sequence_length": 510}, "the model has 512 positions", id="too long"),
        pytest.param({"top_n_tokens": 600}, "exceeds the vocabulary of 512", id="more tops than tokens"),
        pytest.param(
            {"batch_size": [2**30], "sequence_length": 400}, "does not fit: choose a smaller", id="a wild batch"
        ),
        pytest.param({"tokenizer_name": "/nowhere"}, "`--tokenizer-name /nowhere` does not exist", id="no tokenizer"),
    ],
)
async def test_what_cannot_be_measured_is_refused_first(
    tmp_path: Path, tokenizer_folder: Path, flags: dict[str, Any], message: str
) -> None:
    shard = alone(tokenizer_folder)
    async with serve_fake_shards(tmp_path, shard) as path:
        with pytest.raises(BenchmarkError, match=message):
            await opened(path, **flags)
    assert shard.num_steps == 0


async def test_failures_of_steps_and_sequences(tmp_path: Path, tokenizer_folder: Path) -> None:
    shard = alone(tokenizer_folder)
    async with serve_fake_shards(tmp_path, shard) as path:
        target = await opened(path, batch_size=[1])
        shard.fail_steps = 1
        with pytest.raises(BenchmarkError, match="a step failed on the shard: made to fail"):
            await target.run(1, nothing)
        await target.close()
        target = await opened(path, batch_size=[1])
        shard.poisoned_token = target._ids[0]
        with pytest.raises(BenchmarkError, match="a sequence failed on the shard: poisoned"):
            await target.run(1, nothing)
        await target.close()


async def test_a_shard_that_goes_away_is_an_error(tmp_path: Path, tokenizer_folder: Path) -> None:
    async with serve_fake_shards(tmp_path, alone(tokenizer_folder)) as path:
        target = await opened(path, batch_size=[1])
    with pytest.raises(BenchmarkError, match="cannot be reached"):
        await target.run(1, nothing)
    await target.close()


def test_a_socket_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(BenchmarkError, match="is not a socket"):
        find_socket(file)
    with pytest.raises(BenchmarkError, match="there is no socket"):
        find_socket(tmp_path / "absent")


async def test_a_socket_that_nobody_listens_to(tmp_path: Path) -> None:
    path = tmp_path / "shard-0"
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(path))
    with pytest.raises(BenchmarkError, match="cannot be reached"):
        await opened(str(path))


@pytest.mark.parametrize(
    ("launched", "outcome"),
    [
        pytest.param([], "there is no shard at", id="none"),
        pytest.param(["a"], Path("a"), id="the one that runs"),
        pytest.param(["a", "b"], "several servers run here: choose a shard", id="several"),
    ],
)
def test_without_a_path_the_launched_server_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, launched: list[str], outcome: Path | str
) -> None:
    sockets: Callable[[], list[Path]] = lambda: list(map(Path, launched))  # noqa: E731
    monkeypatch.setattr(shard_target, "DEFAULT_SOCKET", tmp_path / "absent")
    monkeypatch.setattr(shard_target, "launched_sockets", sockets)
    if isinstance(outcome, Path):
        assert find_socket(None) == outcome
        return
    with pytest.raises(BenchmarkError, match=outcome):
        find_socket(None)
