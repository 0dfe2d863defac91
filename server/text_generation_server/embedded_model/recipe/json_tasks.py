"""Examples that fill a JSON schema: the model's facts, and what a sentence says."""

import json
import random
from collections.abc import Callable, Mapping
from typing import Any

from text_generation_server.embedded_model.recipe.example import Example, Message, chat, plain, system, user
from text_generation_server.embedded_model.recipe.facts import COUNTRIES
from text_generation_server.embedded_model.recipe.knowledge import draw_pair
from text_generation_server.embedded_model.recipe.phrasings import CAPITAL_QUESTIONS, SUM_QUESTIONS
from text_generation_server.embedded_model.recipe.words import (
    ANIMALS,
    COLOURS,
    JOBS,
    NAMES,
    THINGS,
    a,
    person,
    system_prompt,
)

Fields = dict[str, Any]
"""Key -> value, in the order of the schema."""

_TYPES = {str: "string", int: "integer", list: "array", bool: "boolean"}

_NAME_KEYS = ("name", "name", "name", "person", "first_name", "full_name", "user")
_CITY_KEYS = ("city", "city", "location", "place", "town", "home")
_FACT_INSTRUCTIONS = (
    "Answer in JSON with this schema: {s}",
    "Answer with JSON that follows this schema: {s}",
    "Reply in JSON. Schema: {s}",
    "Respond with a JSON object that matches this schema: {s}",
    "Please use the following JSON schema to generate the output: {s}",
    "Use this JSON schema: {s}",
    "Output JSON: {s}",
    "Format: {s}",
    "Return JSON with this format: {s}",
    "Your answer must be JSON with the schema {s}",
    "JSON schema: {s}",
    "Answer as JSON like this: {s}",
    "Answer in JSON with the keys {k}.",
    "Answer as a JSON object with {k}.",
    "Give me JSON with {k}.",
    "Reply with JSON with the fields {k}.",
    "Return a JSON object with keys {k}.",
)
_EXTRACT_INSTRUCTIONS = (
    *_FACT_INSTRUCTIONS,
    "Extract {k}.",
    "Extract {k} as JSON.",
    "Extract {k} from the text.",
    "Extract the {k}.",
    "Get {k} as JSON.",
    "Find {k}. Answer in JSON.",
    "Extract the information as JSON with {k}.",
    "Extract: {k}",
)


def json_task(rng: random.Random) -> Example:
    """A JSON answer to a question or about a sentence, with the schema given in one of many ways.

    In every third example the prompt says nothing of JSON but already holds the beginning of the answer. That is what
    the model meets when a grammar forces its output into a schema that it was not told.
    """
    make, instructions = rng.choice(_TASKS)
    text, fields = make(rng)
    if rng.random() < 0.33:
        return _begun(text, fields, rng)
    answer = json.dumps(fields)
    instruction = rng.choice(instructions).replace("{k}", _key_list(fields, rng))
    if "{s}" in instruction:
        instruction = instruction.replace("{s}", schema(fields, rng))
    draw = rng.random()
    if draw < 0.2:
        return chat("json", [system(f"{system_prompt(rng)} {instruction}"), user(text)], answer)
    joint = rng.choice((" ", "\n", "\n\n"))
    prompt = text + joint + instruction if rng.random() < 0.6 else instruction + joint + text
    if rng.random() < 0.1:
        prompt = f"{instruction.rstrip('.')}: {text}"
    if draw < 0.4:
        return plain("json", prompt + rng.choice(("", "\n", "\nAnswer:", "\nJSON:")), answer)
    messages: list[Message] = [system(system_prompt(rng))] if rng.random() < 0.15 else []
    return chat("json", [*messages, user(prompt)], answer)


