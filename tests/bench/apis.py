"""The routes of the servers that `compare.py` compares, asked for an exact number of greedy tokens."""

from text_generation_launcher.benchmark.apis import Extras, completions, native

APIS = {
    "native": native(),
    "completions": completions(),
    # It refuses fields that it does not know and sends usage unasked.
    "transformers": completions(extras=Extras.NONE),
}
