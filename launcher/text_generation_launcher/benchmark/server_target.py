"""A whole server over HTTP: as many streams at once as the batch has sequences."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence

from text_generation_launcher.benchmark.apis import Extras
from text_generation_launcher.benchmark.config import ApiName, BenchmarkConfig, ServerAddress
from text_generation_launcher.benchmark.detect import Connection, Server, check_limits, detect
from text_generation_launcher.benchmark.errors import BenchmarkError
from text_generation_launcher.benchmark.measurements import Run
from text_generation_launcher.benchmark.outcome import End, Outcome, send
from text_generation_launcher.benchmark.prompts import LocalTokenizer, TextTokenizer, exact_prompts
from text_generation_launcher.benchmark.target import Description, Surprises
from text_generation_launcher.benchmark.tokenizer import load_tokenizer

MAY_END_EARLY = (
    "This server has no field to go on behind the end of a sequence: streams may end before `--decode-length`."
)
COUNTS_NOTHING = "This server does not count tokens: every event of a stream is taken for one."


class ServerTarget:
    """Every run sends a batch of prompts at the same moment, each with a connection of its own."""

    def __init__(
        self, connection: Connection, server: Server, config: BenchmarkConfig, prompts: AsyncIterator[str]
    ) -> None:
        self.description = _describe(connection, server)
        self.surprises = Surprises()
        self._connection = connection
        self._server = server
        self._config = config
        self._prompts = prompts

    @classmethod
    async def open(cls, config: BenchmarkConfig, address: ServerAddress) -> ServerTarget:
        """Find out what the server speaks, and how it counts tokens. Raises: BenchmarkError."""
        connection = Connection(address)
        server = await detect(connection, address, config)
        check_limits(config, server.limits)
        tokenizer: TextTokenizer
        if server.name is ApiName.NATIVE and config.tokenizer_name is None:
            tokenizer = ServerTokenizer(connection)
        else:
            tokenizer = LocalTokenizer(load_tokenizer(config.tokenizer_name or server.model, config.revision))
        # Another choice every time: the server may still have the keys and values of the last benchmark.
        prompts = exact_prompts(tokenizer, config.sequence_length, random.Random())
        return cls(connection, server, config, prompts)

    async def run(self, batch_size: int, pause: Callable[[], None]) -> Run:
        prompts = [await anext(self._prompts) for _ in range(batch_size)]
        pause()
        connection, length = self._connection, self._config.decode_length
        async with asyncio.TaskGroup() as group:
            streams = [
                group.create_task(send(connection.url, self._server.api, prompt, length, api_key=connection.api_key))
                for prompt in prompts
            ]
        outcomes = [stream.result() for stream in streams]
        _check(outcomes, batch_size)
        self._count(outcomes)
        return run_of(outcomes, self._config.sequence_length, length)

    async def close(self) -> None:
        pass  # streams that were cancelled have closed their connections, which ends them on the server

    def _count(self, outcomes: Sequence[Outcome]) -> None:
        self.surprises.num_streams += len(outcomes)
        self.surprises.num_short += sum(num_tokens(outcome) < self._config.decode_length for outcome in outcomes)
        self.surprises.prompt_tokens |= {
            outcome.usage.prompt_tokens for outcome in outcomes if outcome.usage and outcome.usage.prompt_tokens
        }


class ServerTokenizer:
    """A TGI server's own tokenizer, by its route for it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def spans(self, text: str) -> list[tuple[int, int]]:
        answer = await self._connection.ask("/tokenize", {"inputs": text})
        tokens = answer.json
        if answer.status != 200 or not isinstance(tokens, list):
            raise BenchmarkError(
                f"{self._connection.url}/tokenize cannot count tokens (status {answer.status}): name the model's "
                "tokenizer with --tokenizer-name"
            )
        return [(token["start"], token["stop"]) for token in tokens]


def num_tokens(outcome: Outcome) -> int:
    """As the server counts them, else one an event."""
    return outcome.usage.output_tokens if outcome.usage else len(outcome.token_times)


def run_of(outcomes: Sequence[Outcome], sequence_length: int, decode_length: int) -> Run:
    """The numbers of one batch of good streams."""
    start = min(outcome.start for outcome in outcomes)
    firsts = [outcome.token_times[0] for outcome in outcomes]
    lasts = [outcome.token_times[-1] for outcome in outcomes]
    whole = [outcome for outcome in outcomes if num_tokens(outcome) >= decode_length > 1]
    return Run(
        batch_size=len(outcomes),
        prefill_s=tuple(outcome.ttft_s for outcome in outcomes),
        token_s=tuple(gap for outcome in outcomes for gap in outcome.gaps_s),
        decode_s=tuple(outcome.token_times[-1] - outcome.token_times[0] for outcome in whole),
        prompt_tokens=sum((outcome.usage and outcome.usage.prompt_tokens) or sequence_length for outcome in outcomes),
        decode_tokens=sum(num_tokens(outcome) - 1 for outcome in outcomes),
        prefill_wall_s=max(firsts) - start,
        # A server that is not done with the last prompt while others decode already is measured by both.
        decode_wall_s=max(lasts) - min(firsts),
        num_short=sum(num_tokens(outcome) < decode_length for outcome in outcomes),
    )


def _check(outcomes: Sequence[Outcome], batch_size: int) -> None:
    """Raises: BenchmarkError, if not every stream ended well."""
    bad = [outcome for outcome in outcomes if outcome.kind is not End.OK]
    if not bad:
        return
    detail = bad[0].detail
    remedy = ": lower --batch-size, or raise what the server takes at once" if detail.startswith("429") else ""
    raise BenchmarkError(f"{len(bad)} of {batch_size} requests failed at once, the first with: {detail}{remedy}")


def _describe(connection: Connection, server: Server) -> Description:
    notes = []
    if server.extras is not Extras.EXACT_LENGTH:
        notes.append(MAY_END_EARLY)
    if server.extras is Extras.NONE:
        notes.append(COUNTS_NOTHING)
    return Description(
        kind=server.api.path,
        address=connection.url,
        model=server.model,
        details={"Version": server.version} if server.version else {},
        notes=tuple(notes),
    )
