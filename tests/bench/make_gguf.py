"""Write a model folder of `make_model.py` as the one file that llama.cpp reads: the same weights, the same tokenizer.

    PEERS/llama.cpp/bin/python tests/bench/make_gguf.py --model DIR --output FILE [--dtype float32]

`compare.py` runs it when the file is not there, with the interpreter of llama.cpp's environment: only that has `gguf`.
llama.cpp's own converter refuses tokenizers whose fingerprint it does not list, and no fresh one is listed.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

BFLOAT16, FLOAT32 = "bfloat16", "float32"
LAYER_TENSORS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OTHER_TENSORS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

Array = numpy.ndarray[Any, numpy.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Everything by id."""

    tokens: list[str]
    is_special: list[bool]
    is_added: list[bool]
    """Matched in the text before anything is split or merged."""
    merges: list[str]


def read_safetensors(path: Path) -> Iterator[tuple[str, Array]]:
    """Name and values; bfloat16 comes as the uint16 of its bits, for numpy has no such type."""
    kinds: dict[str, numpy.dtype[Any]] = {"BF16": numpy.dtype("<u2"), "F32": numpy.dtype("<f4")}
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        start = file.tell()
    header.pop("__metadata__", None)
    for name, entry in header.items():
        begin, _ = entry["data_offsets"]
        yield name, numpy.memmap(path, kinds[entry["dtype"]], "r", start + begin, tuple(entry["shape"]))


def widen(bits: Array) -> Array:
    """bfloat16 bits to float32: exact."""
    return bits if bits.dtype == numpy.float32 else (bits.astype(numpy.uint32) << 16).view(numpy.float32)


def interleave_rotary_rows(weight: Array, num_heads: int) -> Array:
    """Rows of a query or key projection `[heads * head_dim, hidden]`, in the order of llama.cpp's rotation.

    transformers rotates element i of a head with element i + head_dim / 2, llama.cpp turns neighbours: 2i with 2i + 1.
    """
    half = weight.shape[0] // num_heads // 2
    return weight.reshape(num_heads, 2, half, -1).swapaxes(1, 2).reshape(weight.shape)


def gguf_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` is `blk.3.ffn_up.weight`. A KeyError is a tensor that no Llama has."""
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("model.layers."):
        return f"{OTHER_TENSORS[stem]}.{kind}"
    number, _, rest = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{LAYER_TENSORS[rest]}.{kind}"


def converted(name: str, values: Array, config: dict[str, Any], dtype: str) -> Array:
    """The tensor as it is written: rotary rows in their order, vectors in float32, for llama.cpp wants norms so."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    if projection := heads.get(name.split(".")[-2]):
        values = interleave_rotary_rows(values, projection)
    return widen(values) if values.ndim == 1 or dtype == FLOAT32 else values


def read_vocabulary(tokenizer: dict[str, Any]) -> Vocabulary:
    """Of the `tokenizer.json` of a byte-level BPE."""
    ids: dict[str, int] = dict(tokenizer["model"]["vocab"])
    added = {entry["content"]: entry for entry in tokenizer["added_tokens"]}
    ids |= {content: entry["id"] for content, entry in added.items()}
    tokens = sorted(ids, key=ids.__getitem__)
    if [ids[token] for token in tokens] != list(range(len(tokens))):
        raise ValueError("the vocabulary has gaps, or two tokens with one id")
    return Vocabulary(
        tokens=tokens,
        is_special=[token in added and bool(added[token]["special"]) for token in tokens],
        is_added=[token in added for token in tokens],
        merges=[pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]],
    )


def write(model: Path, output: Path, dtype: str) -> None:
    import gguf  # not ours: see above

    config = json.loads((model / "config.json").read_text())
    bits = gguf.GGMLQuantizationType.BF16
    # Under another name until it is whole: the file's being there says that it is.
    unfinished = output.with_name(f"{output.name}.part")
    writer = gguf.GGUFWriter(unfinished, "llama")
    add_shape(writer, config)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if dtype == FLOAT32 else gguf.LlamaFileType.MOSTLY_BF16)
    vocabulary = read_vocabulary(json.loads((model / "tokenizer.json").read_text()))
    add_vocabulary(writer, vocabulary, gguf.TokenType, config["eos_token_id"])
    for path in sorted(model.glob("*.safetensors")):
        for name, values in read_safetensors(path):
            tensor = numpy.ascontiguousarray(converted(name, values, config, dtype))
            if tensor.dtype == numpy.uint16:
                writer.add_tensor(gguf_name(name), tensor.view(numpy.uint8), raw_dtype=bits)
            else:
                writer.add_tensor(gguf_name(name), tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.rename(output)


def add_shape(writer: Any, config: dict[str, Any]) -> None:
    rope = config["rope_parameters"]
    if rope["rope_type"] != "default":
        raise ValueError(f"rotary type {rope['rope_type']!r} is not written by this script")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(rope["rope_theta"])


def add_vocabulary(writer: Any, vocabulary: Vocabulary, types: Any, eos_id: int) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")  # the splitting rule of `pre_tokenizers.ByteLevel`
    writer.add_token_list(vocabulary.tokens)
    kinds = zip(vocabulary.is_special, vocabulary.is_added, strict=True)
    writer.add_token_types(
        [types.CONTROL if special else types.USER_DEFINED if added else types.NORMAL for special, added in kinds]
    )
    writer.add_token_merges(vocabulary.merges)
    # Without an entry llama.cpp takes GPT-2's 11 for both.
    writer.add_eos_token_id(eos_id)
    writer.add_bos_token_id(eos_id)
    writer.add_add_bos_token(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder that make_model.py wrote")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--dtype", choices=[BFLOAT16, FLOAT32], default=BFLOAT16)
    arguments = parser.parse_args()
    write(arguments.model, arguments.output, arguments.dtype)
    print(arguments.output)


if __name__ == "__main__":
    main()