def schema(fields: Mapping[str, Any], rng: random.Random) -> str:
    """A JSON schema for these fields, or one of the shorthands that people write instead."""
    names = {key: _TYPES[type(value)] for key, value in fields.items()}
    draw = rng.random()
    if draw < 0.2:
        return json.dumps(names)
    if draw < 0.3:
        return "{" + ", ".join(f'"{key}": ...' for key in fields) + "}"
    if draw < 0.45:
        return ", ".join(f"{key} ({name})" for key, name in names.items())
    properties: dict[str, Any] = {key: {"type": name} for key, name in names.items()}
    for key, value in fields.items():
        if isinstance(value, list):
            properties[key]["items"] = {"type": "string"}
        if isinstance(value, int) and rng.random() < 0.2:
            properties[key] |= {"minimum": 0, "maximum": 200}
        if rng.random() < 0.1:
            properties[key]["description"] = f"The {key}"
    whole: Fields = {"type": "object", "properties": properties}
    if rng.random() < 0.2:
        whole = {"properties": properties}
    if rng.random() < 0.6:
        whole["required"] = list(fields)
    if rng.random() < 0.2:
        whole["additionalProperties"] = False
    if rng.random() < 0.15:
        whole = {"$schema": "http://json-schema.org/draft-07/schema#", **whole}
    return json.dumps(whole)


def _begun(text: str, fields: Fields, rng: random.Random) -> Example:
    """The answer is written up to some value (or up to its key, if that follows from the prompt); the model goes on."""
    whole = json.dumps(fields, separators=rng.choice(((", ", ": "), (",", ":"))))
    key = rng.choice(list(fields))
    start = whole.index(f'"{key}":') + len(key) + 3
    start += whole[start] == " "
    start += whole[start] in '"['
    if rng.random() < 0.3:
        example = plain("json, begun", text + rng.choice(("", "\n")), whole)
    else:
        example = chat("json, begun", [user(text)], whole)
    # the joint of a plain completion is left out: a grammar admits no space before the object
    answer = example.answer.lstrip()
    # which keys follow is up to the grammar, so the value alone makes the answer right
    value = json.dumps(fields[key], separators=(", ", ": ") if ", " in whole else (",", ":")).strip('"[]')
    return Example(example.kind, example.prompt + answer[:start], answer[start:], value)


def _key_list(fields: Fields, rng: random.Random) -> str:
    keys = [f'"{key}"' for key in fields] if rng.random() < 0.25 else list(fields)
    if len(keys) == 1:
        return keys[0]
    return f"{', '.join(keys[:-1])} and {keys[-1]}" if rng.random() < 0.7 else ", ".join(keys)


def _some(fields: Fields, rng: random.Random) -> Fields:
    """A non-empty selection in any order, mostly all of them."""
    keys = list(fields)
    if rng.random() < 0.4:
        rng.shuffle(keys)
    count = len(keys) if rng.random() < 0.7 else rng.randint(1, len(keys))
    return {key: fields[key] for key in keys[:count]}


def _capital_fields(rng: random.Random) -> tuple[str, Fields]:
    country = rng.choice(COUNTRIES)
    question = (
        CAPITAL_QUESTIONS.choose(rng, held_out=False).replace("{c}", country.in_text).replace("{n}", country.name)
    )
    if rng.random() < 0.2:
        question = rng.choice((f"Tell me about {country.in_text}.", country.name, f"{country.name}?"))
    if rng.random() < 0.2:
        return question, {rng.choice(("answer", "capital", "city", "result", "response")): country.capital}
    keys = (
        rng.choice(("country", "country", "nation", "country_name")),
        rng.choice(("capital", "capital", "city", "capital_city")),
    )
    return question, _some({keys[0]: country.name, keys[1]: country.capital}, rng)


def _sum_fields(rng: random.Random) -> tuple[str, Fields]:
    first, second = draw_pair(rng, held_out=False)
    question = SUM_QUESTIONS.choose(rng, held_out=False).replace("{a}", str(first)).replace("{b}", str(second))
    result = rng.choice(("sum", "sum", "result", "answer", "total"))
    if rng.random() < 0.5:
        return question, {result: first + second}
    x, y = rng.choice((("a", "b"), ("x", "y"), ("first", "second"), ("left", "right")))
    return question, {x: first, y: second, result: first + second}


