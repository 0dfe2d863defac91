"""Rank, world size and the collectives of tensor parallelism: NCCL on CUDA, gloo on CPU, nothing for one shard."""

from __future__ import annotations

import datetime
import logging
import os
import socket
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from text_generation_server.config import ConfigError, ShardConfig

logger = logging.getLogger(__name__)

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})

JOIN_TIMEOUT = datetime.timedelta(minutes=5)
"""For all ranks to meet, and for a peer in a collective: past it a rank fails, and its process ends with it."""


@dataclass(frozen=True, slots=True)
class Group:
    """The ranks that run one model together."""

    rank: int
    world_size: int
    device: torch.device

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_gather_last(self, tensor: Tensor, sizes: list[int]) -> Tensor:
        """Concatenate the ranks' tensors along the last dimension, where rank r holds ``sizes[r]``."""
        if self.world_size == 1:
            return tensor
        widest = max(sizes)
        if tensor.shape[-1] < widest:  # gloo gathers equal shapes only
            tensor = torch.nn.functional.pad(tensor, (0, widest - tensor.shape[-1]))
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in sizes]
        dist.all_gather(parts, tensor)
        return torch.cat([part[..., :size] for part, size in zip(parts, sizes, strict=True)], -1)

    def broadcast(self, tensor: Tensor, *, source: int = 0) -> Tensor:
        """Fill the tensor with the source rank's, in place."""
        if self.world_size > 1:
            dist.broadcast(tensor, source)
        return tensor

    def close(self) -> None:
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def local_device(rank: int) -> torch.device:
    """The accelerator of a rank on this node, or the CPU. Raises: ConfigError if there are fewer accelerators."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if rank >= torch.cuda.device_count():
        raise ConfigError(f"shard {rank} has no GPU: {torch.cuda.device_count()} visible; lower --num-shard")
    return torch.device("cuda", rank)


def join(config: ShardConfig) -> Group:
    """Meet the other ranks at ``master_addr:master_port``. One shard meets nobody and opens no port.

    Raises: ConfigError if they do not come within ``JOIN_TIMEOUT``.
    """
    device = local_device(config.rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if config.world_size == 1:
        return Group(0, 1, device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend,
            store=_meeting_place(config),
            rank=config.rank,
            world_size=config.world_size,
            timeout=JOIN_TIMEOUT,
            device_id=device if backend == "nccl" else None,
        )
    except (OSError, RuntimeError, ValueError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"shard {config.rank} of {config.world_size} could not join its peers: {first_line}"
        ) from error
    logger.info("rank %d of %d joined over %s", config.rank, config.world_size, backend)
    return Group(config.rank, config.world_size, device)


def _meeting_place(config: ShardConfig) -> Any:
    """The store that rank 0 keeps. Ranks of one node meet on the loopback interface, which no other machine reaches.

    Left to itself the store listens on every interface, and anybody who reaches it can write to it; so rank 0 listens
    on its own socket and hands it over. What a launch writes carries its nonce: a rank of another launch that was given
    the same port finds nothing of this one, and this one nothing of it.
    """
    on_loopback = config.master_addr in LOOPBACK
    address = "127.0.0.1" if on_loopback else config.master_addr
    if on_loopback:
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, "lo")
    listening: dict[str, Any] = {}
    if config.rank == 0:
        with socket.create_server((address, config.master_port), backlog=config.world_size * 4) as server:
            listening["master_listen_fd"] = server.detach()  # the store closes it
    store = dist.TCPStore(  # type: ignore[attr-defined]
        address,
        config.master_port,
        is_master=config.rank == 0,
        timeout=JOIN_TIMEOUT,
        wait_for_workers=False,  # it would count whoever connects
        **listening,
    )
    return dist.PrefixStore(f"{config.launcher_nonce}/{config.incarnation}", store)  # type: ignore[attr-defined]


def alone(device: torch.device | None = None) -> Group:
    """The group of a single shard."""
    return Group(0, 1, device or torch.device("cpu"))
