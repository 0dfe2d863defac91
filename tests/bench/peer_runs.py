"""The same work by transformers' continuous batching, or by vLLM; a program that `gpu_bench.py` starts.

    PYTHON tests/bench/peer_runs.py vllm --model DIR --concurrency 1,16 --prompt-tokens 512 --output-tokens 256

Runs under the interpreter of the peer's environment, so it imports nothing of ours. Prints one JSON line for each
number of sequences, which begin together: {"concurrency": 16, "tokens_per_s": 1234.5}.
"""

import argparse
import json
import random
import time
from collections.abc import Callable
from typing import Any

Prompts = list[list[int]]
Generate = Callable[[Prompts], None]


def transformers(arguments: argparse.Namespace) -> tuple[Generate, int]:
    import inspect

    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype))
    model.to(arguments.device).eval()
    config = GenerationConfig(
        max_new_tokens=arguments.output_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )

    # Its cache is made once, sized by the first call, which has the most requests.
    can_persist = "persistent_manager" in inspect.signature(model.generate_batch).parameters
    options = {"persistent_manager": True} if can_persist else {}

    def generate(prompts: Prompts) -> None:
        outputs = model.generate_batch(inputs=prompts, generation_config=config, progress_bar=False, **options)
        lengths = [len(output.generated_tokens) for output in outputs.values()]
        assert lengths == [arguments.output_tokens] * len(prompts), f"other lengths than asked: {lengths}"

    return generate, int(model.config.vocab_size)


def vllm(arguments: argparse.Namespace) -> tuple[Generate, int]:
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    length = arguments.prompt_tokens + arguments.output_tokens
    model = LLM(
        model=arguments.model, dtype=arguments.dtype, max_model_len=length, enable_prefix_caching=False,
        max_num_seqs=max(arguments.concurrency),
    )  # fmt: skip
    sampling = SamplingParams(max_tokens=arguments.output_tokens, ignore_eos=True, temperature=0.0, detokenize=False)

    def generate(prompts: Prompts) -> None:
        outputs = model.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        lengths = [len(output.outputs[0].token_ids) for output in outputs]
        assert lengths == [arguments.output_tokens] * len(prompts), f"other lengths than asked: {lengths}"

    return generate, int(model.llm_engine.model_config.get_vocab_size())


PEERS = {"transformers": transformers, "vllm": vllm}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--concurrency", type=lambda text: [int(size) for size in text.split(",")], required=True)
    parser.add_argument("--prompt-tokens", type=int, required=True)
    parser.add_argument("--output-tokens", type=int, required=True)
    arguments = parser.parse_args()
    generate, vocab = PEERS[arguments.peer](arguments)
    rng = random.Random(0)

    def prompts(count: int) -> Prompts:
        return [[rng.randrange(1, vocab) for _ in range(arguments.prompt_tokens)] for _ in range(count)]

    generate(prompts(max(arguments.concurrency)))  # warm
    for concurrency in arguments.concurrency:
        chosen = prompts(concurrency)
        start = time.perf_counter()
        generate(chosen)
        rate = concurrency * arguments.output_tokens / (time.perf_counter() - start)
        print(json.dumps({"concurrency": concurrency, "tokens_per_s": round(rate, 1)}), flush=True)


if __name__ == "__main__":
    main()
