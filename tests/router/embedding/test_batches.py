"""`embedding.batches`: turns of requests, and what becomes of them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_generation_router.embedding import batches
from text_generation_router.embedding.batches import TURN, EncoderBatcher, Job, fill_batch
from text_generation_router.errors import NO_SHARD, GenerationFailed, Overloaded, ShuttingDown
from text_generation_router.metrics import Metrics
from text_generation_router.shards.group import EmbeddingFailed, ShardGroup, ShardUnreachable

LOOP = asyncio.new_event_loop()
LOOP.close()


def job(*lengths: int) -> Job:
    """One that nobody waits for."""
    return Job([[0] * length for length in lengths], asyncio.Future(loop=LOOP))


def test_requests_take_turns() -> None:
    many, few = job(*[1] * 100), job(1, 1)
    jobs = deque([many, few])
    batch = fill_batch(jobs, TURN + 4)
    assert batch == [*((many, index) for index in range(TURN)), (few, 0), (few, 1), (many, TURN), (many, TURN + 1)]
    assert list(jobs) == [many]


def test_a_text_longer_than_a_batch_is_one() -> None:
    long = job(50, 1)
    jobs = deque([long])
    assert fill_batch(jobs, 10) == [(long, 0)]
    assert fill_batch(jobs, 10) == [(long, 1)]
    assert fill_batch(jobs, 10) == []


def test_what_nobody_waits_for_is_not_computed() -> None:
    gone, here = job(1), job(1)
    gone.done.cancel()
    assert fill_batch(deque([gone, here]), 10) == [(here, 0)]


@given(st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=40), max_size=6), st.integers(1, 64))
def test_every_text_is_in_one_batch(lengths: list[list[int]], max_tokens: int) -> None:
    made = [job(*each) for each in lengths]
    jobs = deque(made)
    seen: list[tuple[int, int]] = []
    while batch := fill_batch(jobs, max_tokens):
        sizes = [len(each.texts[index]) for each, index in batch]
        assert len(sizes) == 1 or sum(sizes) <= max_tokens
        seen += [(made.index(each), index) for each, index in batch]
    assert sorted(seen) == [(i, j) for i, each in enumerate(lengths) for j in range(len(each))]


BAD = 99
NOT_A_NUMBER = 0x7FC00000


class Shards:
    """Answers with the first id of each text, as one float."""

    def __init__(self) -> None:
        self.batches: list[list[Sequence[int]]] = []
        self.errors: list[Exception] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.is_alive = True
        self.restarts = False
        self.incarnation = 1
        self.is_back = asyncio.Event()
        self.room = 1000
        """Tokens of a batch."""

    async def makes_progress(self) -> bool:
        return self.is_alive

    async def rejoin(self, after: int) -> None:
        if not self.is_back.is_set():
            raise ShardUnreachable("not yet")
        self.incarnation = after + 1

    async def embed(self, texts: Sequence[Sequence[int]]) -> bytes:
        self.batches.append(list(texts))
        await self.gate.wait()
        if self.errors:
            raise self.errors.pop(0)
        if [BAD] in texts:
            raise EmbeddingFailed("a bad text")
        if sum(map(len, texts)) > self.room:
            raise EmbeddingFailed("no memory", out_of_memory=True)
        return b"".join(text[0].to_bytes(4, "little") for text in texts)


@asynccontextmanager
async def running(shards: Shards, max_tokens: int = 8, max_queue_size: int | None = None) -> Any:
    metrics = Metrics(max_input_tokens=100, max_total_tokens=100)
    batcher = EncoderBatcher(
        cast(ShardGroup, shards),
        metrics=metrics,
        max_tokens=max_tokens,
        vector_bytes=4,
        max_queue_size=max_queue_size,
    )
    task = asyncio.create_task(batcher.run())
    try:
        yield batcher
    finally:
        task.cancel()
        await asyncio.wait((task,))


def raw(*numbers: int) -> list[bytes]:
    return [number.to_bytes(4, "little") for number in numbers]


async def test_vectors_come_in_the_order_of_the_texts() -> None:
    shards = Shards()
    async with running(shards) as batcher:
        one, other = await asyncio.gather(
            batcher.embed([[number] * 3 for number in range(20)]), batcher.embed([[50], [51]])
        )
    assert one == raw(*range(20))
    assert other == raw(50, 51)
    assert all(sum(map(len, batch)) <= 8 for batch in shards.batches)


@pytest.mark.parametrize(
    ("error", "message", "ready"),
    [(EmbeddingFailed("bad batch"), "Server error: bad batch", True), (ShardUnreachable("gone"), NO_SHARD, False)],
)
async def test_a_batch_that_fails_fails_its_request(error: Exception, message: str, ready: bool) -> None:
    shards = Shards()
    async with running(shards) as batcher:
        shards.errors.append(error)
        with pytest.raises(GenerationFailed, match=message):
            await batcher.embed([[1]])
        assert batcher.ready() is ready
        assert await batcher.embed([[2]]) == raw(2)
        assert batcher.ready()


@pytest.mark.parametrize("comes_back", [True, False])
async def test_a_batch_whose_shard_is_lost_waits_for_another(monkeypatch: pytest.MonkeyPatch, comes_back: bool) -> None:
    monkeypatch.setattr(batches, "RECOVERY_PAUSE_S", 0.01)
    shards = Shards()
    shards.restarts = True
    shards.errors.append(ShardUnreachable("gone"))
    async with running(shards) as batcher, asyncio.timeout(20):
        waiting = asyncio.create_task(batcher.embed([[1]]))
        while not shards.batches or batcher.ready():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        if comes_back:
            shards.is_back.set()
            assert await waiting == raw(1)
        else:
            batcher.give_up()
            with pytest.raises(GenerationFailed, match=NO_SHARD):
                await waiting
            with pytest.raises(GenerationFailed, match=NO_SHARD):
                await batcher.embed([[2]])


async def test_a_batch_that_is_lost_when_no_shard_will_come_back_fails() -> None:
    shards = Shards()
    shards.restarts = True
    shards.errors.append(ShardUnreachable("gone"))
    shards.gate.clear()
    async with running(shards) as batcher, asyncio.timeout(20):
        computed = asyncio.create_task(batcher.embed([[1]]))
        while not shards.batches:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        batcher.give_up()
        shards.gate.set()
        with pytest.raises(GenerationFailed, match=NO_SHARD):
            await computed


async def test_a_shard_that_nobody_asks_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "WATCH_EVERY_S", 0.01)
    shards = Shards()
    async with running(shards) as batcher:
        for alive in (False, True):
            shards.is_alive = alive
            await asyncio.sleep(0.05)
            assert batcher.ready() is alive


async def test_a_client_that_leaves_takes_its_texts_along() -> None:
    shards = Shards()
    async with running(shards) as batcher:
        shards.gate.clear()
        tasks = [asyncio.create_task(batcher.embed([[1] * 8 for _ in range(50)]))]
        await asyncio.sleep(0.01)
        tasks[0].cancel()
        await asyncio.wait(tasks)
        shards.gate.set()
        assert await batcher.embed([[7]]) == raw(7)
    assert len(shards.batches) == 3


async def test_who_waits_at_the_end_is_told() -> None:
    shards = Shards()
    async with running(shards) as batcher:
        shards.gate.clear()
        tasks = [asyncio.create_task(batcher.embed([[1] * 8 for _ in range(50)]))]
        await asyncio.sleep(0.01)
    with pytest.raises(ShuttingDown):
        await tasks[0]
    with pytest.raises(ShuttingDown):
        await batcher.embed([[1]])


async def test_a_text_that_fails_fails_alone() -> None:
    shards = Shards()
    async with running(shards) as batcher:
        results = await asyncio.gather(
            batcher.embed([[1], [2]]), batcher.embed([[3], [BAD]]), batcher.embed([[4]]), return_exceptions=True
        )
    assert [results[0], results[2]] == [raw(1, 2), raw(4)]
    assert isinstance(results[1], GenerationFailed)
    assert "a bad text" in str(results[1])


async def test_a_vector_that_is_not_finite_fails_alone() -> None:
    shards = Shards()
    async with running(shards) as batcher:
        results = await asyncio.gather(
            batcher.embed([[1]]), batcher.embed([[2], [NOT_A_NUMBER]]), return_exceptions=True
        )
    assert results[0] == raw(1)
    assert isinstance(results[1], GenerationFailed)
    assert "not finite" in str(results[1])


async def test_batches_that_do_not_fit_become_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "LEAST_TOKENS", 2)
    shards = Shards()
    shards.room = 5
    async with running(shards) as batcher:
        assert await batcher.embed([[number] for number in range(30)]) == raw(*range(30))
        assert [len(batch) for batch in shards.batches if len(batch) > 5] in ([8], [8, 8])
        assert len(shards.batches[-1]) > 1
        shards.room = 0  # for another reason than the size of batches
        with pytest.raises(GenerationFailed, match="no memory"):
            await batcher.embed([[1]])
        shards.room = 5
        assert await batcher.embed([[number] for number in range(4)]) == raw(*range(4))
        assert len(shards.batches[-1]) == 4


async def test_a_queue_of_a_given_length() -> None:
    shards = Shards()
    shards.gate.clear()
    async with running(shards, max_queue_size=2) as batcher:
        asked = [asyncio.create_task(batcher.embed([[number] * 8])) for number in range(6)]
        for refused in asked[4:]:  # two are computed, two wait
            with pytest.raises(Overloaded):
                await refused
        assert not batcher.backlog._departures._intervals, "who is turned away says nothing of the pace"
        assert batcher.backlog.is_full
        assert batcher.backlog.turn_away() >= 1
        shards.gate.set()
        assert [await task for task in asked[:4]] == [raw(number) for number in range(4)]
        assert not batcher.backlog.is_full
