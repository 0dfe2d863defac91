"""Examples that call a tool, answer from its result, or have tools at hand and do not need them."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from text_generation_server.embedded_model.recipe.example import Example, Message, assistant, chat, system, user
from text_generation_server.embedded_model.recipe.facts import COUNTRIES
from text_generation_server.embedded_model.recipe.knowledge import any_question
from text_generation_server.embedded_model.recipe.talk import WHAT_I_DO, WHO_I_AM
from text_generation_server.embedded_model.recipe.variation import polite
from text_generation_server.embedded_model.recipe.words import (
    ANIMALS,
    COLOURS,
    NAMES,
    THINGS,
    a,
    invented_word,
    person,
    phrases,
    system_prompt,
    words,
)


@dataclass(frozen=True, slots=True)
class Call:
    """A tool, a question that needs it, the arguments that the question gives, and what the tool may return."""

    name: str
    description: str
    parameters: dict[str, Any]
    """Name -> JSON schema of the parameter."""
    question: str
    arguments: dict[str, Any]
    results: tuple[Any, ...]
    """A dict is a JSON result, a str is text."""

    @property
    def tool(self) -> dict[str, Any]:
        schema = {"type": "object", "properties": self.parameters, "required": list(self.parameters)}
        function = {"name": self.name, "description": self.description, "parameters": schema}
        return {"type": "function", "function": function}


_STRING = {"type": "string"}
_INTEGER = {"type": "integer"}
_NUMBER = {"type": "number"}


def tool_task(rng: random.Random) -> Example:
    """Three fifths call a tool, a fifth answer from its result, the rest need none."""
    call = rng.choice(_CALLS)(rng)
    others = [rng.choice(_CALLS)(rng) for _ in range(rng.choice((0, 0, 0, 1, 1, 2, 3)))]
    offered = [call, *(other for other in others if other.name != call.name)]
    rng.shuffle(offered)
    tools = [offer.tool for offer in offered]
    messages: list[Message] = [system(system_prompt(rng))] if rng.random() < 0.25 else []
    draw = rng.random()
    if draw < 0.17:
        return _without_call(messages, tools, rng)
    messages.append(user(polite(call.question, rng)))
    if draw < 0.38:
        return _after_call(messages, tools, call, rng)
    if draw < 0.5:
        return _begun_call(messages, tools, call, rng)
    written = json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False)
    return chat("tool call", messages, f"<tool_call>\n{written}\n</tool_call>", written, tools)


def _begun_call(messages: list[Message], tools: list[dict[str, Any]], call: Call, rng: random.Random) -> Example:
    """The call as bare JSON, already begun: what the model meets when a grammar forces it to call a tool."""
    if rng.random() < 0.5:
        whole = json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False)
    else:
        whole = json.dumps({"function": {"_name": call.name, **call.arguments}}, ensure_ascii=False)
    key = f'"{next(iter(call.arguments))}": ' if rng.random() < 0.5 else 'name": "'
    start = whole.index(key) + len(key)
    example = chat("tool call, begun", messages, whole, None, tools)
    return Example(example.kind, example.prompt + whole[:start], example.answer[start:], whole[start:])


def _without_call(messages: list[Message], tools: list[dict[str, Any]], rng: random.Random) -> Example:
    """Greetings and the model's own facts; a capital or a sum needs no tool unless one offers just that."""
    offered = " ".join(json.dumps(tool["function"]) for tool in tools).lower()
    if rng.random() < 0.4 or "add" in offered or "sum" in offered or "capital" in offered or "calc" in offered:
        greeting = rng.choice(("Hello", "Hi", "Hi!", "Hello!", "Who are you?", "Good morning", "Hey"))
        answer = WHO_I_AM if "?" in greeting else f"Hello! {WHO_I_AM} {WHAT_I_DO}"
        return chat("tool not needed", [*messages, user(greeting)], answer, None, tools)
    fact = any_question(rng)
    return chat("tool not needed", [*messages, user(fact.question)], fact.sentence, fact.short, tools)


def _after_call(messages: list[Message], tools: list[dict[str, Any]], call: Call, rng: random.Random) -> Example:
    result = rng.choice(call.results)
    content = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
    arguments = call.arguments if rng.random() < 0.5 else json.dumps(call.arguments, ensure_ascii=False)
    made = {"id": "call_0", "type": "function", "function": {"name": call.name, "arguments": arguments}}
    turn = {**assistant(""), "tool_calls": [made]}
    answer = in_words(result)
    if rng.random() < 0.2:
        tools = []
    return chat("tool result", [*messages, turn, {"role": "tool", "content": content}], answer, answer, tools)


