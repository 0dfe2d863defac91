"""Which API a server speaks, what it says of itself, and how to ask it for an exact number of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from text_generation_launcher.benchmark.apis import OPENAI, Api, Extras, native
from text_generation_launcher.benchmark.config import ApiName, BenchmarkConfig, ServerAddress
from text_generation_launcher.benchmark.errors import BenchmarkError
from text_generation_launcher.benchmark.http_client import Answer, ask
from text_generation_launcher.benchmark.outcome import End, send

ASK_LIMIT_S = 30.0
FIRST_ANSWER_LIMIT_S = 600.0
"""Some servers compile for minutes when the first request comes."""
PROBE = "The quick brown fox"


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    api: Api
    name: ApiName
    model: str
    version: str
    """Empty where it does not say."""
    limits: dict[str, int]
    """`max_input_tokens`, `max_total_tokens`, `max_concurrent_requests`, as far as it tells them."""
    extras: Extras
    """What it was found to take."""


class Connection:
    """The address of a server, and the key to it."""

    def __init__(self, address: ServerAddress) -> None:
        self.url = address.url
        self.api_key = address.api_key

    async def ask(self, path: str, body: dict[str, Any] | None = None) -> Answer:
        """Raises: BenchmarkError, when nobody answers or a key is missing."""
        try:
            answer = await ask(self.url, path, body, limit_s=ASK_LIMIT_S, api_key=self.api_key)
        except OSError as error:
            raise BenchmarkError(
                f"no answer from {self.url}{path} ({error}): is the server running, and is this its address?"
            ) from None
        if answer.status in (401, 403):
            what = "another key than" if self.api_key else "a key:"
            raise BenchmarkError(f"{self.url} wants {what} --api-key (or the variable API_KEY): status {answer.status}")
        return answer


async def detect(connection: Connection, address: ServerAddress, config: BenchmarkConfig) -> Server:
    """Raises: BenchmarkError, when the server speaks none of the APIs or refuses what is to be asked."""
    if address.api in (None, ApiName.NATIVE):
        info = (await connection.ask("/info")).json
        if isinstance(info, dict) and "model_id" in info and "max_total_tokens" in info:
            return _native(info, address, config)
        if address.api is ApiName.NATIVE:
            raise BenchmarkError(f"{connection.url}/info is not TGI's: leave `--api native` out")
    models = _models(await connection.ask("/v1/models"))
    if models is None and address.model is not None:
        models = {address.model: {}}  # a list is convenient, not necessary
    if models is None:
        raise BenchmarkError(
            f"{connection.url} is no server of TGI's API (/info) or OpenAI's (/v1/models): check the address, "
            "which may need a path in front of these, or name the --model of a server that lists none"
        )
    model = address.model or next(iter(models), "")
    if model not in models:
        raise BenchmarkError(f"{connection.url} has no model {model!r}; choose with --model from {', '.join(models)}")
    names: list[ApiName] = [address.api] if address.api else list(OPENAI)
    name, extras = await _find_route(connection, names, model, config)
    version = (await connection.ask("/version")).json  # of vLLM and SGLang
    return Server(
        api=OPENAI[name](model, config.sampling, extras),
        name=name,
        model=model,
        version=str(version.get("version", "")) if isinstance(version, dict) else "",
        limits=models[model],
        extras=extras,
    )


def _native(info: dict[str, Any], address: ServerAddress, config: BenchmarkConfig) -> Server:
    if address.model is not None:
        raise BenchmarkError("`--model` chooses among the models of an OpenAI server; TGI's API has one: leave it out")
    names = ("max_input_tokens", "max_total_tokens", "max_concurrent_requests")
    return Server(
        api=native(config.sampling),
        name=ApiName.NATIVE,
        model=str(info["model_id"]),
        version=str(info.get("version") or ""),
        limits={name: info[name] for name in names if isinstance(info.get(name), int)},
        extras=Extras.USAGE,
    )


def _models(answer: Answer) -> dict[str, dict[str, int]] | None:
    """The limits of each model by its name; None when this is no list of models."""
    content = answer.json
    listed = content.get("data") if isinstance(content, dict) and answer.status == 200 else None
    if not isinstance(listed, list):
        return None
    models: dict[str, dict[str, int]] = {}
    for model in listed:
        if isinstance(model, dict) and "id" in model:
            length = model.get("max_model_len")  # vLLM's and SGLang's
            models[str(model["id"])] = {"max_total_tokens": length} if isinstance(length, int) else {}
    return models or None


async def _find_route(
    connection: Connection, names: list[ApiName], model: str, config: BenchmarkConfig
) -> tuple[ApiName, Extras]:
    """The first route there is, with as many of the extra fields as it takes."""
    refusal = ""
    for name in names:
        for extras in Extras:
            outcome = await send(
                connection.url,
                OPENAI[name](model, config.sampling, extras),
                PROBE,
                2,
                FIRST_ANSWER_LIMIT_S,
                connection.api_key,
            )
            if outcome.kind is End.OK:
                return name, extras
            refusal = f"{name}: {outcome.detail}"
            if outcome.detail[:3] in ("404", "405", "501"):  # not there; with other fields no more than with these
                break
    raise BenchmarkError(f"{connection.url} refuses a request of two tokens ({refusal})")


def check_limits(config: BenchmarkConfig, limits: dict[str, int]) -> None:
    """Raises: BenchmarkError for what the server would refuse in the middle of the benchmark."""
    asked: dict[str, tuple[int, str]] = {
        "max_input_tokens": (config.sequence_length, "--sequence-length"),
        "max_total_tokens": (config.sequence_length + config.decode_length, "--sequence-length and --decode-length"),
        "max_concurrent_requests": (config.batch_sizes[-1], "--batch-size"),
    }
    for name, limit in limits.items():
        number, flags = asked[name]
        if number > limit:
            raise BenchmarkError(
                f"{flags} ask for {number}, the server's {name} is {limit}: lower the former or raise the latter"
                if " and " in flags
                else f"`{flags} {number}` is more than the server's {name}, {limit}: lower it, or raise that"
            )
