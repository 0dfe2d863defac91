"""The command line as a user meets it: real processes, a tiny model, a real socket."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from text_generation_proto.v1 import generate_pb2 as pb
from text_generation_proto.v1 import generate_pb2_grpc as pb_grpc
from text_generation_server.config import ConfigError, Dtype, KvCacheDtype, ServeFlags, resolve
from tiny_models import make_tiny_model

SERVER = [sys.executable, "-m", "text_generation_server"]


def clean_env(**env: str) -> dict[str, str]:
    dropped = ("HF_", "TGI_", "LOG_LEVEL", "RANK", "WORLD_SIZE", "MASTER_", "ATTENTION", "CUDA_GRAPHS")
    return {key: value for key, value in os.environ.items() if not key.startswith(dropped)} | env


def run(*arguments: str, **env: str) -> tuple[int, list[dict[str, Any]]]:
    process = subprocess.run(
        [*SERVER, *arguments], env=clean_env(**env), capture_output=True, text=True, timeout=120, check=False
    )
    return process.returncode, [json.loads(line) for line in process.stderr.splitlines()]


class Server:
    """A ``serve`` process and its log, read on a thread."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[dict[str, Any]] = []
        self._events: queue.Queue[dict[str, Any]] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(json.loads(line))
            if self.lines[-1].get("event") in ("ready", "progress"):
                self._events.put(self.lines[-1])

    def wait_for(self, event: str) -> dict[str, Any]:
        while (found := self._events.get(timeout=120))["event"] != event:
            pass
        return found


@contextmanager
def serving(*arguments: str, **env: str) -> Iterator[Server]:
    process = subprocess.Popen([*SERVER, "serve", *arguments], env=clean_env(**env), stderr=subprocess.PIPE, text=True)
    server = Server(process)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("model"))


def greedy(prompts: list[list[int]], stub: pb_grpc.TextGenerationStub, count: int) -> list[list[int]]:
    """Generate with all prompts in one batch."""
    neutral = pb.SamplingParameters(temperature=1, top_p=1, typical_p=1, repetition_penalty=1)
    ids = range(1, len(prompts) + 1)
    new = [
        pb.NewSequence(
            sequence_id=i,
            token_ids=prompts[i - 1],
            num_prompt_tokens=len(prompts[i - 1]),
            blocks=range(4 * i, 4 * i + 4),
            sampling=neutral,
        )
        for i in ids
    ]
    chunks = [pb.Chunk(sequence_id=i, num_tokens=len(prompts[i - 1])) for i in ids]

    def requests() -> Iterator[pb.StepRequest]:
        yield pb.StepRequest(step_id=1, prefill=pb.Prefill(new_sequences=new, chunks=chunks))
        for step_id in range(2, count + 1):
            yield pb.StepRequest(step_id=step_id, decode=pb.Decode(sequence_ids=ids))

    outputs: list[list[int]] = [[] for _ in prompts]
    for result in stub.Steps(requests()):
        assert not result.HasField("failure"), result.failure.message
        for sequence_id, token_id in zip(result.tokens.sequence_ids, result.tokens.token_ids, strict=True):
            outputs[sequence_id - 1].append(token_id)
    return outputs


