"""The batching loop against a shard that keeps the contract, over real gRPC on a real socket."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from builders import byte_tokenizer
from fake_shard import FakeShard, serve_fake_shards
from text_generation_router.config import WarmupLimits
from text_generation_router.detokenizer import Detokenizer
from text_generation_router.errors import DeadlineExceeded, GenerationFailed, Overloaded, ShuttingDown
from text_generation_router.metrics import Metrics
from text_generation_router.scheduling import door
from text_generation_router.scheduling.batcher import Batcher
from text_generation_router.scheduling.blocks import BlockAllocator
from text_generation_router.scheduling.budget import BatchLimits
from text_generation_router.scheduling.leases import Leases
from text_generation_router.scheduling.requests import (
    FinishReason,
    PrefillEvent,
    QueuedRequest,
    Sampling,
    TokenEvent,
    ValidRequest,
)
from text_generation_router.scheduling.steps import StepScheduler
from text_generation_router.shards.group import connect

TOKENIZER = byte_tokenizer()
LIMITS = WarmupLimits(
    max_batch_prefill_tokens=64,
    max_batch_total_tokens=0,
    max_batch_size=0,
    max_total_tokens=200,
    max_concurrent_requests=128,
)
EOS = 256


@dataclass
class Router:
    batcher: Batcher
    scheduler: StepScheduler
    metrics: Metrics

    def ask(self, prompt: str, max_new_tokens: int = 5, *, is_part: bool = False, **options: object) -> QueuedRequest:
        request = ValidRequest(
            inputs=prompt,
            input_ids=TOKENIZER.encode(prompt).ids,
            sampling=Sampling(),
            max_new_tokens=max_new_tokens,
            **options,  # type: ignore[arg-type]
        )
        queued = QueuedRequest(request, validation_s=0.0, is_part=is_part)
        self.batcher.enqueue(queued)
        return queued


@contextlib.asynccontextmanager
async def running(
    folder: Path,
    *shards: FakeShard,
    prefill: int = 64,
    restarts: bool = False,
    max_batch_size: int | None = None,
    max_queue_size: int | None = None,
) -> AsyncIterator[Router]:
    for shard in shards:
        shard.eos_token_ids = (EOS,)
    async with serve_fake_shards(folder, *shards) as path:
        group = await connect(path, "nonce", timeout_s=5, restarts=restarts)
        await group.warmup(LIMITS)
        metrics = Metrics(max_input_tokens=100, max_total_tokens=200)
        scheduler = StepScheduler(
            BatchLimits(max_batch_prefill_tokens=prefill, max_batch_size=max_batch_size),
            Leases(BlockAllocator(shards[0].num_blocks, shards[0].block_size), prefix_caching=True),
        )
        detokenizer = Detokenizer(TOKENIZER, frozenset({EOS}))
        batcher = Batcher(group, scheduler, detokenizer, metrics, max_queue_size=max_queue_size)
        task = asyncio.create_task(batcher.run())
        try:
            yield Router(batcher, scheduler, metrics)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await group.close()


async def tokens(queued: QueuedRequest) -> list[TokenEvent]:
    events = []
    while batch := await queued.stream.get_all():
        events += batch
    return [event for event in events if isinstance(event, TokenEvent)]


async def text(queued: QueuedRequest) -> str:
    events = await tokens(queued)
    finished = events[-1].finished
    assert finished is not None
    assert "".join(event.token.text for event in events if not event.token.special) == finished.generated_text
    return finished.generated_text


async def settled(router: Router, shard: FakeShard) -> None:
    """Wait until the shard has heard of every drop."""
    async with asyncio.timeout(5):
        while shard.sequences or router.scheduler.leases.num_used:  # noqa: ASYNC110 - the shard sends no event
            await asyncio.sleep(0.01)


async def test_a_request_is_answered(tmp_path: Path) -> None:
    shard = FakeShard()
    async with running(tmp_path, shard) as router:
        events = await tokens(router.ask("hello", max_new_tokens=7))
        assert [event.index for event in events] == [1, 2, 3, 4, 5, 6, 7]
        assert [event.token.text for event in events] == list("hellohe")
        finished = events[-1].finished
        assert finished is not None
        assert (finished.generated_text, finished.finish_reason) == ("hellohe", FinishReason.LENGTH)
        assert (finished.generated_tokens, finished.input_length, finished.seed) == (7, 5, None)
        await settled(router, shard)
        assert router.batcher.num_requests == 0


async def test_many_at_once_with_chunked_prompts(tmp_path: Path) -> None:
    shard = FakeShard()
    async with running(tmp_path, shard, prefill=7) as router:
        prompts = [chr(ord("a") + i) * (3 * i + 1) for i in range(12)]
        asked = [router.ask(prompt, max_new_tokens=i + 1) for i, prompt in enumerate(prompts)]
        answers = await asyncio.gather(*(text(queued) for queued in asked))
        assert answers == [prompt[0] * (i + 1) for i, prompt in enumerate(prompts)]
        await settled(router, shard)


async def test_those_who_come_at_once_are_computed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "PATIENCE_S", 60.0)
    shard = FakeShard()
    async with running(tmp_path, shard) as router:
        with router.batcher.door.entering():
            first = router.ask("abc", max_new_tokens=1)
            await asyncio.sleep(0.05)
            assert not shard.sequences
            second = router.ask("def", max_new_tokens=1)
        assert [await text(first), await text(second)] == ["a", "d"]
        assert router.metrics.batch_inference_count.value(method="prefill") == 1


async def test_nobody_waits_for_ever_for_those_at_the_door(tmp_path: Path) -> None:
    async with running(tmp_path, FakeShard()) as router:
        with router.batcher.door.entering():
            assert await text(router.ask("abc", max_new_tokens=5)) == "abcab"


async def test_preempted_requests_go_on_where_they_were(tmp_path: Path) -> None:
    shard = FakeShard(num_blocks=12)
    async with running(tmp_path, shard) as router:
        asked = [router.ask(letter * 8, max_new_tokens=30) for letter in "abcd"]
        assert await asyncio.gather(*(text(queued) for queued in asked)) == [letter * 30 for letter in "abcd"]
        assert router.metrics.preemption_count.value() > 0
        await settled(router, shard)


async def test_end_of_sequence(tmp_path: Path) -> None:
    async with running(tmp_path, FakeShard()) as router:
        events = await tokens(router.ask("ab</s>", max_new_tokens=9))
        assert [event.token.special for event in events] == [False, False, True]
        assert events[-1].finished is not None
        assert events[-1].finished.finish_reason is FinishReason.EOS_TOKEN
        assert events[-1].finished.generated_text == "ab"
        ignoring = await tokens(router.ask("ab</s>", max_new_tokens=9, ignore_eos=True))
        assert len(ignoring) == 9


async def test_stop_text_across_tokens_ends_the_request_and_stays(tmp_path: Path) -> None:
    shard = FakeShard()
    async with running(tmp_path, shard) as router:
        queued = router.ask("one two three", max_new_tokens=50, stop_sequences=("two",))
        events = await tokens(queued)
        assert events[-1].finished is not None
        assert events[-1].finished.generated_text == "one two"
        assert events[-1].finished.finish_reason is FinishReason.STOP_SEQUENCE
        await settled(router, shard)


async def test_top_tokens(tmp_path: Path) -> None:
    async with running(tmp_path, FakeShard()) as router:
        events = await tokens(router.ask("A", max_new_tokens=1, top_n_tokens=3))
        assert events[0].top_tokens is not None
        assert [token.text for token in events[0].top_tokens] == ["A", "B", "C"]


async def test_prompt_logprobs_come_first_whatever_the_chunks(tmp_path: Path) -> None:
    async with running(tmp_path, FakeShard(prefill_logprobs=True), prefill=2) as router:
        queued = router.ask("abcde", max_new_tokens=1, decoder_input_details=True)
        events = await queued.stream.get_all()
        assert isinstance(events[0], PrefillEvent)
        assert [(token.text, token.logprob) for token in events[0].tokens] == [
            ("a", None),
            ("b", -1.0),
            ("c", -2.0),
            ("d", -3.0),
            ("e", -4.0),
        ]


async def test_a_client_that_leaves_frees_everything(tmp_path: Path) -> None:
    shard = FakeShard(step_s=0.01)
    async with running(tmp_path, shard) as router:
        leaving, staying = router.ask("abc", max_new_tokens=10_000), router.ask("xyz", max_new_tokens=20)
        await leaving.stream.get_all()
        router.batcher.cancel(leaving)
        router.batcher.cancel(leaving)
        assert await text(staying) == "xyz" * 6 + "xy"
        await settled(router, shard)
        assert router.batcher.num_requests == 0


async def test_what_ran_in_a_failed_step_goes_on_from_where_it_was(tmp_path: Path) -> None:
    shard = FakeShard(step_s=0.02, num_blocks=8)
    async with running(tmp_path, shard) as router:
        ran = router.ask("abcd", max_new_tokens=20)
        (first, *more) = await ran.stream.get_all()
        waits = router.ask("x" * 24, max_new_tokens=4)
        shard.fail_steps = 1
        events = [first, *more, *await tokens(ran)]
        assert "".join(event.token.text for event in events if isinstance(event, TokenEvent)) == "abcd" * 5
        assert await text(waits) == "xxxx"
        assert router.batcher.ready()
        assert router.metrics.request_replay_count.value() == 1
        await settled(router, shard)


async def test_who_makes_the_shards_fail_fails_alone(tmp_path: Path) -> None:
    shard = FakeShard(crash_token=TOKENIZER.encode("!").ids[0], step_s=0.005)
    async with running(tmp_path, shard) as router:
        running_before = [router.ask(letter * 3, max_new_tokens=40) for letter in "abcdefgh"]
        for queued in running_before:
            await queued.stream.get_all()
        bad = router.ask("bad!", max_new_tokens=8)
        coming_after = [router.ask(letter * 3, max_new_tokens=4) for letter in "ijklm"]
        with pytest.raises(GenerationFailed, match="Request failed during generation: Server error: made to fail"):
            await tokens(bad)
        assert [queued.output_ids for queued in running_before if await tokens(queued)] == [
            TOKENIZER.encode(letter * 40).ids for letter in "abcdefgh"
        ]
        assert [await text(queued) for queued in coming_after] == [letter * 4 for letter in "ijklm"]
        assert all(queued.num_crashes == 0 for queued in running_before)
        await settled(router, shard)


async def test_a_step_without_memory_costs_its_prompts_alone(tmp_path: Path) -> None:
    shard = FakeShard(step_s=0.01, out_of_memory=True)
    async with running(tmp_path, shard, prefill=64) as router:
        ran = router.ask("abcd", max_new_tokens=60)
        await ran.stream.get_all()
        for budget in (64, 64, 32):
            assert router.scheduler.limits.max_batch_prefill_tokens == budget
            shard.crash_token = TOKENIZER.encode("!").ids[0]
            with pytest.raises(GenerationFailed, match="Server error: made to fail"):
                await tokens(router.ask("bad!", max_new_tokens=4))
        await tokens(ran)
        assert ran.output_ids == TOKENIZER.encode("abcd" * 15).ids
        assert router.metrics.out_of_memory_count.value() == 3
        assert router.metrics.batch_max_prefill_tokens.value() == router.scheduler.limits.max_batch_prefill_tokens == 16
        assert router.metrics.request_replay_count.value() == 3
        await settled(router, shard)


async def test_steps_of_more_rows_than_memory_allows_become_smaller(tmp_path: Path) -> None:
    shard = FakeShard(out_of_memory=True, most_rows=4)
    async with running(tmp_path, shard) as router:
        asked = [router.ask(letter, max_new_tokens=20) for letter in "abcdefghij"]
        assert [await text(queued) for queued in asked] == [letter * 20 for letter in "abcdefghij"]
        assert router.scheduler.limits.max_batch_size in (2, 3, 4)
        assert router.metrics.out_of_memory_count.value() <= 4
        assert all(queued.num_crashes == 0 for queued in asked)
        await settled(router, shard)


async def test_a_row_that_does_not_fit_alone_fails(tmp_path: Path) -> None:
    shard = FakeShard(out_of_memory=True, most_rows=0)
    async with running(tmp_path, shard) as router:
        for queued in [router.ask(letter, max_new_tokens=20) for letter in "abc"]:
            with pytest.raises(GenerationFailed, match="made to fail"):
                await text(queued)
        await settled(router, shard)


async def test_who_comes_at_once_may_wait_in_a_queue_of_a_given_length(tmp_path: Path) -> None:
    shard = FakeShard(gate=asyncio.Event())
    async with running(tmp_path, shard, max_batch_size=2, max_queue_size=3) as router:
        asked = [router.ask(letter) for letter in "abcdefgh"]
        for queued in asked[5:]:  # the last come are the first to go
            with pytest.raises(Overloaded) as refused:
                await text(queued)
            assert refused.value.retry_after_s >= 1
        assert router.batcher.backlog.is_full
        assert not router.batcher.backlog._departures._intervals, "who is turned away says nothing of the pace"
        assert shard.gate is not None
        shard.gate.set()
        assert [await text(queued) for queued in asked[:5]] == [letter * 5 for letter in "abcde"]
        assert router.batcher.num_waiting == 0
        await settled(router, shard)


async def test_parts_of_a_request_that_was_let_in_stay(tmp_path: Path) -> None:
    shard = FakeShard(gate=asyncio.Event())
    async with running(tmp_path, shard, max_batch_size=1, max_queue_size=1) as router:
        parts = [router.ask(letter, is_part=True) for letter in "abcd"]
        alone, surplus = router.ask("e"), router.ask("f")
        with pytest.raises(Overloaded):
            await text(surplus)
        assert shard.gate is not None
        shard.gate.set()
        assert [await text(queued) for queued in [*parts, alone]] == [letter * 5 for letter in "abcde"]


async def test_nobody_is_turned_away_that_runs_at_once(tmp_path: Path) -> None:
    shard = FakeShard()
    async with running(tmp_path, shard, max_queue_size=1) as router:
        asked = [router.ask(letter) for letter in "abcdefgh"]
        assert [await text(queued) for queued in asked] == [letter * 5 for letter in "abcdefgh"]


async def test_prompt_logprobs_survive_a_preemption_between_chunks(tmp_path: Path) -> None:
    shard = FakeShard(prefill_logprobs=True, num_blocks=10)
    async with running(tmp_path, shard, prefill=4) as router:
        old = router.ask("ab", max_new_tokens=36)
        new = router.ask("x" * 29, max_new_tokens=1, decoder_input_details=True)
        events = await new.stream.get_all()
        assert router.metrics.preemption_count.value() > 0
        assert isinstance(events[0], PrefillEvent)
        assert [token.logprob for token in events[0].tokens] == [None, *(-float(i) for i in range(1, 29))]
        await text(old)


async def test_shards_that_are_gone_fail_what_runs_and_what_waits(tmp_path: Path) -> None:
    shard = FakeShard(step_s=0.02, num_blocks=8)
    async with serve_fake_shards(tmp_path, shard) as path:
        shard.eos_token_ids = (EOS,)
        group = await connect(path, "nonce", timeout_s=5)
        scheduler = StepScheduler(
            BatchLimits(max_batch_prefill_tokens=64), Leases(BlockAllocator(8, 4), prefix_caching=True)
        )
        metrics = Metrics(max_input_tokens=100, max_total_tokens=200)
        batcher = Batcher(group, scheduler, Detokenizer(TOKENIZER, frozenset({EOS})), metrics)
        task = asyncio.create_task(batcher.run())
        router = Router(batcher, scheduler, metrics)
        ran = router.ask("abcd", max_new_tokens=20)
        await ran.stream.get_all()
        waits = router.ask("x" * 24)
    with pytest.raises(GenerationFailed, match="Server error"):
        await tokens(ran)
    with pytest.raises(GenerationFailed, match="Could not connect to Text Generation server"):
        await tokens(waits)
    with pytest.raises(GenerationFailed, match="Could not connect to Text Generation server"):
        router.ask("too late")
    assert not batcher.ready()
    assert batcher.num_requests == scheduler.leases.num_used == 0
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    with pytest.raises(ShuttingDown):
        router.ask("far too late")
    await group.close()


async def test_gauges_tell_of_a_request_while_its_first_step_runs(tmp_path: Path) -> None:
    gate = asyncio.Event()
    async with running(tmp_path, FakeShard(gate=gate)) as router, asyncio.timeout(10):
        queued = router.ask("hello", max_new_tokens=1)
        while router.metrics.batch_current_size.value() != 1:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        assert router.metrics.queue_size.value() == 0
        assert router.metrics.kv_cache_usage.value() > 0
        gate.set()
        await text(queued)


async def test_a_poisoned_request_fails_alone(tmp_path: Path) -> None:
    shard = FakeShard(poisoned_token=TOKENIZER.encode("!").ids[0])
    async with running(tmp_path, shard) as router:
        good, bad = router.ask("good", max_new_tokens=8), router.ask("bad!", max_new_tokens=8)
        assert await text(good) == "goodgood"
        with pytest.raises(GenerationFailed, match="poisoned"):
            await tokens(bad)
        await settled(router, shard)


async def test_two_ranks_answer_as_one(tmp_path: Path) -> None:
    async with running(tmp_path, FakeShard(), FakeShard(step_s=0.01)) as router:
        assert await text(router.ask("hello", max_new_tokens=6)) == "helloh"


async def test_no_steps_while_idle(tmp_path: Path) -> None:
    shard = FakeShard()
    async with running(tmp_path, shard) as router:
        await text(router.ask("hello"))
        await settled(router, shard)
        steps = shard.num_steps
        await asyncio.sleep(0.2)
        assert shard.num_steps == steps


async def test_when_the_loop_ends_nobody_is_left_waiting(tmp_path: Path) -> None:
    async with running(tmp_path, FakeShard(step_s=0.05)) as router:
        queued = router.ask("hello", max_new_tokens=1000)
        await queued.stream.get_all()
    with pytest.raises(ShuttingDown):
        await tokens(queued)


@contextlib.asynccontextmanager
async def shards_that_come_back(folder: Path, *shards: FakeShard) -> AsyncIterator[tuple[Router, Restart]]:
    """A router of shards that somebody restarts."""
    async with contextlib.AsyncExitStack() as serving:
        path = await serving.enter_async_context(serve_fake_shards(folder, *shards))
        group = await connect(path, "nonce", timeout_s=5, restarts=True)
        await group.warmup(LIMITS)
        metrics = Metrics(max_input_tokens=100, max_total_tokens=200)
        scheduler = StepScheduler(
            BatchLimits(max_batch_prefill_tokens=64),
            Leases(BlockAllocator(shards[0].num_blocks, shards[0].block_size), prefix_caching=True),
        )
        batcher = Batcher(group, scheduler, Detokenizer(TOKENIZER, frozenset({EOS})), metrics)
        task = asyncio.create_task(batcher.run())

        async def down() -> None:
            await serving.aclose()

        async def up() -> None:
            for shard in shards:
                shard.incarnation += 1
                shard.epoch = 0
                shard.sequences.clear()
                shard.kv.clear()
            await serving.enter_async_context(serve_fake_shards(folder, *shards))

        try:
            yield Router(batcher, scheduler, metrics), Restart(down, up)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await group.close()


@dataclass
class Restart:
    down: Callable[[], Awaitable[None]]
    up: Callable[[], Awaitable[None]]


async def test_requests_wait_for_shards_that_come_back_and_go_on(tmp_path: Path) -> None:
    shards = [FakeShard(step_s=0.01, num_blocks=32), FakeShard(num_blocks=32)]
    async with shards_that_come_back(tmp_path, *shards) as (router, restart):
        ran = [router.ask(letter * 4, max_new_tokens=20) for letter in "abc"]
        for queued in ran:
            await queued.stream.get_all()
        await restart.down()
        async with asyncio.timeout(10):
            while router.batcher.ready():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        came_meanwhile = router.ask("zz", max_new_tokens=3)
        left_meanwhile = router.ask("yy", max_new_tokens=3)
        router.batcher.cancel(left_meanwhile)
        await asyncio.sleep(0.3)
        await restart.up()
        for queued, letter in zip(ran, "abc", strict=True):
            await tokens(queued)
            assert queued.output_ids == TOKENIZER.encode(letter * 20).ids
        assert await text(came_meanwhile) == "zzz"
        assert router.batcher.ready()
        # What requests were admitted by is still there: as many blocks as before, and not one more.
        assert [request.max_batch_total_tokens for request in shards[0].warmups] == [0, 32 * shards[0].block_size]
        await settled(router, shards[0])


@pytest.mark.parametrize("is_seen", [True, False])
async def test_what_waits_for_shards_that_will_not_come_back_fails(tmp_path: Path, is_seen: bool) -> None:
    """Whether the router has seen already that they are gone, or is told so first."""
    shard = FakeShard(step_s=0.01)
    async with shards_that_come_back(tmp_path, shard) as (router, restart):
        ran = router.ask("abc", max_new_tokens=400)
        await ran.stream.get_all()
        if is_seen:
            await restart.down()
            async with asyncio.timeout(10):
                while router.batcher.ready():  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        router.batcher.give_up()
        with pytest.raises(GenerationFailed, match="Could not connect to Text Generation server"):
            await tokens(ran)
        with pytest.raises(GenerationFailed):
            router.ask("too late")
        if not is_seen:
            await restart.down()
            async with asyncio.timeout(10):
                while router.batcher.ready():  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        await restart.up()  # an answer that was on its way
        async with asyncio.timeout(10):
            while not router.batcher.ready():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        with pytest.raises(GenerationFailed):
            router.ask("too late")


async def test_a_request_whose_time_is_over(tmp_path: Path) -> None:
    shard = FakeShard(step_s=0.01)
    async with running(tmp_path, shard) as router:
        queued = router.ask("abc", max_new_tokens=10_000)
        await queued.stream.get_all()
        router.batcher.expire(queued, DeadlineExceeded(1.5))
        with pytest.raises(DeadlineExceeded, match=r"not answered in the 1\.5 s"):
            await tokens(queued)
        router.batcher.expire(queued, DeadlineExceeded(1.5))
        await settled(router, shard)


@pytest.mark.parametrize("leaves", ["cancelled", "expired"])
async def test_a_pause_after_the_last_one_has_left_early_says_nothing_of_the_pace(tmp_path: Path, leaves: str) -> None:
    async with running(tmp_path, FakeShard(step_s=0.01)) as router:
        queued = router.ask("a", 100)
        await queued.stream.get_all()
        if leaves == "cancelled":
            router.batcher.cancel(queued)
        else:
            router.batcher.expire(queued, DeadlineExceeded(1.0))
        await asyncio.sleep(1.5)
        last = router.ask("b", 1)
        while await last.stream.get_all():
            pass
        assert router.batcher.backlog.turn_away() == 1, "a mean of less than a second"
