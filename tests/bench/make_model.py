"""Make the model that the benchmarks serve: Llama shape, random bfloat16 weights, tokenizer trained on local text.

    python tests/bench/make_model.py --output DIR [--shape 135m]

Random weights cost a server exactly what trained ones cost. The result depends only on the arguments, the installed
torch and tokenizers, and this interpreter's standard library, which is the text.
"""

import argparse
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB_SIZE = 49_152
END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
MAX_POSITIONS = 8_192

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int = VOCAB_SIZE
    is_tied: bool = True
    """Whether logits are computed with the embedding's weights."""


SHAPES = {
    "135m": Shape(layers=30, hidden=576, heads=9, kv_heads=3, intermediate=1536),
    "1b": Shape(layers=16, hidden=2048, heads=32, kv_heads=8, intermediate=8192),
    "llama-3.1-8b": Shape(
        layers=32, hidden=4096, heads=32, kv_heads=8, intermediate=14336, vocab=128_256, is_tied=False
    ),
    "tiny": Shape(layers=2, hidden=64, heads=2, kv_heads=1, intermediate=96, vocab=512, is_tied=False),
}


def local_text() -> Iterator[str]:
    """Source files of the standard library, in an order that does not depend on the file system."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*")):
        if path.suffix in {".py", ".txt"} and "site-packages" not in path.parts:
            yield path.read_text(encoding="utf-8", errors="ignore")


def train_tokenizer(texts: Iterator[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Byte-level BPE of exactly `vocab_size` entries, so that every id that a model can emit has a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([f"<spare {i}>" for i in range(tokenizer.get_vocab_size(), vocab_size)])
    return tokenizer


def make_weights(shape: Shape, seed: int, device: str = "cpu") -> LlamaForCausalLM:
    """Random weights that never end a sequence by themselves: every request gets the length that it asked for.

    The end-of-text row of what computes the logits is zero, so its logit is 0, and the largest of the others is not.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=shape.is_tied,
        bos_token_id=None,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=None,
        dtype=torch.bfloat16,
    )
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        model.get_output_embeddings().weight[END_OF_TEXT_ID].zero_()
    return model


def write_tokenizer(tokenizer: Tokenizer, output: Path) -> None:
    tokenizer.save(str(output / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (output / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def make_model(output: Path, shape: Shape, seed: int = 0, device: str = "cpu") -> None:
    """``device``: where the numbers are drawn; another one draws others."""
    output.mkdir(parents=True, exist_ok=True)
    make_weights(shape, seed, device).save_pretrained(output)
    write_tokenizer(train_tokenizer(local_text(), shape.vocab), output)
    generation = {"do_sample": False, "eos_token_id": END_OF_TEXT_ID}
    (output / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="135m")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make_model(arguments.output, SHAPES[arguments.shape], arguments.seed)
    print(f"{arguments.shape} model in {arguments.output}")


if __name__ == "__main__":
    main()
