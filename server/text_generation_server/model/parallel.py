"""Tensor parallelism: loaded by transformers' plan, executed by our own modules.

The library's ``tp_plan`` knows how each family splits, and with it every rank reads only its slices of the safetensors
files. What it leaves behind is made for training as well: parameters are DTensors, and hooks wrap and unwrap them in
every call. For serving both are removed. A rank keeps plain local tensors, and one collective stands at each place
where the plan joins the ranks again.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from text_generation_server.config import ConfigError
from text_generation_server.distributed import Group

LOCAL = frozenset(
    {"colwise", "packed_colwise", "packed_rowwise", "replicated_with_grad_allreduce", "mla_kv_a_proj", "local_params",
     "replicate"}
)  # fmt: skip
"""Styles in which a rank works on its own slice and joins nobody."""


class RowParallelLinear(nn.Module):
    """Each rank multiplies its slice of the input; the sums are added up, the bias once."""

    def __init__(self, linear: nn.Linear, group: Group, *, splits_input: bool) -> None:
        super().__init__()
        self.bias: Tensor | None = linear.bias
        linear.register_parameter("bias", None)
        self.linear = linear
        self.group = group
        self.out_features, local_features = linear.weight.shape
        self.in_features = linear.in_features if splits_input else local_features
        starts = shard_starts(linear.in_features, group.world_size)
        self.slice = slice(starts[group.rank], starts[group.rank + 1]) if splits_input else None
        linear.in_features = local_features

    @property
    def weight(self) -> Tensor:
        return self.linear.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x if self.slice is None else x[..., self.slice])
        out = self.group.all_reduce(out.contiguous())
        return out if self.bias is None else out + self.bias


class GatheredLinear(nn.Module):
    """Each rank computes its slice of the output; all get the whole."""

    def __init__(self, linear: nn.Linear, group: Group) -> None:
        super().__init__()
        starts = shard_starts(linear.out_features, group.world_size)
        self.sizes = [stop - start for start, stop in itertools.pairwise(starts)]
        self.in_features, self.out_features = linear.in_features, linear.out_features
        linear.out_features = linear.weight.shape[0]
        self.linear = linear
        self.group = group

    @property
    def weight(self) -> Tensor:
        return self.linear.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.group.all_gather_last(self.linear(x), self.sizes)


class VocabParallelEmbedding(nn.Module):
    """Each rank looks up the tokens of its slice of the vocabulary; the others contribute zero."""

    def __init__(self, embedding: nn.Embedding, group: Group) -> None:
        super().__init__()
        starts = shard_starts(embedding.num_embeddings, group.world_size)
        self.first, self.stop = starts[group.rank], starts[group.rank + 1]
        embedding.num_embeddings = embedding.weight.shape[0]
        embedding.padding_idx = None  # an index into the whole vocabulary, and of use in training only
        self.embedding = embedding
        self.group = group

    @property
    def weight(self) -> Tensor:
        return self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        foreign = (ids < self.first) | (ids >= self.stop)
        out: Tensor = self.embedding((ids - self.first).masked_fill(foreign, 0))
        return self.group.all_reduce(out.masked_fill(foreign[..., None], 0))


class SummedOutput(nn.Module):
    """A module whose outputs on the ranks are parts of a sum, such as experts that each rank holds a slice of."""

    def __init__(self, module: nn.Module, group: Group) -> None:
        super().__init__()
        self.module = module
        self.group = group

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.module(*args, **kwargs)
        return out if out is None else self.group.all_reduce(out.contiguous())


def _joined(style: str, module: nn.Module, group: Group) -> nn.Module:
    """The module that stands where the plan says ``style``."""
    if style in ("rowwise", "rowwise_split_input", "rowwise_rep") and isinstance(module, nn.Linear):
        return RowParallelLinear(module, group, splits_input=style != "rowwise")
    if style in ("colwise_gather_output", "colwise_rep") and isinstance(module, nn.Linear):
        return GatheredLinear(module, group)
    if style == "embedding_rowwise" and isinstance(module, nn.Embedding):
        return VocabParallelEmbedding(module, group)
    if style in ("moe_tp_experts", "all_reduce"):
        return SummedOutput(module, group)
    if style in LOCAL:
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        return module
    raise ConfigError(f"tensor parallel style `{style}` of a {type(module).__name__} is not known: use --num-shard 1")


def check_splittable(model_config: Any, text_config: Any, model_type: str, world_size: int) -> None:
    """Refuse before anything is read. Raises: ConfigError, saying what to do."""
    plan: dict[str, str] = dict(getattr(model_config, "base_model_tp_plan", None) or {})
    if not plan:
        raise ConfigError(
            f"model type `{model_type}` cannot be split over {world_size} shards: transformers has no tensor parallel"
            " plan for it; use --num-shard 1"
        )
    if not splits_attention(plan):
        return
    query_heads = text_config.num_attention_heads
    kv_heads = getattr(text_config, "num_key_value_heads", None) or query_heads
    for count, what in ((query_heads, "attention heads"), (kv_heads, "key/value heads")):
        if isinstance(count, int) and count % world_size:
            choices = [str(n) for n in range(1, kv_heads + 1) if kv_heads % n == 0 and query_heads % n == 0]
            raise ConfigError(
                f"model type `{model_type}` cannot be split over {world_size} shards: it has {count} {what};"
                f" use --num-shard {' or '.join(choices)}"
            )


def splits_attention(plan: Mapping[str, str]) -> bool:
    """Whether each rank has heads of its own; else attention is whole on every rank."""
    return any(style == "colwise" and "att" in name for name, style in plan.items())


def is_split(parameter: str, plan: Mapping[str, str]) -> bool:
    """Whether a rank holds only its slice of a parameter, by the plan of the whole model."""
    owner, _, name = parameter.rpartition(".")
    style = plan.get(_wildcard(parameter)) or plan.get(_wildcard(owner)) or ""
    return "colwise" in style or ("rowwise" in style and name != "bias")


@contextlib.contextmanager
def loading(group: Group) -> Iterator[Any]:
    """Yields the library's configuration for loading this rank's slices."""
    from transformers.distributed.configuration_utils import DistributedConfig

    previous = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(group.device.index or 0)  # where the library looks for the rank's device
    try:
        yield DistributedConfig(tp_size=group.world_size)
    finally:
        if previous is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = previous


@torch.no_grad()
def parallelize(model: Any, group: Group) -> None:
    """Turn a model that was loaded by its plan into plain modules and collectives.

    Raises: ConfigError for a style that we do not know.
    """
    plan: dict[str, str] = model.tp_plan
    for module in model.modules():
        if "forward" in vars(module):  # the library's hook, in front of the class's own forward
            del module.forward
    for name in _localize_parameters(model):
        owner, _, _ = name.rpartition(".")
        if plan.get(_wildcard(name)) is None and plan.get(_wildcard(owner)) is None:
            raise ConfigError(f"`{name}` was split by no rule of the tensor parallel plan: use --num-shard 1")
    for name, module in list(model.named_modules()):
        style = plan.get(_wildcard(name))
        if style is None:
            continue
        parent_name, _, child_name = name.rpartition(".")
        replacement = _joined(style, module, group)
        if replacement is not module:
            setattr(model.get_submodule(parent_name), child_name, replacement)


def _wildcard(name: str) -> str:
    """As plans write names: ``model.layers.3.mlp`` is ``model.layers.*.mlp``."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _localize_parameters(model: nn.Module) -> list[str]:
    """DTensors become this rank's plain tensors; weights that are tied stay one tensor. Returns their names."""
    local: dict[int, nn.Parameter] = {}
    names = []
    for module_name, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            to_local = getattr(parameter, "to_local", None)
            if to_local is None:
                continue
            names.append(f"{module_name}.{name}")
            if id(parameter) not in local:
                local[id(parameter)] = nn.Parameter(to_local().detach(), requires_grad=False)
            module.register_parameter(name, local[id(parameter)])
    return names


def shard_starts(size: int, world_size: int) -> list[int]:
    """Where each rank's slice of a dimension begins, and its end: equal slices, the last may be shorter."""
    each = -(-size // world_size)
    return [min(size, rank * each) for rank in range(world_size)] + [size]
