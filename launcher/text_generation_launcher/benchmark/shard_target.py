"""A shard, measured step by step with nothing between: no router, no queue, no text."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

from text_generation_proto.v1 import generate_pb2 as pb

from text_generation_launcher.benchmark.config import BenchmarkConfig, Sampling, ShardAddress
from text_generation_launcher.benchmark.errors import BenchmarkError
from text_generation_launcher.benchmark.measurements import Run
from text_generation_launcher.benchmark.prompts import prompt_ids
from text_generation_launcher.benchmark.shard_group import ShardGroup
from text_generation_launcher.benchmark.target import Description, Surprises
from text_generation_launcher.benchmark.tokenizer import load_tokenizer
from text_generation_launcher.sockets import launched_sockets

DEFAULT_SOCKET = Path("/tmp/text-generation-server-0")
"""Of `text-generation-server serve` without `--uds-path`, as in TGI."""
IN_USE = (
    "This shard belongs to a launched server: a request to its router during the benchmark ends the benchmark, or "
    "begins anew when that has ended."
)


def find_socket(given: Path | None) -> Path:
    """The socket of rank 0: the one that was named, else TGI's default, else that of the one launched server.

    Raises: BenchmarkError, when there is none or nobody can say which.
    """
    if given is None and not DEFAULT_SOCKET.exists():
        found = launched_sockets()
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(map(str, found))
            raise BenchmarkError(f"several servers run here: choose a shard with --master-shard-uds-path from {names}")
        raise BenchmarkError(
            f"there is no shard at {DEFAULT_SOCKET} and no launched server of this user: start `text-generation-server "
            "serve MODEL`, name a socket with --master-shard-uds-path, or a server with --url"
        )
    socket = given or DEFAULT_SOCKET
    if not socket.exists():
        others = f"; launched servers have {', '.join(map(str, found))}" if (found := launched_sockets()) else ""
        raise BenchmarkError(f"there is no socket {socket}: start a shard there, or name the socket of another{others}")
    if not socket.is_socket():
        raise BenchmarkError(
            f"{socket} is not a socket: give --master-shard-uds-path the one of a shard, `-0` at its end"
        )
    if not os.access(socket, os.R_OK | os.W_OK):
        raise BenchmarkError(f"the socket {socket} belongs to another user: run this as the user who started the shard")
    return socket


class ShardTarget:
    """Every run is a prefill of the whole batch in one step, then decode steps of all rows."""

    def __init__(self, group: ShardGroup, config: BenchmarkConfig, ids: list[int], description: Description) -> None:
        self.description = description
        self.surprises = Surprises()
        self._group = group
        self._config = config
        self._ids = ids
        self._next_id = 1

    @classmethod
    async def open(cls, config: BenchmarkConfig, address: ShardAddress) -> ShardTarget:
        """Connect, and make sure that the largest batch fits. Raises: BenchmarkError."""
        socket = find_socket(address.socket)
        group = await ShardGroup.connect(socket)
        try:
            info = group.info
            _check_positions(config, info)
            tokenizer = load_tokenizer(config.tokenizer_name or info.tokenizer_path, config.revision)
            ids = prompt_ids(tokenizer, config.sequence_length, info.vocab_size)
            await _make_room(group, config)
            await group.begin_epoch()
        except BaseException:
            await group.close()
            raise
        return cls(group, config, ids, _describe(info, socket))

    async def run(self, batch_size: int, pause: Callable[[], None]) -> Run:
        ids = list(range(self._next_id, self._next_id + batch_size))
        self._next_id += batch_size
        prefill = self._prefill(ids)
        decode = pb.Decode(sequence_ids=ids)
        started = time.perf_counter()
        await self._group.prefill(prefill)
        prefill_s = time.perf_counter() - started
        token_s = []
        for _ in range(self._config.decode_length - 1):
            pause()
            started = time.perf_counter()
            await self._group.decode(decode, [])
            token_s.append(time.perf_counter() - started)
        await self._group.decode(pb.Decode(), ids)
        return Run(
            batch_size=batch_size,
            prefill_s=(prefill_s,),
            token_s=tuple(token_s),
            decode_s=(sum(token_s),) if token_s else (),
            prompt_tokens=batch_size * len(self._ids),
            decode_tokens=batch_size * len(token_s),
            prefill_wall_s=prefill_s,
            decode_wall_s=sum(token_s),
        )

    async def close(self) -> None:
        # The step that was interrupted ends first; a shard that is gone has nothing left to drop.
        with contextlib.suppress(BenchmarkError):
            await self._group.begin_epoch()
        await self._group.close()

    def _prefill(self, sequence_ids: list[int]) -> pb.Prefill:
        config, num_tokens = self._config, len(self._ids)
        per_sequence = _blocks_of_one(config, self._group.info.block_size)
        return pb.Prefill(
            new_sequences=[
                pb.NewSequence(
                    sequence_id=sequence_id,
                    token_ids=self._ids,
                    num_prompt_tokens=num_tokens,
                    # Block 0 is never handed out.
                    blocks=range(1 + row * per_sequence, 1 + (row + 1) * per_sequence),
                    sampling=sampling_parameters(config.sampling, seed=sequence_id),
                    top_n_tokens=config.sampling.top_n_tokens or 0,
                )
                for row, sequence_id in enumerate(sequence_ids)
            ],
            chunks=[pb.Chunk(sequence_id=sequence_id, num_tokens=num_tokens) for sequence_id in sequence_ids],
        )


def sampling_parameters(sampling: Sampling, *, seed: int) -> pb.SamplingParameters:
    """What was not given is neutral."""
    return pb.SamplingParameters(
        temperature=1.0 if sampling.temperature is None else sampling.temperature,
        top_k=sampling.top_k or 0,
        top_p=1.0 if sampling.top_p is None else sampling.top_p,
        typical_p=1.0 if sampling.typical_p is None else sampling.typical_p,
        repetition_penalty=1.0 if sampling.repetition_penalty is None else sampling.repetition_penalty,
        frequency_penalty=sampling.frequency_penalty or 0.0,
        do_sample=sampling.samples,
        seed=seed,
        watermark=sampling.watermark,
    )


def _blocks_of_one(config: BenchmarkConfig, block_size: int) -> int:
    """Blocks of one sequence. Its last token is no longer an input, so it needs no place."""
    return -(-(config.sequence_length + config.decode_length - 1) // block_size)


def _check_positions(config: BenchmarkConfig, info: pb.InfoResponse) -> None:
    longest = config.sequence_length + config.decode_length
    if 0 < info.max_position_embeddings < longest:
        raise BenchmarkError(
            f"`--sequence-length {config.sequence_length}` and `--decode-length {config.decode_length}` make {longest} "
            f"tokens, the model has {info.max_position_embeddings} positions; shorten one of them"
        )
    top_n = config.sampling.top_n_tokens or 0
    if top_n > info.vocab_size:
        raise BenchmarkError(f"`--top-n-tokens {top_n}` exceeds the vocabulary of {info.vocab_size}")


async def _make_room(group: ShardGroup, config: BenchmarkConfig) -> None:
    """A KV cache for the largest batch: the launched server's own where there is one, else one of that size.

    Raises: BenchmarkError, when it does not fit or somebody else's sequences are in it.
    """
    info, healths = group.info, await group.health()
    if running := max(health.num_sequences for health in healths):
        raise BenchmarkError(
            f"this shard is at work on {running} sequences of others, which a benchmark would end: wait until its "
            "server is idle, or measure the server as it is with --url"
        )
    batch_size = config.batch_sizes[-1]
    needed = batch_size * _blocks_of_one(config, info.block_size)
    batch = f"a batch of {batch_size} x ({config.sequence_length} + {config.decode_length}) tokens"
    if info.launcher_nonce:
        # Its router knows these blocks; another number would be the end of it.
        present = min(health.num_blocks for health in healths)
        if present == 0:
            raise BenchmarkError("this server is still starting: wait until it says that it is ready")
        if needed > present:
            raise BenchmarkError(
                f"{batch} needs {needed} blocks of KV cache, this server has {present}: choose a smaller --batch-size, "
                "--sequence-length or --decode-length, or start it with a larger --max-batch-total-tokens"
            )
        return
    if needed * info.block_size >= 2**32:  # the contract's integers end here
        raise BenchmarkError(
            f"{batch} does not fit: choose a smaller --batch-size, --sequence-length or --decode-length"
        )
    try:
        await group.warm_up(
            pb.WarmupRequest(
                max_batch_prefill_tokens=batch_size * config.sequence_length,
                max_batch_total_tokens=needed * info.block_size,
                max_batch_size=batch_size,
                max_total_tokens=config.sequence_length + config.decode_length,
                max_concurrent_requests=batch_size,
            )
        )
    except BenchmarkError as error:
        reason = str(error).partition("; decrease")[0]  # the shard's remedy is for a launcher's flags
        raise BenchmarkError(
            f"{batch} does not fit: choose a smaller --batch-size, --sequence-length or --decode-length ({reason})"
        ) from None


def _describe(info: pb.InfoResponse, socket: Path) -> Description:
    details = {"Dtype": info.dtype, "Device": info.device_type, "Attention": f"{info.attention_impl} attention"}
    if info.world_size > 1:
        details["Shards"] = f"{info.world_size} shards"
    return Description(
        kind="shard",
        address=str(socket),
        model=info.model_id,
        details=details,
        notes=(IN_USE,) if info.launcher_nonce else (),
    )
