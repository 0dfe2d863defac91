"""Whether llama.cpp serves the model that we serve: its greedy tokens against those of transformers.

    python tests/bench/check_gguf.py --model DIR --peers DIR [--dtype float32] [--prompts 8]

In float32, with a float32 cache, every token has to be the same: otherwise the exit code is 1, and a comparison with
llama.cpp is void. In bfloat16 both round, each in its own order, and greedy streams of a random model part at the first
near tie: the tokens before that are counted. Texts of the standard library have to become the same tokens in both.
"""

import argparse
import json
import subprocess
import sys
import sysconfig
import tempfile
import urllib.request
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.apis import llama_cpp_body
from bench.load import prompts_of
from bench.servers import HOST, Places, end_cleanly_on_sigterm, running

PROMPT_TOKENS, OUTPUT_TOKENS = 128, 64
CACHE_TYPES = {"float32": "f32", "bfloat16": "bf16"}
ODD_TEXTS = ["é \U0001f600 <|endoftext|> a  b\n\n\n  c\t\td 12345 don't I'LL", "   ", "\r\n\r\n x", "中文 テスト"]


def post(url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        found: dict[str, Any] = json.load(answer)
        return found


def generated_by_llama_cpp(url: str, prompt: str) -> list[int]:
    body = llama_cpp_body(prompt, OUTPUT_TOKENS) | {"stream": False, "return_tokens": True, "response_fields": []}
    tokens: list[int] = post(url, "/completion", body)["tokens"]
    return tokens


def generated_by_transformers(model: Any, ids: list[int]) -> list[int]:
    prompt = torch.tensor([ids])
    with torch.no_grad():
        # No id ends a sequence here: llama.cpp is told to ignore that one, too.
        output = model.generate(prompt, max_new_tokens=OUTPUT_TOKENS, do_sample=False, eos_token_id=None)
    tokens: list[int] = output[0, len(ids) :].tolist()
    return tokens


def common_start(one: list[int], other: list[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def serve(places: Places, gguf: Path, dtype: str, port: int) -> list[str]:
    cache = CACHE_TYPES[dtype]
    exact = ["--cache-type-k", cache, "--cache-type-v", cache, "--flash-attn", "off"]
    address = ["--host", HOST, "--port", str(port), "--no-webui", "--parallel", "1", "--ctx-size", "4096"]
    return [places.command("llama.cpp", "llama-server"), "--model", str(gguf), *address, *exact]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder that make_model.py wrote")
    parser.add_argument("--peers", type=Path, required=True, help="folder that make_peers.py wrote")
    parser.add_argument("--dtype", choices=sorted(CACHE_TYPES), default="float32")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--port", type=int, default=18_230)
    arguments = parser.parse_args()
    end_cleanly_on_sigterm()
    places = Places(model=arguments.model.absolute(), peers=arguments.peers.absolute())
    tokenizer = Tokenizer.from_file(str(places.model / "tokenizer.json"))
    prompts = list(islice(prompts_of(places.model / "tokenizer.json", PROMPT_TOKENS, seed=7), arguments.prompts))
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:50]
    texts = [*ODD_TEXTS, *(source.read_text(encoding="utf-8")[:20_000] for source in sources)]
    with tempfile.TemporaryDirectory(prefix="check-gguf-") as folder:
        gguf = Path(folder) / "model.gguf"
        script = Path(__file__).with_name("make_gguf.py")
        paths = ["--model", places.model, "--output", gguf, "--dtype", arguments.dtype]
        subprocess.run([places.command("llama.cpp", "python"), script, *paths], check=True)
        with running(serve(places, gguf, arguments.dtype, arguments.port), arguments.port) as server:
            cut = [post(server.url, "/tokenize", {"content": text, "parse_special": True})["tokens"] for text in texts]
            theirs = [generated_by_llama_cpp(server.url, prompt) for prompt in prompts]
    alike = sum(ids == tokenizer.encode(text).ids for ids, text in zip(cut, texts, strict=True))
    model = AutoModelForCausalLM.from_pretrained(places.model, dtype=getattr(torch, arguments.dtype))
    starts = [
        common_start(tokens, generated_by_transformers(model, tokenizer.encode(prompt).ids))
        for prompt, tokens in zip(prompts, theirs, strict=True)
    ]
    print(f"{alike} of {len(texts)} texts become the same tokens")
    print(
        f"{arguments.dtype}: {starts.count(OUTPUT_TOKENS)} of {len(starts)} streams are equal; equal tokens: {starts}"
    )
    exact = alike == len(texts) and (arguments.dtype != "float32" or min(starts) == OUTPUT_TOKENS)
    sys.exit(0 if exact else 1)


if __name__ == "__main__":
    main()
