"""What a command line means, and TGI's words for what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from text_generation_launcher.config import REFUSED, LauncherConfig, ModelSource, find_num_shard, resolve
from text_generation_launcher.devices import Devices
from text_generation_launcher.errors import ArgumentValidation, LauncherError, NotEnoughCUDADevices
from text_generation_launcher.flags import Flags, Switch

CPU = Devices(count=None, card=None)


def config(**flags: Any) -> LauncherConfig:
    return resolve(Flags(**flags), CPU)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"sharded": Switch.TRUE, "num_shard": 1}, "`sharded` is true but `num_shard` <= 1"),
        ({"num_shard": 0}, "`num_shard` cannot be < 1"),
        ({"model_id": " "}, "`model_id` must not be empty; without the flag it is `embedded`"),
        (
            {"max_input_tokens": 1, "max_input_length": 2},
            "Both `max_input_tokens` (1) and `max_input_length` (2) are set. Please define only `max_input_tokens` as "
            "`max_input_length is deprecated for naming consistency. ",
        ),
        (
            {"max_input_tokens": 10, "max_total_tokens": 10},
            "`max_input_tokens`(10) must be < `max_total_tokens`(10)",
        ),
        (
            {"max_input_length": 11, "max_total_tokens": 10},
            "`max_input_tokens`(11) must be < `max_total_tokens`(10)",
        ),
        ({"validation_workers": 0}, "`validation_workers` must be > 0"),
        (
            {"max_total_tokens": 11, "max_batch_total_tokens": 10},
            "`max_total_tokens` must be <= `max_batch_total_tokens`. Given: 11 and 10",
        ),
        (
            {"max_batch_prefill_tokens": 11, "max_batch_total_tokens": 10},
            "`max_batch_prefill_tokens` must be <= `max_batch_total_tokens`. Given: 11 and 10",
        ),
        ({"max_batch_size": 0}, "`max_batch_size` must be > 0"),
    ],
)
def test_argument_errors_in_tgis_words(flags: dict[str, Any], text: str) -> None:
    with pytest.raises(ArgumentValidation) as error:
        config(**flags)
    assert str(error.value) == text


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"api_key": ""}, "`api_key` must not be empty"),
        ({"api_key": " \n"}, "`api_key` must not be empty"),
        ({"max_input_tokens": 0}, "`max_input_tokens` must be > 0"),
        ({"max_input_length": 0}, "`max_input_tokens` must be > 0"),
        ({"max_total_tokens": 0}, "`max_total_tokens` must be > 1, one token of prompt and one of output. Given: 0"),
        ({"max_total_tokens": 1}, "`max_total_tokens` must be > 1, one token of prompt and one of output. Given: 1"),
        ({"max_batch_prefill_tokens": 0}, "`max_batch_prefill_tokens` must be > 0"),
        ({"max_batch_total_tokens": 0}, "`max_batch_total_tokens` must be > 0"),
        ({"max_concurrent_requests": 0}, "`max_concurrent_requests` must be > 0"),
        ({"master_port": 0}, "`master_port` must be > 0"),
        ({"waiting_served_ratio": float("inf")}, "`waiting_served_ratio` must be >= 0 and finite. Given: inf"),
        ({"waiting_served_ratio": float("nan")}, "`waiting_served_ratio` must be >= 0 and finite. Given: nan"),
        ({"waiting_served_ratio": -0.5}, "`waiting_served_ratio` must be >= 0 and finite. Given: -0.5"),
        ({"cuda_memory_fraction": 0.0}, "`cuda_memory_fraction` must be > 0 and <= 1. Given: 0.0"),
        ({"cuda_memory_fraction": float("nan")}, "`cuda_memory_fraction` must be > 0 and <= 1. Given: nan"),
    ],
)
def test_values_that_make_no_sense_are_refused_before_anything_starts(flags: dict[str, Any], text: str) -> None:
    with pytest.raises(ArgumentValidation) as error:
        config(**flags)
    assert str(error.value) == text


def test_the_least_that_can_be_served() -> None:
    least = {"max_input_tokens": 1, "max_total_tokens": 2, "max_batch_prefill_tokens": 1, "max_batch_total_tokens": 2}
    config(**least, max_batch_size=1, max_concurrent_requests=1, waiting_served_ratio=0.0, cuda_memory_fraction=0.01)


@pytest.mark.parametrize(
    ("sharded", "num_shard", "num_devices", "shards"),
    [
        (Switch.TRUE, None, 4, 4),
        (Switch.TRUE, 2, 4, 2),
        (Switch.FALSE, None, 4, 1),
        (Switch.FALSE, 2, 4, 2),
        (None, 3, None, 3),
        (None, None, 4, 4),
        (None, None, None, 1),
        (None, None, 0, 1),
    ],
)
def test_num_shard(sharded: Switch | None, num_shard: int | None, num_devices: int | None, shards: int) -> None:
    assert find_num_shard(sharded, num_shard, num_devices) == shards


@pytest.mark.parametrize("num_devices", [None, 0, 1])
def test_sharded_needs_devices(num_devices: int | None) -> None:
    with pytest.raises(NotEnoughCUDADevices, match=f"^`sharded` is true but only found {num_devices or 0} CUDA"):
        find_num_shard(Switch.TRUE, None, num_devices)


@pytest.mark.parametrize("name", REFUSED)
def test_a_flag_that_is_not_built_is_refused_by_name(name: str) -> None:
    with pytest.raises(ArgumentValidation, match=f"^`--{name.replace('_', '-')}.*` is not supported yet$"):
        config(**{name: True if name == "ngrok" else "1"})


@pytest.mark.parametrize(
    "flags",
    [
        {"speculate": "0"},
        {"cuda_graphs": "0"},
        {"quantize": ""},
        {"otlp_service_name": "text-generation-inference.router"},
        {"disable_custom_kernels": True},
    ],
)
def test_a_flag_that_asks_for_nothing_passes(flags: dict[str, Any]) -> None:
    config(**flags)


@pytest.mark.parametrize("text", ["1,", "-1", "1;2", "four", "1_0", "1.5"])
def test_cuda_graphs_are_numbers(text: str) -> None:
    with pytest.raises(ArgumentValidation, match=r"^`cuda_graphs` must be numbers with commas between"):
        config(cuda_graphs=text)


def test_a_secret_is_not_repeated_in_an_error() -> None:
    with pytest.raises(LauncherError) as error:
        config(ngrok_authtoken="hush")
    assert "hush" not in str(error.value)


def test_no_custom_kernels_means_torchs_own_attention() -> None:
    assert config(disable_custom_kernels=True).attention == "torch"
    assert config(attention="triton").attention == "triton"
    with pytest.raises(ArgumentValidation, match="contradict"):
        config(disable_custom_kernels=True, attention="triton")


@pytest.mark.parametrize("name", ["paged", "flashdecoding", "flashinfer"])
def test_tgis_attention_back_ends_are_refused_before_anything_starts(name: str) -> None:
    with pytest.raises(ArgumentValidation, match="not supported yet"):
        config(attention=name)


@pytest.mark.parametrize(
    ("given", "hostname"), [("::1", "::1"), ("10.1.2.3", "10.1.2.3"), ("localhost", "127.0.0.1"), ("pod-1", "0.0.0.0")]
)
def test_hostname(given: str, hostname: str) -> None:
    assert config(hostname=given).hostname == hostname
    assert bool(config(hostname=given).warnings) == (given == "pod-1")


def test_the_source_of_a_model(tmp_path: Path) -> None:
    assert config().source is ModelSource.EMBEDDED
    assert config(model_id=str(tmp_path)).source is ModelSource.FOLDER
    assert config(model_id="org/model").source is ModelSource.HUB
    with pytest.raises(ArgumentValidation, match="is no folder"):
        config(model_id=str(tmp_path / "missing"))


def test_the_old_name_of_max_input_tokens() -> None:
    assert config(max_input_length=12).max_input_tokens == 12


def test_compute_type() -> None:
    assert config(num_shard=2).compute_type == "2-cpu"
    assert resolve(Flags(), Devices(1, "nvidia-h200")).compute_type == "1-nvidia-h200"
