"""Configuration of a benchmark: flags are checked and completed once, then frozen."""

from __future__ import annotations

import enum
import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from text_generation_launcher.benchmark.errors import BenchmarkError

BATCH_SIZES = (1, 2, 4, 8, 16, 32)
"""TGI's default."""
STANDARD_OUTPUT = "-"
PLOT_FORMATS = (".png", ".svg", ".pdf")
EXTRA = 'pip install "text-generation-inference[benchmark]"'


class ApiName(enum.StrEnum):
    """The routes that a server can be measured by."""

    NATIVE = "native"
    COMPLETIONS = "completions"
    CHAT = "chat"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """TGI's sampling flags; None is not given."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    watermark: bool = False
    do_sample: bool = False
    top_n_tokens: int | None = None

    @property
    def samples(self) -> bool:
        """As in TGI, what reshapes the distribution asks for sampling, ``do_sample`` or not."""
        narrowed = (self.top_k, self.top_p, self.typical_p)
        return self.do_sample or self.temperature not in (None, 1.0) or any(value is not None for value in narrowed)


GREEDY = Sampling()


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags:
    """The command line as given, environment included."""

    tokenizer_name: str | None = None
    revision: str = "main"
    batch_size: list[int] | None = None
    sequence_length: int = 10
    decode_length: int = 8
    runs: int = 10
    warmups: int = 1
    master_shard_uds_path: str | None = None
    url: str | None = None
    api: ApiName | None = None
    model: str | None = None
    api_key: str | None = None
    json: str | None = None
    plot: str | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    watermark: bool = False
    do_sample: bool = False
    top_n_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardAddress:
    socket: Path | None
    """Of rank 0; None: where a shard usually is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerAddress:
    url: str
    """Without ``/v1`` and without a slash at its end."""
    api: ApiName | None
    """None: whatever it speaks."""
    model: str | None
    """None: the first one that it lists."""
    api_key: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkConfig:
    target: ShardAddress | ServerAddress
    tokenizer_name: str | None
    """Folder, file or hub id; None: what the target says of itself."""
    revision: str
    batch_sizes: tuple[int, ...]
    sequence_length: int
    """Tokens of each prompt."""
    decode_length: int
    """Tokens that each sequence generates; the prefill yields the first of them."""
    runs: int
    warmups: int
    sampling: Sampling
    json: str | None
    """A file, or `STANDARD_OUTPUT`."""
    plot: Path | None


def resolve(flags: Flags) -> BenchmarkConfig:
    """Raises: BenchmarkError naming the flag."""
    for name in ("sequence_length", "decode_length", "runs"):
        if getattr(flags, name) < 1:
            raise BenchmarkError(f"`--{name.replace('_', '-')}` must be at least 1, got {getattr(flags, name)}")
    if flags.warmups < 0:
        raise BenchmarkError(f"`--warmups` must not be negative, got {flags.warmups}")
    batch_sizes = tuple(sorted(set(flags.batch_size or BATCH_SIZES)))
    if batch_sizes[0] < 1:
        raise BenchmarkError(f"`--batch-size` must be at least 1, got {batch_sizes[0]}")
    return BenchmarkConfig(
        target=_target(flags),
        tokenizer_name=flags.tokenizer_name or None,
        revision=flags.revision,
        batch_sizes=batch_sizes,
        sequence_length=flags.sequence_length,
        decode_length=flags.decode_length,
        runs=flags.runs,
        warmups=flags.warmups,
        sampling=_sampling(flags),
        json=_json(flags.json),
        plot=_plot(flags.plot),
    )


def _target(flags: Flags) -> ShardAddress | ServerAddress:
    if flags.url is None:
        for name in ("api", "model"):
            if getattr(flags, name) is not None:
                raise BenchmarkError(f"`--{name}` is about the server of `--url`: give that too, or leave it out")
        socket = flags.master_shard_uds_path
        return ShardAddress(socket=Path(socket).absolute() if socket else None)
    if flags.master_shard_uds_path is not None:
        raise BenchmarkError("`--url` measures a server and `--master-shard-uds-path` a shard: give one of them")
    address = urlsplit(flags.url)
    if address.scheme not in ("http", "https") or not address.hostname or address.query or address.fragment:
        raise BenchmarkError(f"`--url {flags.url}` is no address of a server, such as http://127.0.0.1:3000")
    try:
        _ = address.port
    except ValueError as error:
        raise BenchmarkError(f"`--url {flags.url}`: {error}") from None
    # OpenAI's clients are given the address with /v1.
    url = flags.url.rstrip("/").removesuffix("/v1")
    return ServerAddress(url=url, api=flags.api, model=flags.model, api_key=flags.api_key or None)


def _sampling(flags: Flags) -> Sampling:
    """The rules are TGI's, which a server would refuse by as well, in the middle of a benchmark."""
    for name in ("temperature", "repetition_penalty"):
        value = getattr(flags, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise BenchmarkError(f"`--{name.replace('_', '-')}` must be above 0, got {value}")
    for name in ("top_p", "typical_p"):
        value = getattr(flags, name)
        if value is not None and not 0 < value < 1:
            raise BenchmarkError(f"`--{name.replace('_', '-')}` must be above 0 and below 1, got {value}")
    if flags.top_k is not None and flags.top_k < 1:
        raise BenchmarkError(f"`--top-k` must be at least 1, got {flags.top_k}")
    if flags.top_n_tokens is not None and flags.top_n_tokens < 0:
        raise BenchmarkError(f"`--top-n-tokens` must not be negative, got {flags.top_n_tokens}")
    if flags.frequency_penalty is not None and not -2 <= flags.frequency_penalty <= 2:
        raise BenchmarkError(f"`--frequency-penalty` must be in -2 to 2, got {flags.frequency_penalty}")
    return Sampling(
        temperature=flags.temperature,
        top_k=flags.top_k,
        top_p=flags.top_p,
        typical_p=flags.typical_p,
        repetition_penalty=flags.repetition_penalty,
        frequency_penalty=flags.frequency_penalty,
        watermark=flags.watermark,
        do_sample=flags.do_sample,
        top_n_tokens=flags.top_n_tokens or None,
    )


def _json(name: str | None) -> str | None:
    if name not in (None, STANDARD_OUTPUT):
        _check_folder("--json", Path(str(name)))
    return name


def _plot(name: str | None) -> Path | None:
    """Found out now: nobody wants to learn after an hour that the plot cannot be drawn."""
    if name is None:
        return None
    path = Path(name)
    if path.suffix.lower() not in PLOT_FORMATS:
        raise BenchmarkError(f"`--plot {name}` must end in {', '.join(PLOT_FORMATS)}")
    _check_folder("--plot", path)
    if importlib.util.find_spec("matplotlib") is None:
        raise BenchmarkError(f"`--plot` needs matplotlib, which is not installed: {EXTRA}")
    return path


def _check_folder(flag: str, path: Path) -> None:
    if not path.absolute().parent.is_dir():
        raise BenchmarkError(f"`{flag} {path}`: there is no folder {path.absolute().parent}")
    if path.is_dir():
        raise BenchmarkError(f"`{flag} {path}` is a folder; name a file in it")
