"""Configuration -> argv and environment of every process."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from text_generation_launcher.config import resolve
from text_generation_launcher.devices import Devices
from text_generation_launcher.flags import Dtype, Flags, KvCacheDtype
from text_generation_launcher.plan import HubModel, Launch, Plan, make_plan


def plan(environ: dict[str, str] | None = None, **flags: Any) -> Plan:
    launch = Launch(nonce="n0nce", uds_path="/run/x/shard", environ=environ or {})
    return make_plan(resolve(Flags(**flags), Devices(count=None, card=None)), launch)


def after(argv: tuple[str, ...], flag: str) -> str:
    return argv[argv.index(flag) + 1]


def test_one_shard_and_one_router_of_the_embedded_model() -> None:
    made = plan()
    assert made.download is None
    [shard] = made.shards
    assert shard.argv == (
        *(sys.executable, "-m", "text_generation_server", "serve", "embedded"),
        *("--uds-path", "/run/x/shard", "--json-output"),
    )
    assert made.router.argv[:3] == (sys.executable, "-m", "text_generation_router")
    assert after(made.router.argv, "--master-shard-uds-path") == "/run/x/shard-0"
    assert after(made.router.argv, "--port") == "3000"


def test_every_rank_knows_its_place() -> None:
    shards = plan(num_shard=3, master_port=1234).shards
    assert [shard.env["RANK"] for shard in shards] == ["0", "1", "2"]
    assert {shard.env["WORLD_SIZE"] for shard in shards} == {"3"}
    assert {shard.env["MASTER_PORT"] for shard in shards} == {"1234"}
    assert {shard.env["MASTER_ADDR"] for shard in shards} == {"localhost"}
    assert all("--sharded" in shard.argv for shard in shards)
    assert "MASTER_PORT" not in plan().shards[0].env, "one shard meets nobody"


def test_only_a_hub_model_is_downloaded() -> None:
    download = plan(model_id="org/model", revision="main", trust_remote_code=True).download
    assert download is not None
    assert download.argv[3:] == (
        *("download-weights", "org/model", "--revision", "main", "--trust-remote-code", "--json-output"),
    )


def test_a_downloaded_commit_replaces_the_branch() -> None:
    for made in (plan(model_id="org/model", revision="main"), plan(model_id="org/model")):
        pinned = made.pinned(HubModel(sha="abc"))
        assert after(pinned.shards[0].argv, "--revision") == "abc"
        assert pinned.shards[0].env == made.shards[0].env


def test_every_shard_is_told_the_pipeline_tag() -> None:
    made = plan(model_id="org/model", num_shard=2)
    pinned = made.pinned(HubModel(pipeline_tag="text-generation"))
    assert [shard.env["TGI_PIPELINE_TAG"] for shard in pinned.shards] == ["text-generation"] * 2
    assert [shard.argv for shard in pinned.shards] == [shard.argv for shard in made.shards]
    assert made.pinned(HubModel()) == made


def test_flags_reach_the_process_that_they_are_meant_for() -> None:
    made = plan(
        dtype=Dtype.BFLOAT16,
        kv_cache_dtype=KvCacheDtype.FP8_E4M3FN,
        cuda_graphs="1,0, 8",
        max_input_length=10,
        max_total_tokens=20,
        max_batch_size=4,
        enable_prefill_logprobs=True,
        attention="torch",
        cuda_memory_fraction=0.5,
        huggingface_hub_cache="/cache",
        weights_cache_override="/weights",
        cors_allow_origin=["https://a.example", "https://b.example"],
        disable_grammar_support=True,
        waiting_served_ratio=0.3,
    )
    [shard] = made.shards
    assert after(shard.argv, "--dtype") == "bfloat16"
    assert after(shard.argv, "--kv-cache-dtype") == "fp8_e4m3fn"
    assert after(shard.argv, "--max-input-tokens") == after(made.router.argv, "--max-input-tokens") == "10"
    expected = {
        "MAX_TOTAL_TOKENS": "20",
        "MAX_BATCH_SIZE": "4",
        "REQUEST_LOGPROBS": "1",
        "ATTENTION": "torch",
        "CUDA_GRAPHS": "1,8",
        "CUDA_MEMORY_FRACTION": "0.5",
        "HUGGINGFACE_HUB_CACHE": "/cache",
        "WEIGHTS_CACHE_OVERRIDE": "/weights",
    }
    assert expected.items() <= shard.env.items()
    router = " ".join(made.router.argv)
    assert "--cors-allow-origin https://a.example --cors-allow-origin https://b.example" in router
    assert "--disable-grammar-support" in router
    assert "--waiting-served-ratio 0.3" in router
    assert "--max-waiting-tokens" not in router


def test_no_cuda_graphs_are_asked_for_by_zero() -> None:
    assert plan(cuda_graphs="0").shards[0].env["CUDA_GRAPHS"] == "0"
    assert "CUDA_GRAPHS" not in plan().shards[0].env


def test_the_api_key_is_on_no_command_line_and_reaches_the_router_alone() -> None:
    made = plan({"API_KEY": "hush"}, api_key="hush")
    assert made.router.env["API_KEY"] == "hush"
    assert "API_KEY" not in made.shards[0].env
    assert not any("hush" in word for spec in (*made.shards, made.router) for word in spec.argv)


@pytest.mark.parametrize("key", ["hush", "a b", "0", "false", "none", "a://b", "é", None])
def test_the_routers_command_line_reads_the_key_that_was_given(
    key: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from text_generation_router.cli import parse

    router = plan({"API_KEY": "stale", "TGI_API_KEY": "stale"}, api_key=key).router
    monkeypatch.delenv("API_KEY", raising=False)
    for name, value in router.env.items():
        monkeypatch.setenv(name, value)
    assert parse(router.argv[3:]).api_key == key


def test_flags_do_not_leak_through_the_environment() -> None:
    made = plan({"PORT": "1", "TGI_PORT": "2", "MODEL_ID": "x", "HOSTNAME": "pod", "DTYPE": "float16", "HOME": "/root"})
    for spec in (*made.shards, made.router):
        assert not {"PORT", "TGI_PORT", "MODEL_ID", "HOSTNAME", "DTYPE"} & spec.env.keys()
        assert spec.env["HOME"] == "/root"


@pytest.mark.parametrize(
    ("environ", "token"),
    [
        ({"HF_TOKEN": "a"}, "a"),
        ({"HF_TOKEN": "a", "HF_API_TOKEN": "b"}, "b"),
        ({"HUGGING_FACE_HUB_TOKEN": "c"}, "c"),
        ({}, None),
    ],
)
def test_the_hub_token_reaches_the_shards_and_not_the_router(environ: dict[str, str], token: str | None) -> None:
    made = plan(environ)
    assert made.shards[0].env.get("HF_TOKEN") == token
    assert not any("TOKEN" in name and name.startswith(("HF", "HUGGING")) for name in made.router.env)


def test_shards_and_router_share_this_launchs_nonce() -> None:
    made = plan()
    assert {spec.env["TGI_LAUNCHER_NONCE"] for spec in (*made.shards, made.router)} == {"n0nce"}
    assert {spec.env["TGI_INCARNATION"] for spec in (*made.shards, made.router)} == {"1"}


def test_the_log_level_is_for_the_children_too() -> None:
    made = plan({"LOG_LEVEL": "warn,text_generation_router=debug"})
    assert {spec.env["LOG_LEVEL"] for spec in (*made.shards, made.router)} == {"warn,text_generation_router=debug"}


def test_a_compute_type_of_the_users_is_kept() -> None:
    assert plan().router.env["COMPUTE_TYPE"] == "1-cpu"
    assert plan({"COMPUTE_TYPE": "mine"}).router.env["COMPUTE_TYPE"] == "mine"


def test_a_shards_memory_is_tuned_and_what_the_user_sets_comes_last() -> None:
    tuned = plan().shards[0].env["GLIBC_TUNABLES"]
    assert "glibc.malloc.hugetlb=1" in tuned.split(":")
    given = "glibc.malloc.hugetlb=0:glibc.malloc.check=1"
    made = plan({"GLIBC_TUNABLES": given})
    assert made.shards[0].env["GLIBC_TUNABLES"] == f"{tuned}:{given}"
    assert made.router.env["GLIBC_TUNABLES"] == given


def test_a_shards_threads_spin_for_a_short_while_unless_the_user_says_how_they_wait() -> None:
    assert int(plan().shards[0].env["GOMP_SPINCOUNT"]) < 300_000
    assert "GOMP_SPINCOUNT" not in plan().router.env
    assert plan({"GOMP_SPINCOUNT": "7"}).shards[0].env["GOMP_SPINCOUNT"] == "7"
    assert "GOMP_SPINCOUNT" not in plan({"OMP_WAIT_POLICY": "ACTIVE"}).shards[0].env


def test_a_shard_knows_the_limits_that_decide_about_memory() -> None:
    env = plan(max_batch_prefill_tokens=7, max_total_tokens=5, max_batch_total_tokens=9).shards[0].env
    assert (env["MAX_BATCH_PREFILL_TOKENS"], env["MAX_TOTAL_TOKENS"], env["MAX_BATCH_TOTAL_TOKENS"]) == ("7", "5", "9")
    assert env["MAX_CONCURRENT_REQUESTS"] == "128"
    assert "MAX_BATCH_SIZE" not in env
