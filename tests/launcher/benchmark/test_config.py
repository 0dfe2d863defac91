"""Every flag is honoured or refused with the reason."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest
from text_generation_launcher.benchmark.config import ApiName, Flags, Sampling, ServerAddress, ShardAddress, resolve
from text_generation_launcher.benchmark.errors import BenchmarkError

URL = "http://127.0.0.1:3000"


def test_defaults_are_tgis() -> None:
    resolved = resolve(Flags())
    assert resolved.target == ShardAddress(socket=None)
    assert resolved.batch_sizes == (1, 2, 4, 8, 16, 32)
    assert (resolved.sequence_length, resolved.decode_length, resolved.runs, resolved.warmups) == (10, 8, 10, 1)
    assert resolved.revision == "main"
    assert resolved.sampling == Sampling()
    assert not resolved.sampling.samples


def test_batch_sizes_are_measured_once_and_in_order() -> None:
    assert resolve(Flags(batch_size=[8, 1, 8])).batch_sizes == (1, 8)


@pytest.mark.parametrize(
    "url", [URL, URL + "/", URL + "/v1", URL + "/v1/"], ids=["bare", "slash", "as OpenAI's clients have it", "both"]
)
def test_a_url_is_the_server_not_the_route(url: str) -> None:
    resolved = resolve(Flags(url=url, api=ApiName.CHAT, model="m", api_key="k"))
    assert resolved.target == ServerAddress(url=URL, api=ApiName.CHAT, model="m", api_key="k")


@pytest.mark.parametrize(
    "sampling",
    [{"do_sample": True}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.5}, {"typical_p": 0.5}],
    ids=lambda sampling: next(iter(sampling)),
)
def test_what_reshapes_the_distribution_samples(sampling: dict[str, Any]) -> None:
    resolved = resolve(Flags(**sampling)).sampling
    assert resolved.samples
    assert {name: getattr(resolved, name) for name in sampling} == sampling


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        pytest.param({"sequence_length": 0}, "`--sequence-length` must be at least 1, got 0", id="no prompt"),
        pytest.param({"decode_length": 0}, "`--decode-length` must be at least 1, got 0", id="no output"),
        pytest.param({"runs": 0}, "`--runs` must be at least 1, got 0", id="no runs"),
        pytest.param({"warmups": -1}, "`--warmups` must not be negative, got -1", id="negative warm-ups"),
        pytest.param({"batch_size": [0, 4]}, "`--batch-size` must be at least 1, got 0", id="empty batch"),
        pytest.param({"temperature": 0.0}, "`--temperature` must be above 0", id="temperature"),
        pytest.param({"temperature": float("nan")}, "`--temperature` must be above 0", id="not a temperature"),
        pytest.param({"repetition_penalty": -1.0}, "`--repetition-penalty` must be above 0", id="repetition penalty"),
        pytest.param({"frequency_penalty": 3.0}, "`--frequency-penalty` must be in -2 to 2", id="frequency penalty"),
        pytest.param({"top_p": 1.0}, "`--top-p` must be above 0 and below 1", id="top-p"),
        pytest.param({"typical_p": 0.0}, "`--typical-p` must be above 0 and below 1", id="typical-p"),
        pytest.param({"top_k": 0}, "`--top-k` must be at least 1", id="top-k"),
        pytest.param({"top_n_tokens": -1}, "`--top-n-tokens` must not be negative", id="top-n"),
        pytest.param({"api": ApiName.CHAT}, "`--api` is about the server of `--url`", id="api without url"),
        pytest.param({"model": "m"}, "`--model` is about the server of `--url`", id="model without url"),
        pytest.param({"url": "127.0.0.1:3000"}, "is no address of a server, such as http://", id="url without scheme"),
        pytest.param({"url": "ftp://x"}, "is no address of a server", id="url of another kind"),
        pytest.param({"url": "http://"}, "is no address of a server", id="url without host"),
        pytest.param({"url": "http://x:99999"}, "Port out of range", id="url with a wild port"),
        pytest.param({"url": URL, "master_shard_uds_path": "/s"}, "give one of them", id="two targets"),
        pytest.param({"plot": "x.jpg"}, "must end in .png", id="format of a plot"),
        pytest.param({"plot": "/nowhere/x.png"}, "there is no folder /nowhere", id="folder of a plot"),
        pytest.param({"json": "/nowhere/x.json"}, "there is no folder /nowhere", id="folder of the json"),
        pytest.param({"json": "/tmp"}, "is a folder", id="a folder as json"),
    ],
)
def test_refusals(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(BenchmarkError) as refused:
        resolve(Flags(**flags))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_without_matplotlib_a_plot_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BenchmarkError, match=r'pip install "text-generation-inference\[benchmark\]"'):
        resolve(Flags(plot=str(tmp_path / "x.png")))


def test_every_sampling_flag_has_its_place() -> None:
    names = {field.name for field in dataclasses.fields(Sampling)}
    assert names < {field.name for field in dataclasses.fields(Flags)}