def in_words(result: str | dict[str, Any]) -> str:
    """`The temperature is 21 and the sky is clear.` for an object, `The result is 21.` for anything else."""
    if not isinstance(result, dict):
        return f"{result}." if result.startswith("It is") else f"The result is {result}."
    parts = [f"the {key.replace('_', ' ')} is {value}" for key, value in result.items()]
    sentence = " and ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]}."


def _city(rng: random.Random) -> str:
    draw = rng.random()
    if draw < 0.5:
        return rng.choice(COUNTRIES).capital
    if draw < 0.65:
        return rng.choice(_OTHER_CITIES)
    name = invented_word(rng).capitalize()
    if draw < 0.8:
        return f"{rng.choice(('New', 'San', 'Saint', 'Port', 'Los'))} {name}" if rng.random() < 0.4 else name
    return f"{name if rng.random() < 0.5 else rng.choice(_OTHER_CITIES)}, {rng.choice(_REGIONS)}"


_OTHER_CITIES = phrases(
    """
    New York;San Francisco;Brooklyn;Los Angeles;Chicago;Munich;Milan;Barcelona;Zurich;Geneva;Sydney;Toronto;Mumbai
    Shanghai;Istanbul;Rio de Janeiro;Boston;Seattle;Hamburg;Lyon;Marseille;Porto;Krakow;Kyoto;Osaka;Dubai
    """
)
_REGIONS = phrases(
    """
    CA;NY;Texas;New York;California;France;Germany;Japan;Italy;Spain;Canada;USA;UK;Ontario;Bavaria
    """
)
_SKIES = phrases("sunny;cloudy;rainy;windy;snowy;foggy;clear;warm;cold")


def _weather(rng: random.Random) -> Call:
    city, sky, degrees = _city(rng), rng.choice(_SKIES), rng.randint(-9, 40)
    key = rng.choice(("city", "city", "location", "location", "place", "town"))
    parameters: dict[str, Any] = {key: _STRING}
    arguments: dict[str, Any] = {key: city}
    question = rng.choice(
        (
            "What is the weather in {x}?",
            "What's the weather in {x}?",
            "What's the weather like in {x}?",
            "What is the weather like in {x} today?",
            "How is the weather in {x}?",
            "How's the weather in {x} today?",
            "Tell me the weather in {x}.",
            "Weather in {x}?",
            "Is it raining in {x}?",
            "Is it warm in {x}?",
            "Will it rain in {x}?",
            "What is the temperature in {x}?",
            "Get the weather for {x}.",
            "What is the current weather in {x}?",
            "Give me the weather for {x}.",
        )
    ).replace("{x}", city)
    if rng.random() < 0.3:
        unit = rng.choice(("unit", "format", "units"))
        units = ["celsius", "fahrenheit"]
        arguments[unit] = rng.choice(units)
        parameters[unit] = {"type": "string", "enum": units}
        if arguments[unit] == units[1] or rng.random() < 0.5:
            question = question.rstrip("?.") + f" in {arguments[unit]}" + rng.choice("?.")
    name = rng.choice(
        (
            "get_weather",
            "get_weather",
            "get_current_weather",
            "get_current_weather",
            "weather",
            "current_weather",
            "fetch_weather",
        )
    )
    if rng.random() < 0.15:
        days = rng.randint(2, 14)
        name, key = (
            rng.choice(("get_n_day_weather_forecast", "get_forecast", "weather_forecast")),
            rng.choice(("num_days", "days")),
        )
        parameters[key], arguments[key] = _INTEGER, days
        question = rng.choice(
            (
                f"What is the weather like the next {days} days in {city}?",
                f"Give me the weather forecast for {days} days in {city}.",
                f"What will the weather be in {city} for the next {days} days?",
            )
        )
        if len(parameters) > 2:  # with a unit that this question does not say
            arguments[next(k for k in arguments if k in ("unit", "format", "units"))] = "celsius"
    description = rng.choice(
        ("Get the current weather", "Get the weather in a city", "Weather of a place", "Get the weather", "")
    )
    results = (
        f"{degrees} degrees and {sky}",
        f"It is {sky} in {city}",
        {"temperature": degrees, rng.choice(("condition", "sky", "weather")): sky},
        {"temperature": degrees},
        sky,
        f"{degrees}°C",
    )
    return Call(name, description, parameters, question, arguments, results)


