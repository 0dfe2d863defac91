"""Tiny random models of many architectures, saved as a model folder: what tests serve instead of downloads.

The vocabulary is 256 bytes and a few special tokens, padded to 320; token 256 begins and 257 ends a text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

VOCAB_SIZE = 320
BOS_ID, EOS_ID, PAD_ID = 256, 257, 258

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "pad_token_id": PAD_ID,
    "initializer_range": 0.15,  # the libraries' 0.02 makes tiny models repeat themselves
    "tie_word_embeddings": False,
}
GPT2_NAMES = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "n_inner": 96}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
MLA: dict[str, Any] = {
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4, "head_dim": 8,
}  # fmt: skip

TINY: dict[str, dict[str, Any]] = {
    # The types that the project promises, each with what is special about it switched on.
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 20, "head_dim": 16},
    "qwen2": {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {**EXPERTS, "head_dim": 16, "decoder_sparse_step": 1, "norm_topk_prob": True},
    "mixtral": {**EXPERTS},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 20, "attn_logit_softcapping": 2.0},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 20, "num_hidden_layers": 3,
                    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "phi3": {"sliding_window": None},
    "gpt_neox": {"num_key_value_heads": 4, "rotary_pct": 0.25},
    "gpt2": {**GPT2_NAMES},
    "olmo2": {},
    "granite": {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
    "cohere": {"logit_scale": 0.5, "use_qk_norm": True},
    "starcoder2": {"sliding_window": 20, "use_bias": True},
    "stablelm": {"partial_rotary_factor": 0.25, "use_qkv_bias": True},
    # More families.
    "phi": {"num_key_value_heads": 4, "partial_rotary_factor": 0.5},
    "gemma": {"head_dim": 16},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "olmo": {},
    "olmo3": {"sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"]},
    "olmoe": {**EXPERTS},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 32, "decoder_sparse_step": 1},
    "smollm3": {"no_rope_layers": [1, 0], "use_sliding_window": False},
    "ernie4_5": {"head_dim": 16},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_num_shared_experts": 1,
                     "moe_layer_start_index": 1},
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "glm4_moe": {"head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                 "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "exaone4": {"sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"]},
    "helium": {"head_dim": 16},
    "nemotron": {"head_dim": 16},
    "persimmon": {"num_key_value_heads": 4},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512, "expansion_ratio": 2},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "gptj": {**GPT2_NAMES, "rotary_dim": 8},
    "bloom": {"n_layer": 2, "n_head": 4},
    "codegen": {**GPT2_NAMES, "rotary_dim": 8},
    "gpt_bigcode": {**GPT2_NAMES},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 20},
    "gpt_oss": {**EXPERTS, "head_dim": 16, "sliding_window": 20,
                "layer_types": ["sliding_attention", "full_attention"]},
    "deepseek_v2": {**MLA, "topk_method": "greedy"},
    "deepseek_v3": {**MLA},
    "llama4_text": {**EXPERTS, "head_dim": 16, "attention_chunk_size": 16, "intermediate_size_mlp": 96,
                    "num_hidden_layers": 4, "moe_layers": [1, 3]},
    "minimax": {**EXPERTS},
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 1},
    "jamba": {**EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 16, "attn_layer_indices": [1]},
    "zamba2": {"num_hidden_layers": 2, "mamba_ngroups": 1, "n_mamba_heads": 8, "hybrid_layer_ids": [1],
               "layers_block_type": ["mamba", "hybrid"], "layer_types": ["mamba", "hybrid"]},
    "granitemoe": {**EXPERTS},
    "granitemoeshared": {**EXPERTS, "shared_intermediate_size": 32},
    "granitemoehybrid": {**EXPERTS, "shared_intermediate_size": 32, "layer_types": ["attention", "attention"],
                         "position_embedding_type": "rope"},
    "dbrx": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512,
             "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
             "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "phimoe": {**EXPERTS},
    "cohere2": {"sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 16},
    "arcee": {},
    "seed_oss": {"head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "bitnet": {},
    "apertus": {},
    "lfm2": {"full_attn_idxs": [1], "layer_types": ["conv", "full_attention"]},
    "ministral": {"sliding_window": 20, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "ministral3": {"head_dim": 16},
    "qwen3_next": {**EXPERTS, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"],
                   "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
                   "linear_value_head_dim": 8},
    "dots1": {"head_dim": 16, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
              "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "diffllama": {"head_dim": 16},
    "vaultgemma": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 20,
                   "layer_types": ["sliding_attention", "full_attention"]},
    "gemma3n_text": {"head_dim": 16, "sliding_window": 20, "num_hidden_layers": 4, "num_kv_shared_layers": 2,
                     "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCAB_SIZE, "laurel_rank": 8,
                     "layer_types": ["sliding_attention", "full_attention"] * 2,
                     "activation_sparsity_pattern": [0.0] * 4, "intermediate_size": [96] * 4},
    "nanochat": {"head_dim": 16},
    "jetmoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 16},
    "recurrent_gemma": {"head_dim": 16, "lru_width": 64, "attention_window_size": 20, "num_hidden_layers": 3},
    "rwkv": {"attention_hidden_size": 64},
    "openai-gpt": {**GPT2_NAMES},
    "xglm": {"d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 96},
    "biogpt": {"num_key_value_heads": 4},
    "lfm2_moe": {**EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "doge": {"keep_window_size": 2048},
    "flex_olmo": {**EXPERTS},
    "afmoe": {**EXPERTS, "head_dim": 16, "sliding_window": 20, "num_dense_layers": 1,
              "layer_types": ["sliding_attention", "full_attention"], "n_group": 1, "topk_group": 1},
    "minimax_m2": {**EXPERTS, "head_dim": 16, "rotary_dim": 8},
    "longcat_flash": {**MLA, "num_layers": 2, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 32, "moe_topk": 2,
                      "zero_expert_num": 1, "head_dim": 8},
    "solar_open": {"head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                   "n_group": 1, "topk_group": 1, "n_shared_experts": 1},
    "ctrl": {"n_embd": 64, "n_layer": 2, "n_head": 4, "dff": 96, "n_positions": 512},
    "moshi": {"head_dim": 16, "ffn_dim": 96},
    "blt": {},
}  # fmt: skip

PROMISED = tuple(TINY)[:16]
"""Types for which the project promises token-for-token equality."""


def tiny_config(model_type: str, **changes: Any) -> Any:
    """The library's configuration of a tiny model, with ``changes`` on top of the table."""
    import transformers

    return transformers.AutoConfig.for_model(model_type, **{**COMMON, **TINY.get(model_type, {}), **changes})