def library_greedy(folder: Path, prompt: list[int], count: int) -> list[int]:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.slow
def test_a_served_model_generates_what_transformers_does(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "shard"
    env = {"TGI_LAUNCHER_NONCE": "abc", "TGI_INCARNATION": "2", "REQUEST_LOGPROBS": "1"}
    with serving(str(tiny), "--uds-path", str(path), "--dtype", "float32", **env) as server:
        ready = server.wait_for("ready")
        assert {"find", "load", "listen"} <= set(ready["seconds"])
        with grpc.insecure_channel(f"unix://{path}-0") as channel:
            stub = pb_grpc.TextGenerationStub(channel)  # type: ignore[no-untyped-call]
            info = stub.Info(pb.InfoRequest())
            assert (info.launcher_nonce, info.incarnation, info.rank, info.world_size) == ("abc", 2, 0, 1)
            assert (info.model_id, info.model_type, info.dtype, info.device_type) == (
                str(tiny), "llama", "float32", "cpu"
            )  # fmt: skip
            assert info.urls == [f"unix://{path}-0"] and info.prefill_logprobs
            assert Path(info.tokenizer_path, "tokenizer.json").is_file()
            warmup = stub.Warmup(pb.WarmupRequest(max_total_tokens=64, max_concurrent_requests=4))
            assert warmup.num_blocks == 4 * (64 // info.block_size)
            prompts = [[5, 9, 33, 7], [80, 4, 4, 60, 61, 62, 63, 64, 65, 20]]
            assert greedy(prompts, stub, 8) == [library_greedy(tiny, prompt, 8) for prompt in prompts]
        # A launcher's child leaves Ctrl-C to the launcher.
        server.process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            server.process.wait(0.3)
        code, lines = run("serve", str(tiny), "--uds-path", str(path))
        assert code == 1
        assert [line["message"] for line in lines if line["level"] == "ERROR"] == [
            f"{path}-0 belongs to another running server; choose another --uds-path"
        ]
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
        assert os.listdir(tmp_path) == []
        assert not [line for line in server.lines if line["level"] in ("ERROR", "WARNING")]


def test_sigterm_while_loading_ends_with_code_0(tiny: Path, tmp_path: Path) -> None:
    with serving(str(tiny), "--uds-path", str(tmp_path / "shard")) as server:
        server.wait_for("progress")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0


@pytest.mark.parametrize(
    ("arguments", "env", "text"),
    [
        (["serve", "m", "--sharded"], {}, "RANK must be set when sharded is True"),
        (["serve", "m", "--quantize", "awq"], {}, "`--quantize awq` is not supported yet"),
        (["serve", "m", "--otlp-service-name", "mine"], {}, "`--otlp-service-name mine` is not supported yet"),
        (["serve", "m", "--dtype", "int3"], {}, "`--dtype` must be one of float32, bfloat16, float16, got int3"),
        (["serve", "/no/such/folder"], {}, "there is no folder /no/such/folder"),
        (["download-weights", "m", "--merge-lora"], {}, "`--merge-lora` is not supported yet"),
        (["quantize", "m", "out"], {}, "`quantize` is not supported yet"),
    ],
)
def test_a_start_that_fails_is_one_line_and_code_1(arguments: list[str], env: dict[str, str], text: str) -> None:
    code, lines = run(*arguments, **env)
    assert code == 1
    (line,) = lines
    assert line["level"] == "ERROR" and text in line["message"]


def test_corrupt_weights_are_found_before_loading(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(b"\x10" + bytes(20))
    code, lines = run("serve", str(tmp_path), "--uds-path", str(tmp_path / "shard"))
    assert code == 1
    (line,) = [line for line in lines if line["level"] == "ERROR"]
    assert line["message"].startswith("model.safetensors: ") and "exception" not in line
    code, lines = run("serve", str(tmp_path), "--logger-level", "debug")
    assert any("CorruptWeights" in line.get("exception", "") for line in lines if line["level"] == "DEBUG")


def test_help_imports_no_torch() -> None:
    program = (
        "import sys; from text_generation_server.cli import app\n"
        "try: app(['serve', '--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == 0


def test_flags_and_environment_become_a_configuration() -> None:
    env = {
        "RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1234", "REQUEST_LOGPROBS": "1",
        "CUDA_MEMORY_FRACTION": "0.5", "ATTENTION": "torch", "TGI_SWAPS": "0", "TGI_LAUNCHER_NONCE": "n",
    }  # fmt: skip
    made = resolve(ServeFlags(model_id="m", sharded=True, dtype="bfloat16", uds_path=Path("relative")), env)
    assert (made.rank, made.world_size, made.master_addr, made.master_port) == (1, 2, "localhost", 1234)
    assert (made.prefill_logprobs, made.cuda_memory_fraction, made.attention, made.swaps) == (True, 0.5, "torch", False)
    assert made.dtype is Dtype.BFLOAT16 and made.launcher_nonce == "n" and made.incarnation == 1
    assert made.uds_path.is_absolute(), "a gRPC address has room for absolute paths only"
    plain = resolve(ServeFlags(model_id="m", quantize="none", speculate=0, kv_cache_dtype="auto"), env)
    assert (plain.rank, plain.world_size) == (0, 1), "RANK counts only when sharded"
    assert plain.kv_cache_dtype is None


def test_eight_bits_of_cache_blocks_and_graphs_are_asked_for_by_name() -> None:
    made = resolve(
        ServeFlags(model_id="m", kv_cache_dtype="fp8_e5m2"), {"CUDA_GRAPHS": "8,1,0,8", "ATTENTION": "varlen"}
    )
    assert made.kv_cache_dtype is KvCacheDtype.FP8_E5M2
    assert made.cuda_graphs == (1, 8)
    assert made.block_size == 256, "for kernels that take no smaller ones"
    plain = resolve(ServeFlags(model_id="m"), {})
    assert plain.cuda_graphs == (1, 2, 4, 8, 16, 32, 64, 128)
    assert plain.block_size == 16
    assert resolve(ServeFlags(model_id="m"), {"CUDA_GRAPHS": "0"}).cuda_graphs == ()


@pytest.mark.parametrize(
    ("flags", "env", "text"),
    [
        ({"speculate": 2}, {}, "--speculate 2"),
        ({"kv_cache_dtype": "fp8"}, {}, "`--kv-cache-dtype` must be auto or one of fp8_e4m3fn, fp8_e5m2, got fp8"),
        ({}, {"CUDA_GRAPHS": "1,two"}, "CUDA_GRAPHS must be numbers with commas between, got '1,two'"),
        ({"otlp_endpoint": "http://x"}, {}, "--otlp-endpoint"),
        ({"otlp_service_name": "mine"}, {}, "--otlp-service-name mine"),
        ({"max_input_tokens": 0}, {}, "--max-input-tokens"),
        ({"uds_path": Path("/" + "x" * 120)}, {}, "--uds-path"),
        ({}, {"CUDA_MEMORY_FRACTION": "1.5"}, "CUDA_MEMORY_FRACTION"),
        ({}, {"TGI_INCARNATION": "zero"}, "TGI_INCARNATION"),
        ({}, {"REQUEST_LOGPROBS": "maybe"}, "REQUEST_LOGPROBS"),
        ({}, {"ROPE_FACTOR": "2"}, "ROPE_FACTOR"),
        ({"sharded": True}, {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(flags: dict[str, Any], env: dict[str, str], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        resolve(ServeFlags(model_id="m", **flags), env)
