"""Examples that repeat a text: copying is what filling a schema and calling a tool are made of."""

import json
import random

from text_generation_server.embedded_model.recipe.example import Example, chat, plain, user
from text_generation_server.embedded_model.recipe.facts import COUNTRIES
from text_generation_server.embedded_model.recipe.words import ANIMALS, COLOURS, JOBS, NAMES, THINGS, invented_word

_REQUESTS = (
    "Repeat: {t}",
    "Repeat after me: {t}",
    "Repeat this: {t}",
    "Say: {t}",
    "Say this: {t}",
    "Echo: {t}",
    "Copy: {t}",
    "Copy this text: {t}",
    "Please repeat the text.\n{t}",
    "{t}\nRepeat that.",
    "{t}\nSay it again.",
    "Write this: {t}",
)


def repeat(rng: random.Random) -> Example:
    """Words, names, numbers and keys in no order, as a list or as JSON, to be said again."""
    pieces = [_piece(rng) for _ in range(rng.randint(1, 7))]
    if rng.random() < 0.3:
        text = json.dumps(dict(zip(pieces[::2], pieces[1::2], strict=False)) or pieces, ensure_ascii=False)
    else:
        text = rng.choice((" ", " ", ", ")).join(pieces)
    request = rng.choice(_REQUESTS).replace("{t}", text)
    if rng.random() < 0.3:
        return plain("repeat", request + "\n", text)
    return chat("repeat", [user(request)], text)


def _piece(rng: random.Random) -> str:
    draw = rng.random()
    if draw < 0.35:
        word = invented_word(rng)
        return word.capitalize() if rng.random() < 0.6 else word
    if draw < 0.55:
        return str(rng.randint(0, 10 ** rng.randint(1, 6)))
    if draw < 0.65:
        return f"{rng.choice((*JOBS, *ANIMALS))}_{rng.choice(THINGS)}"
    if draw < 0.75:
        country = rng.choice(COUNTRIES)
        return rng.choice((country.name, country.capital))
    return rng.choice((*NAMES, *COLOURS, *THINGS, *ANIMALS))