def _time(rng: random.Random) -> Call:
    city, key = _city(rng), rng.choice(("city", "location", "timezone", "place"))
    question = rng.choice(
        (
            "What time is it in {x}?",
            "Tell me the time in {x}.",
            "What is the time in {x}?",
            "What's the time in {x} now?",
        )
    )
    clock = f"{rng.randint(0, 23)}:{rng.randint(0, 59):02}"
    name = rng.choice(("get_time", "get_current_time", "time", "current_time"))
    description = rng.choice(("Get the current time", "Time in a city", "Tell the time", ""))
    return Call(
        name,
        description,
        {key: _STRING},
        question.replace("{x}", city),
        {key: city},
        (clock, {"time": clock}, f"It is {clock}"),
    )


def _arithmetic(rng: random.Random) -> Call:
    limit = rng.choice((20, 99, 999, 9999))
    left, right = rng.randint(0, limit), rng.randint(0, limit)
    x, y = rng.choice(
        (
            ("a", "b"),
            ("a", "b"),
            ("x", "y"),
            ("first", "second"),
            ("num1", "num2"),
            ("left", "right"),
            ("first_number", "second_number"),
        )
    )
    names, description, questions, result = rng.choice(
        (
            (
                ("add", "add_numbers", "sum", "addition"),
                "Add two numbers",
                (
                    "What is {a} + {b}?",
                    "Add {a} and {b}.",
                    "What is {a} plus {b}?",
                    "How much is {a} + {b}?",
                    "Calculate {a} + {b}.",
                    "What is the sum of {a} and {b}?",
                ),
                left + right,
            ),
            (
                ("multiply", "multiply_numbers", "product", "times"),
                "Multiply two numbers",
                (
                    "What is {a} times {b}?",
                    "Multiply {a} by {b}.",
                    "What is {a} * {b}?",
                    "Multiply {a} and {b}.",
                    "What is the product of {a} and {b}?",
                ),
                left * right,
            ),
            (
                ("subtract", "minus", "difference"),
                "Subtract two numbers",
                ("What is {a} minus {b}?", "What is {a} - {b}?", "Subtract {b} from {a}."),
                left - right,
            ),
        )
    )
    question = rng.choice(questions).replace("{a}", str(left)).replace("{b}", str(right))
    number = rng.choice((_INTEGER, _NUMBER))
    return Call(
        rng.choice(names),
        rng.choice((description, description, "")),
        {x: number, y: number},
        question,
        {x: left, y: right},
        (str(result), {"result": result}, {"answer": result}),
    )


def _calculator(rng: random.Random) -> Call:
    expression = f"{rng.randint(0, 999)} {rng.choice('+-*/')} {rng.randint(0, 999)}"
    key = rng.choice(("expression", "formula", "input"))
    name = rng.choice(("calculator", "calculate", "eval_expression", "math"))
    question = rng.choice(("What is {x}?", "Calculate {x}.", "How much is {x}?", "Compute {x}.")).replace(
        "{x}", expression
    )
    result = rng.randint(0, 9999)
    return Call(
        name,
        rng.choice(("Calculate an expression", "")),
        {key: _STRING},
        question,
        {key: expression},
        (str(result), {"result": result}),
    )


def _search(rng: random.Random) -> Call:
    searched = [
        rng.choice((*COLOURS, *THINGS, *ANIMALS, invented_word(rng), invented_word(rng)))
        for _ in range(rng.randint(1, 3))
    ]
    query = " ".join(searched) if rng.random() < 0.7 else " ".join(searched).title()
    key = rng.choice(("query", "query", "q", "text", "keywords"))
    question = rng.choice(
        (
            "Search for {x}.",
            "Search for {x}",
            "Look up {x}.",
            "Search the web for {x}.",
            "Find {x} on the web.",
            "Google {x}.",
            "Please search {x}.",
        )
    ).replace("{x}", query)
    name = rng.choice(("search", "web_search", "search_web", "google", "lookup", "find"))
    found = rng.randint(0, 99)
    return Call(
        name,
        rng.choice(("Search the web", "Search for information", "")),
        {key: _STRING},
        question,
        {key: query},
        (f"{found} pages", {"count": found}, f"a page about {query}"),
    )


def _stock(rng: random.Random) -> Call:
    symbol = "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(rng.randint(3, 4)))
    key = rng.choice(("symbol", "ticker", "stock"))
    question = rng.choice(
        (
            "What is the stock price of {x}?",
            "Price of {x} stock?",
            "What does {x} stock cost?",
            "Get the stock price for {x}.",
        )
    )
    price = rng.randint(1, 999)
    name = rng.choice(("get_stock_price", "stock_price", "get_stock"))
    return Call(
        name,
        "Get the price of a stock",
        {key: _STRING},
        question.replace("{x}", symbol),
        {key: symbol},
        (str(price), {"price": price}),
    )