def make_tiny_model(
    model_type: str, folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> Path:
    """Save a tiny random model: config.json, generation_config.json, model.safetensors, tokenizer.json."""
    import transformers

    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(model_type, **changes), dtype=dtype)
    _vary(model)
    model.generation_config.eos_token_id = [EOS_ID]
    model.generation_config.pad_token_id = PAD_ID
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {},
    "xlm-roberta": {},
    "camembert": {},
    "distilbert": {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 96},
    "albert": {"embedding_size": 32},
    "electra": {"embedding_size": 32},
    "mpnet": {},
    "modernbert": {"local_attention": 16, "global_attn_every_n_layers": 2, "num_hidden_layers": 3},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 32},
}
"""Families that fill in blanks, each with what is special about it switched on."""


def make_tiny_encoder(
    model_type: str,
    folder: Path,
    *,
    pooling: str | None = "mean",
    normalizes: bool = False,
    max_tokens: int | None = None,
    **changes: Any,
) -> Path:
    """Save a tiny random model that embeds, as sentence-transformers does. ``pooling`` None: without its files."""
    import transformers

    torch.manual_seed(0)
    options = {**COMMON, **ENCODERS.get(model_type, TINY.get(model_type, {})), **changes}
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(model_type, **options))
    _vary(model)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    if pooling is not None:
        kinds = ["Transformer", "Pooling", *(["Normalize"] if normalizes else [])]
        paths = ["", "1_Pooling", "2_Normalize"]
        modules = [
            {"idx": index, "name": str(index), "path": paths[index], "type": f"sentence_transformers.models.{kind}"}
            for index, kind in enumerate(kinds)
        ]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling").mkdir()
        flag = {"cls": "pooling_mode_cls_token", "lasttoken": "pooling_mode_lasttoken"}
        settings = {"word_embedding_dimension": 64, flag.get(pooling, f"pooling_mode_{pooling}_tokens"): True}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": max_tokens}))
    return folder


def _vary(model: torch.nn.Module) -> None:
    """Move weights off the values where mistakes hide: norms off one, biases and sinks off zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 and parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.1)


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer: one token a byte, and <s>, </s>, <pad>."""
    letters = bytes_to_unicode()
    special = ["<s>", "</s>", "<pad>"]
    added = [
        {"id": 256 + i, "content": text, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
        for i, text in enumerate(special)
    ]  # fmt: skip
    tokenizer: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {letters[byte]: byte for byte in range(256)}, "merges": []},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "pad_token": "<pad>",
            }
        ),
        encoding="utf-8",
    )


def bytes_to_unicode() -> dict[int, str]:
    """The printable letter that stands for each byte in a byte-level vocabulary."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    return {**{byte: chr(byte) for byte in kept}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}
