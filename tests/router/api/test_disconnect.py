"""Work ends with the connection it is for."""

from __future__ import annotations

import asyncio

import pytest
from starlette.types import Message, Receive
from text_generation_router.api.disconnect import ClientGone, until_disconnect


def client(stays: asyncio.Event) -> Receive:
    """Disconnects when the event is set."""

    async def receive() -> Message:
        await stays.wait()
        return {"type": "http.disconnect"}

    return receive


async def test_work_that_ends_first_gives_its_result() -> None:
    async def work() -> int:
        await asyncio.sleep(0)
        return 3

    assert await until_disconnect(client(asyncio.Event()), work()) == 3


async def test_an_error_of_the_work_comes_through() -> None:
    async def work() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        await until_disconnect(client(asyncio.Event()), work())


@pytest.mark.parametrize("cleanup_fails", [False, True])
async def test_a_disconnect_cancels_and_waits_for_the_cleanup(cleanup_fails: bool) -> None:
    gone = asyncio.Event()
    cleaned = False

    async def work() -> None:
        nonlocal cleaned
        try:
            gone.set()
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            cleaned = True
            if cleanup_fails:
                raise KeyError("x")

    with pytest.raises(ClientGone):
        await until_disconnect(client(gone), work())
    assert cleaned


async def test_a_cancelled_server_cancels_the_work() -> None:
    started = asyncio.Event()
    cancelled = asyncio.Event()

    async def work() -> None:
        try:
            started.set()
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    task = asyncio.create_task(until_disconnect(client(asyncio.Event()), work()))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cancelled.is_set()
