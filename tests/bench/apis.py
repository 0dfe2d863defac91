"""The routes of the servers that `compare.py` compares, asked for an exact number of greedy tokens."""

from typing import Any

from text_generation_launcher.benchmark.apis import Api, Extras, Piece, Usage, completions, native


def llama_cpp_body(prompt: str, output_tokens: int) -> dict[str, Any]:
    """Greedy by the one sampler that is needed, of nine that run by default; only counts in the last event."""
    greedy = {"temperature": 0, "samplers": ["top_k"], "top_k": 1}
    counts = {"response_fields": ["stop", "tokens_evaluated", "tokens_predicted"]}
    exact_length = {"n_predict": output_tokens, "ignore_eos": True}
    return {"prompt": prompt, "stream": True, "cache_prompt": False, **exact_length, **greedy, **counts}


def read_llama_cpp(event: dict[str, Any]) -> Piece:
    """A token that leaves a character unfinished has no event of its own; it comes with the token that finishes it."""
    if "error" in event:
        return Piece(error=str(event["error"]))
    if event["stop"]:
        return Piece(usage=Usage(event["tokens_evaluated"], event["tokens_predicted"]))
    return Piece(has_token=True)


APIS = {
    "native": native(),
    "completions": completions(),
    # It refuses fields that it does not know and sends usage unasked.
    "transformers": completions(extras=Extras.NONE),
    "llama.cpp": Api("/completion", llama_cpp_body, read_llama_cpp),
}