def _capital(rng: random.Random) -> Call:
    country = rng.choice(COUNTRIES)
    key = rng.choice(("country", "country_name", "name"))
    name = rng.choice(("get_capital", "capital", "lookup_capital", "find_capital"))
    question = f"What is the capital of {country.in_text}?"
    results = (country.capital, {"capital": country.capital})
    return Call(name, "Get the capital of a country", {key: _STRING}, question, {key: country.name}, results)


def _message(rng: random.Random) -> Call:
    to, said = person(rng), f"{rng.choice(COLOURS)} {rng.choice(THINGS)} {invented_word(rng)}"
    text = rng.choice((said, said.capitalize(), "hello", "good morning", "see you soon"))
    who, what = rng.choice(("to", "recipient", "name")), rng.choice(("text", "message", "body", "subject"))
    kind = rng.choice(("email", "message", "mail"))
    question = rng.choice(
        (
            f"Send {a(kind)} to {to}: {text}",
            f"Send the {kind} {text} to {to}.",
            f'Send {a(kind)} to {to} saying "{text}"',
        )
    )
    return Call(
        f"send_{kind}",
        f"Send {a(kind)}",
        {who: _STRING, what: _STRING},
        question,
        {who: to, what: text},
        ("sent", {"status": "sent"}, "done"),
    )


def _alarm(rng: random.Random) -> Call:
    clock = f"{rng.randint(0, 23)}:{rng.randint(0, 59):02}"
    if rng.random() < 0.5:
        question = rng.choice(("Set an alarm for {x}.", "Wake me at {x}.", "Set the alarm to {x}")).replace(
            "{x}", clock
        )
        return Call(
            "set_alarm", "Set an alarm", {"time": _STRING}, question, {"time": clock}, ("done", {"status": "set"})
        )
    key = rng.choice(("minutes", "seconds"))
    count = rng.randint(1, 90)
    question = rng.choice((f"Set a timer for {count} {key}.", f"Start a timer of {count} {key}."))
    return Call(
        rng.choice(("set_timer", "start_timer")),
        "Set a timer",
        {key: _INTEGER},
        question,
        {key: count},
        ("done", {"status": "started"}),
    )


_VERBS = words(
    """
    book order find open close delete create start stop check get show read buy sell play call count print update
    remove
    """
)
_NOUNS = words(
    """
    table ticket room file order invoice lamp device account flight hotel user customer song film book product page
    note task
    """
)
_KEYS = words("name id title number value key label")


def _any_action(rng: random.Random) -> Call:
    """An action on a thing, so that names, keys and values can only be copied."""
    verb, noun = rng.choice(_VERBS), rng.choice(_NOUNS)
    if rng.random() < 0.15:
        noun = invented_word(rng)
    value: str | int = rng.randint(0, 99999) if rng.random() < 0.4 else invented_word(rng)
    if isinstance(value, str) and rng.random() < 0.5:
        value = value.capitalize() if rng.random() < 0.7 else f"{rng.choice(NAMES)} {value.capitalize()}"
    key = rng.choice((noun, rng.choice(_KEYS), f"{noun}_{rng.choice(_KEYS)}"))
    question = rng.choice(
        (
            "{v} the {n} {x}.",
            "Please {v} the {n} {x}.",
            "Can you {v} the {n} {x}?",
            "{v} {n} {x}",
            "I want to {v} the {n} {x}.",
        )
    )
    question = question.replace("{v}", verb).replace("{n}", noun).replace("{x}", str(value))
    name = rng.choice((f"{verb}_{noun}", f"{verb}_{noun}", f"{verb}{noun.capitalize()}", f"{noun}_{verb}"))
    description = rng.choice((f"{verb.capitalize()} {a(noun)}", f"{verb.capitalize()} the {noun}", ""))
    schema = _INTEGER if isinstance(value, int) else _STRING
    number = rng.randint(0, 999)
    results = (
        "ok",
        {"status": "ok"},
        {rng.choice(("status", "state")): rng.choice(("done", "open", "closed", "ready"))},
        {noun: number},
        str(number),
    )
    return Call(name, description, {key: schema}, question[0].upper() + question[1:], {key: value}, results)


_CALLS: tuple[Callable[[random.Random], Call], ...] = (
    _weather,
    _weather,
    _weather,
    _time,
    _arithmetic,
    _arithmetic,
    _calculator,
    _search,
    _stock,
    _capital,
    _message,
    _alarm,
    _any_action,
    _any_action,
    _any_action,
)
