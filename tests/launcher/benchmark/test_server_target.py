"""The server driver against a small server of OpenAI's API over real HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from openai_server import OLDEST_FIELDS, OpenAIServer, serving_openai
from text_generation_launcher.benchmark.apis import Usage
from text_generation_launcher.benchmark.config import ApiName, BenchmarkConfig, Flags, ServerAddress, resolve
from text_generation_launcher.benchmark.errors import BenchmarkError
from text_generation_launcher.benchmark.outcome import End, Outcome
from text_generation_launcher.benchmark.server_target import COUNTS_NOTHING, MAY_END_EARLY, ServerTarget, run_of


def nothing() -> None:
    pass


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came")


def address(config: BenchmarkConfig) -> ServerAddress:
    assert isinstance(config.target, ServerAddress)
    return config.target


@pytest.fixture
def open_target(tokenizer_folder: Path) -> Any:
    async def opened(url: str, **flags: Any) -> ServerTarget:
        config = resolve(Flags(url=url, **{"tokenizer_name": str(tokenizer_folder), **flags}))
        return await ServerTarget.open(config, address(config))

    return opened


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
async def test_a_batch_is_as_many_streams_at_once(open_target: Any, line_end: str) -> None:
    server = OpenAIServer(line_end=line_end)
    async with serving_openai(server) as url:
        target = await open_target(url, sequence_length=12, decode_length=5)
        assert target.description.kind == "/v1/completions"
        assert (target.description.model, target.description.details, target.description.notes) == (
            *("tiny", {"Version": "0.1"}, ()),
        )
        server.bodies.clear()
        run = await target.run(4, nothing)
    assert server.most == 4
    assert (len(run.prefill_s), len(run.token_s), len(run.decode_s)) == (4, 16, 4)
    assert (run.prompt_tokens, run.decode_tokens, run.num_short) == (48, 16, 0)
    assert len({body["prompt"] for body in server.bodies}) == 4, "no two prompts are the same"
    assert all(len(body["prompt"]) == 12 for body in server.bodies)
    assert all((body["ignore_eos"], body["min_tokens"], body["model"]) == (True, 5, "tiny") for body in server.bodies)


@pytest.mark.parametrize("flags", [{"api": ApiName.CHAT}, {}], ids=["asked for", "all there is"])
async def test_chat_is_measured_too(open_target: Any, flags: dict[str, Any]) -> None:
    server = OpenAIServer() if flags else OpenAIServer(routes=("/v1/chat/completions",))
    async with serving_openai(server) as url:
        target = await open_target(url + "/v1", decode_length=3, **flags)
        run = await target.run(2, nothing)
    assert target.description.kind == "/v1/chat/completions"
    assert len(run.token_s) == 4


async def test_a_strict_server_is_asked_less_and_what_that_means_is_said(open_target: Any) -> None:
    server = OpenAIServer(known=OLDEST_FIELDS, ends_after=3)
    async with serving_openai(server) as url:
        target = await open_target(url, decode_length=5)
        assert target.description.notes == (MAY_END_EARLY, COUNTS_NOTHING)
        run = await target.run(2, nothing)
    assert (run.decode_tokens, run.num_short, run.decode_s) == (4, 2, ())
    assert (target.surprises.num_streams, target.surprises.num_short) == (2, 2)


async def test_a_server_that_counts_but_knows_no_extensions(open_target: Any) -> None:
    async with serving_openai(OpenAIServer(known=OLDEST_FIELDS | {"stream_options"})) as url:
        target = await open_target(url)
        assert target.description.notes == (MAY_END_EARLY,)
        await target.run(1, nothing)
    assert target.surprises.prompt_tokens == {10}


@pytest.mark.parametrize(
    ("knobs", "flags", "message"),
    [
        pytest.param({"routes": ()}, {}, "refuses a request of two tokens", id="no route"),
        pytest.param({"api_key": "k"}, {}, "wants a key: --api-key", id="no key"),
        pytest.param({"api_key": "k"}, {"api_key": "x"}, "wants another key than --api-key", id="another key"),
        pytest.param({}, {"model": "large"}, "has no model 'large'; choose with --model from tiny", id="model"),
        pytest.param({}, {"api": ApiName.NATIVE}, "/info is not TGI's", id="not TGI"),
        pytest.param({}, {"top_k": 3}, "`--top-k` is no parameter of OpenAI's API", id="a flag OpenAI lacks"),
        pytest.param(
            {"model": {"id": "tiny", "max_model_len": 17}}, {}, "max_total_tokens is 17", id="longer than the model"
        ),
        pytest.param({}, {"tokenizer_name": None}, "the tokenizer of tiny", id="no tokenizer"),
    ],
)
async def test_what_cannot_be_measured_is_refused_first(
    open_target: Any, monkeypatch: pytest.MonkeyPatch, knobs: dict[str, Any], flags: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    async with serving_openai(OpenAIServer(**knobs)) as url:
        with pytest.raises(BenchmarkError) as refused:
            await open_target(url, **flags)
    assert message in str(refused.value)


async def test_a_server_without_a_list_of_models(open_target: Any) -> None:
    async with serving_openai(OpenAIServer(model=None)) as url:
        with pytest.raises(BenchmarkError, match="or name the --model of a server that lists none"):
            await open_target(url)
        target = await open_target(url, model="unlisted")
        assert target.description.model == "unlisted"


async def test_the_right_key_opens(open_target: Any) -> None:
    async with serving_openai(OpenAIServer(api_key="k")) as url:
        target = await open_target(url, api_key="k")
        await target.run(1, nothing)


async def test_nobody_there_and_somebody_else(open_target: Any) -> None:
    async with serving_openai(OpenAIServer()) as url:
        with pytest.raises(BenchmarkError, match="is no server of TGI's API"):
            await open_target(url + "/elsewhere")
    with pytest.raises(BenchmarkError, match="is the server running"):
        await open_target(url)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        pytest.param({"capacity": 1}, r"requests failed at once, the first with: 429 .*lower --batch-size", id="full"),
        pytest.param({"fails": True}, "4 of 4 requests failed at once.*out of luck", id="an error in the stream"),
    ],
)
async def test_failures_while_measuring(open_target: Any, knobs: dict[str, Any], message: str) -> None:
    server = OpenAIServer()
    async with serving_openai(server) as url:
        target = await open_target(url)
        for name, value in knobs.items():
            setattr(server, name, value)
        with pytest.raises(BenchmarkError, match=message):
            await target.run(4, nothing)


async def test_a_run_that_is_cancelled_leaves_no_stream_open(open_target: Any) -> None:
    server = OpenAIServer()
    async with serving_openai(server) as url:
        target = await open_target(url)
        server.gate = asyncio.Event()
        running = asyncio.create_task(target.run(3, nothing))
        await until(lambda: server.running == 3)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        server.gate.set()
        await until(lambda: server.running == 0)


def test_the_numbers_of_a_batch() -> None:
    whole = Outcome(start=0, end=9, kind=End.OK, token_times=[1.0, 2.0, 4.0], usage=Usage(10, 3))
    packed = Outcome(start=0.5, end=9, kind=End.OK, token_times=[2.0, 3.0], usage=Usage(11, 3))
    short = Outcome(start=0, end=9, kind=End.OK, token_times=[3.0], usage=None)
    run = run_of([whole, packed, short], sequence_length=10, decode_length=3)
    assert run.prefill_s == (1.0, 1.5, 3.0)
    assert run.token_s == (1.0, 2.0, 1.0, 0.0)
    assert run.decode_s == (3.0, 1.0), "a short stream has no whole length"
    assert (run.prompt_tokens, run.decode_tokens, run.num_short) == (31, 4, 1)
    assert (run.prefill_wall_s, run.decode_wall_s) == (3.0, 3.0)
