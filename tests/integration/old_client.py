"""Makes calls with the package `text-generation`, in the environment of `make clients`, and prints what it returns.

    clients/bin/python old_client.py URL < calls.json

A call is ``[method, prompt, options]``; for each there is one value in the printed list: what the method returned,
a list of what it streamed, or ``{"error": class, "message": text}``. ``async`` as a third argument uses `AsyncClient`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from text_generation import AsyncClient, Client  # type: ignore[import-not-found]  # in an environment of its own

TIMEOUT_S = 120


def call(client: Any, method: str, prompt: Any, options: dict[str, Any]) -> Any:
    try:
        returned = getattr(client, method)(prompt, **options)
        if method == "generate_stream" or options.get("stream"):
            return [response.model_dump(mode="json") for response in returned]
        return returned.model_dump(mode="json")
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}


async def async_call(client: Any, method: str, prompt: Any, options: dict[str, Any]) -> Any:
    try:
        if method == "generate_stream":
            return [response.model_dump(mode="json") async for response in client.generate_stream(prompt, **options)]
        returned = await getattr(client, method)(prompt, **options)
        if options.get("stream"):
            return [response.model_dump(mode="json") async for response in returned]
        return returned.model_dump(mode="json")
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}


async def async_calls(url: str, calls: list[Any]) -> list[Any]:
    client = AsyncClient(url, timeout=TIMEOUT_S)
    return [await async_call(client, *each) for each in calls]


def main() -> None:
    url, calls = sys.argv[1], json.load(sys.stdin)
    if sys.argv[2:] == ["async"]:
        results = asyncio.run(async_calls(url, calls))
    else:
        client = Client(url, timeout=TIMEOUT_S)
        results = [call(client, *each) for each in calls]
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main()
