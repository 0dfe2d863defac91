"""Work for a client ends when the client goes away. Starlette cancels nothing by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

Result = TypeVar("Result")


class ClientGone(Exception):
    """The connection has ended: there is nobody left to answer."""


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Run ``work`` to its end, or cancel it and wait for its cleanup when the client disconnects.

    The body must have been read: from then on ``receive`` returns only a disconnect.
    Raises: what ``work`` raises; ClientGone.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        watching.cancel()
        if not working.done():
            working.cancel()
            # Its permit and blocks are free only when its cleanup has run.
            await asyncio.wait((working,))
            if not working.cancelled():
                working.exception()  # retrieved: a failure while it was torn down interests nobody


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
