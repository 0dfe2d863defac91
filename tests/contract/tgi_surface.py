"""What TGI 3.3 can be asked for, by name: paths, members of bodies, flags, metrics. Facts of its interface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

PATHS: Mapping[str, Sequence[str]] = {
    "/": ("GET", "POST"),
    "/chat_tokenize": ("POST",),
    "/generate": ("POST",),
    "/generate_stream": ("POST",),
    "/health": ("GET",),
    "/info": ("GET",),
    "/invocations": ("POST",),
    "/metrics": ("GET",),
    "/ping": ("GET",),
    "/tokenize": ("POST",),
    "/v1/chat/completions": ("POST",),
    "/v1/completions": ("POST",),
    "/v1/models": ("GET",),
    "/vertex": ("POST",),
    "/docs": ("GET",),
}

PARAMETERS = (
    "adapter_id", "best_of", "decoder_input_details", "details", "do_sample", "frequency_penalty", "grammar",
    "max_new_tokens", "repetition_penalty", "return_full_text", "seed", "stop", "temperature", "top_k",
    "top_n_tokens", "top_p", "truncate", "typical_p", "watermark",
)  # fmt: skip

REQUESTS: Mapping[str, Sequence[str]] = {
    "GenerateBody": ("inputs", "parameters"),
    "CompatGenerateBody": ("inputs", "parameters", "stream"),
    "GenerateParameters": PARAMETERS,
    "ChatBody": (
        "frequency_penalty", "logit_bias", "logprobs", "max_tokens", "messages", "model", "n", "presence_penalty",
        "response_format", "seed", "stop", "stream", "stream_options", "temperature", "tool_choice", "tool_prompt",
        "tools", "top_logprobs", "top_p",
    ),
    "CompletionBody": (
        "frequency_penalty", "max_tokens", "model", "prompt", "repetition_penalty", "seed", "stop", "stream", "suffix",
        "temperature", "top_p",
    ),
    "StreamOptions": ("include_usage",),
    "MessageBody": ("role", "content", "name", "tool_calls", "tool_call_id"),
    "ToolBody": ("type", "function"),
    "FunctionBody": ("name", "description", "arguments"),
}  # fmt: skip
"""Members that bodies may have, by the name of our type; users of a row of `docs/compatibility.md` look for them."""

ANSWERS: Mapping[str, Sequence[str]] = {
    "GenerateResponse": ("details", "generated_text"),
    "Details": (
        "best_of_sequences", "finish_reason", "generated_tokens", "prefill", "seed", "tokens", "top_tokens",
    ),
    "BestOfSequence": (
        "finish_reason", "generated_text", "generated_tokens", "prefill", "seed", "tokens", "top_tokens",
    ),
    "PrefillTokenBody": ("id", "logprob", "text"),
    "TokenBody": ("id", "logprob", "special", "text"),
    "StreamResponse": ("details", "generated_text", "index", "token", "top_tokens"),
    "StreamDetails": ("finish_reason", "generated_tokens", "input_length", "seed"),
    "SimpleToken": ("id", "start", "stop", "text"),
    "ChatTokenized": ("templated_text", "tokenize_response"),
    "Info": (
        "docker_label", "max_best_of", "max_client_batch_size", "max_concurrent_requests", "max_input_tokens",
        "max_stop_sequences", "max_total_tokens", "model_id", "model_pipeline_tag", "model_sha", "router", "sha",
        "validation_workers", "version",
    ),
    "ErrorBody": ("error", "error_type"),
    "ChatCompletion": ("choices", "created", "id", "model", "system_fingerprint", "usage"),
    "ChatChoice": ("finish_reason", "index", "logprobs", "message"),
    "ChatChunk": ("choices", "created", "id", "model", "system_fingerprint", "usage"),
    "ChunkChoice": ("delta", "finish_reason", "index", "logprobs"),
    "Delta": ("role", "content", "tool_calls"),
    "ToolCallBody": ("function", "id", "index", "type"),
    "CalledFunction": ("arguments", "name"),
    "ChatLogprobs": ("content",),
    "TokenLogprob": ("logprob", "token", "top_logprobs"),
    "TopLogprob": ("logprob", "token"),
    "Completion": ("choices", "created", "id", "model", "system_fingerprint", "usage"),
    "CompletionChoice": ("finish_reason", "index", "logprobs", "text"),
    "Usage": ("completion_tokens", "prompt_tokens", "total_tokens"),
    "Model": ("created", "id", "object", "owned_by"),
}  # fmt: skip

LAUNCHER_FLAGS = (
    "model-id", "revision", "validation-workers", "sharded", "num-shard", "quantize", "speculate", "dtype",
    "kv-cache-dtype", "trust-remote-code", "max-concurrent-requests", "max-best-of", "max-stop-sequences",
    "max-top-n-tokens", "max-input-tokens", "max-input-length", "max-total-tokens", "waiting-served-ratio",
    "max-batch-prefill-tokens", "max-batch-total-tokens", "max-waiting-tokens", "max-batch-size", "cuda-graphs",
    "hostname", "port", "prometheus-port", "shard-uds-path", "master-addr", "master-port", "huggingface-hub-cache",
    "weights-cache-override", "disable-custom-kernels", "cuda-memory-fraction", "rope-scaling", "rope-factor",
    "json-output", "otlp-endpoint", "otlp-service-name", "cors-allow-origin", "api-key", "watermark-gamma",
    "watermark-delta", "ngrok", "ngrok-authtoken", "ngrok-edge", "tokenizer-config-path", "disable-grammar-support",
    "env", "max-client-batch-size", "lora-adapters", "usage-stats", "payload-limit", "enable-prefill-logprobs",
    "graceful-termination-timeout",
)  # fmt: skip

BENCHMARK_FLAGS = (
    "tokenizer-name", "revision", "batch-size", "sequence-length", "decode-length", "runs", "warmups", "temperature",
    "top-k", "top-p", "typical-p", "repetition-penalty", "frequency-penalty", "watermark", "do-sample",
    "top-n-tokens", "master-shard-uds-path",
)  # fmt: skip

METRICS = (
    "tgi_request_count", "tgi_request_success", "tgi_request_failure", "tgi_request_duration",
    "tgi_request_validation_duration", "tgi_request_queue_duration", "tgi_request_inference_duration",
    "tgi_request_mean_time_per_token_duration", "tgi_request_input_length", "tgi_request_max_new_tokens",
    "tgi_request_generated_tokens", "tgi_request_skipped_tokens", "tgi_queue_size", "tgi_batch_current_size",
    "tgi_batch_current_max_tokens", "tgi_batch_max_total_tokens", "tgi_batch_next_size", "tgi_batch_inference_count",
    "tgi_batch_inference_success", "tgi_batch_inference_failure", "tgi_batch_concat", "tgi_batch_inference_duration",
    "tgi_batch_forward_duration", "tgi_batch_decode_duration", "tgi_batch_filter_duration",
    "tgi_batch_concat_duration",
)  # fmt: skip