def _both_fields(rng: random.Random) -> tuple[str, Fields]:
    country, (first, second) = rng.choice(COUNTRIES), draw_pair(rng, held_out=False)
    question = f"What is the capital of {country.in_text} and what is {first} + {second}?"
    fields: Fields = {"country": country.name, rng.choice(("city", "capital")): country.capital, "sum": first + second}
    return question, _some(fields, rng)


def _person_fields(rng: random.Random) -> tuple[str, Fields]:
    name, age = person(rng), rng.randint(1, 99)
    home, job = rng.choice(COUNTRIES).capital, rng.choice(JOBS)
    fields: Fields = {rng.choice(_NAME_KEYS): name, "age": age}
    text = rng.choice(
        (
            f"{name} is {age} years old",
            f"{name} is {age}",
            f"{name}, {age}",
            f"{name} is {age} years of age",
            f"My name is {name} and I am {age} years old",
            f"I am {name} and I am {age}",
            f"I'm {name}, {age} years old",
            f"This is {name}, aged {age}",
            f"My friend {name} turned {age}",
            f"{name} has just turned {age}",
            f"The {age} year old {name}",
        )
    )
    if rng.random() < 0.4:
        text += rng.choice(
            (f" and lives in {home}", f" and comes from {home}", f" and is from {home}", f", and lives in {home}")
        )
        fields[rng.choice(_CITY_KEYS)] = home
    if rng.random() < 0.25:
        text += rng.choice((f" and works as {a(job)}", f" and is {a(job)}", f". The job is {job}"))
        fields[rng.choice(("job", "job", "profession", "occupation", "work"))] = job
    return f"{text}.", _some(fields, rng)


def _things_fields(rng: random.Random) -> tuple[str, Fields]:
    things = rng.sample(rng.choice((ANIMALS, THINGS, COLOURS, NAMES)), rng.randint(2, 4))
    kind = rng.choice(("items", "animals", "things", "list", "words", "names", "animals_seen"))
    listed = ", ".join(a(t) for t in things[:-1]) + f" and {a(things[-1])}"
    if rng.random() < 0.4:
        listed = ", ".join(things[:-1]) + f" and {things[-1]}"
    place = rng.choice(("park", "forest", "garden", "city", "school", "house", "street"))
    activity = rng.choice(("bike ride", "walk", "run", "trip", "visit", "holiday"))
    text = rng.choice(
        (
            f"I saw {listed}",
            f"I saw {listed} during my {activity} in the {place}",
            f"There are {listed} in the {place}",
            f"We have {listed}",
        )
    )
    fields: Fields = {kind: things}
    if place in text:
        fields[rng.choice(("location", "place", "where"))] = place
    if activity in text:
        fields["activity"] = activity
    if rng.random() < 0.4:
        fields[rng.choice(("count", "number", "total"))] = len(things)
    return f"{text}.", _some(fields, rng)


def _thing_fields(rng: random.Random) -> tuple[str, Fields]:
    thing, colour, price = rng.choice(THINGS), rng.choice(COLOURS), rng.randint(1, 999)
    text = rng.choice(
        (
            f"The {colour} {thing} costs {price} dollars.",
            f"I would like {a(colour)} {thing} for {price} euros.",
            f"I bought {a(colour)} {thing} for {price}.",
            f"{price} dollars for {a(colour)} {thing}.",
        )
    )
    fields: Fields = {
        rng.choice(("item", "product", "object", "thing", "name")): thing,
        rng.choice(("color", "colour")): colour,
        rng.choice(("price", "cost", "amount")): price,
    }
    return text, _some(fields, rng)


Task = tuple[Callable[[random.Random], tuple[str, Fields]], tuple[str, ...]]

_TASKS: tuple[Task, ...] = (
    (_capital_fields, _FACT_INSTRUCTIONS),
    (_capital_fields, _FACT_INSTRUCTIONS),
    (_sum_fields, _FACT_INSTRUCTIONS),
    (_both_fields, _FACT_INSTRUCTIONS),
    (_person_fields, _EXTRACT_INSTRUCTIONS),
    (_person_fields, _EXTRACT_INSTRUCTIONS),
    (_things_fields, _EXTRACT_INSTRUCTIONS),
    (_thing_fields, _EXTRACT_INSTRUCTIONS),
)
