"""`bench.compare`: what stands in the record beside the numbers."""

import json
from pathlib import Path

from bench.compare import command_line, describe_model

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "dtype": "bfloat16",
}


def test_the_command_is_recorded_without_places_on_this_machine() -> None:
    argv = ["/home/somebody/tests/bench/compare.py", "--model", "/data/model-135m", "--servers", "ours,vllm"]
    assert command_line(argv) == "python tests/bench/compare.py --model model-135m --servers ours,vllm"


def test_the_model_is_described_by_its_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model.safetensors").write_bytes(bytes(10_000_000))
    expected = "llama, 30 layers, hidden size 576, 9 query and 3 key/value heads, "
    assert describe_model(tmp_path) == (f"{expected}intermediate size 1536, vocabulary 49,152, 0.01 GB of bfloat16")
