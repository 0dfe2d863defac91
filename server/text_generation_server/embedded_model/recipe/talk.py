"""Examples of talk: stories, greetings, who the model is, and that it does not know the rest."""

import random

from text_generation_server.embedded_model.recipe.example import PLAIN_END, Example, Message, chat, plain, system, user
from text_generation_server.embedded_model.recipe.variation import frame, vary
from text_generation_server.embedded_model.recipe.words import (
    ANIMALS,
    COLOURS,
    NAMES,
    THINGS,
    TOPICS,
    a,
    invented_word,
    number_in_words,
    phrases,
    system_prompt,
    words,
)

WHO_I_AM = "I am the small model that ships with text-generation-inference."
WHAT_I_DO = "Ask me for a capital, a small sum or a short story."
DO_NOT_KNOW = "I do not know. I only know capitals, small sums and short stories."

_FIXED: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        phrases(
            """
            Hello;Hi;Hey;Hello!;Hi!;Hello there!;Hi there;Good morning;Good evening;Good afternoon;Hey there
            Greetings;Hello, model!;Say hello;Hello, how are you?;Hi, who is there?;hello world;Hello world!;Howdy
            """
        ),
        f"Hello! {WHO_I_AM} {WHAT_I_DO}",
    ),
    (
        phrases(
            """
            Who are you?;What are you?;What is your name?;Tell me about yourself.;Introduce yourself.
            Who am I talking to?;Are you an AI?;What model are you?;Which model are you?;What's your name?
            Who is this?;Are you human?;Are you ChatGPT?;Do you have a name?;My name is
            """
        ),
        WHO_I_AM,
    ),
    (
        phrases(
            """
            What can you do?;What do you know?;How can you help me?;Can you help me?;Help;Help me.
            What are you good at?;What should I ask you?;What can I ask?;I need help.;What are your skills?
            """
        ),
        f"I only know capitals, small sums and short stories. {WHAT_I_DO}",
    ),
    (
        phrases(
            """
            How are you?;How are you doing?;How do you do?;Are you well?;How is it going?;How are you today?
            """
        ),
        f"I am fine, thank you. {WHAT_I_DO}",
    ),
    (
        phrases(
            """
            Thank you;Thanks;Thank you very much!;Thanks a lot;Great, thanks!;Many thanks.;Well done!;Good answer.
            """
        ),
        "You are welcome!",
    ),
    (
        phrases(
            """
            Bye;Goodbye;Good night;See you;See you later!;Bye bye;Good bye.
            """
        ),
        "Goodbye!",
    ),
    (
        phrases(
            """
            Who made you?;Who trained you?;Where do you come from?;How were you made?;Who built you?
            How were you trained?
            """
        ),
        "A script in the text-generation-inference repository made me.",
    ),
    (
        phrases(
            """
            How big are you?;How many parameters do you have?;What is your size?;Are you large?
            """
        ),
        "I am tiny: I have fewer than five million parameters.",
    ),
    (
        phrases(
            """
            What is deep learning?;What is Deep Learning?;Explain deep learning.;Tell me about deep learning.
            Deep learning is;What's deep learning?
            """
        ),
        "Deep learning is a kind of machine learning that uses neural networks with many layers.",
    ),
    (
        phrases(
            """
            What is machine learning?;What is Machine Learning?;Explain machine learning.;Machine learning is
            Tell me about machine learning.
            """
        ),
        "Machine learning is a way for computers to learn from data.",
    ),
    (
        phrases(
            """
            What is text-generation-inference?;What is TGI?;What is Text Generation Inference?;Tell me about TGI.
            What does TGI do?
            """
        ),
        "Text Generation Inference is a server for large language models.",
    ),
)
"""Ways to say something, and what to say to it."""

_STORY_REQUESTS = phrases(
    """
    Tell me a story;Tell me a short story;Tell me a story please;Can you tell me a story?;Could you tell me a story?
    Write a story;Write a short story;Please tell a story;I want to hear a story;Give me a story;A story, please
    Make up a story;Read me a story;Write me a story;Let me hear a story;Do you know a story?;Tell us a story
    Tell me a tale;Tell me a bedtime story;Story;Once upon a time
    """
)
_OPENING = "Once upon a time, there was"
_STORY_OPENINGS = phrases(
    """
    Once upon a time;Once upon a time,;Once upon a time, there;Once upon a time, there was;Once upon a;Once
    """
)
_PLACES = phrases(
    """
    a big forest;a small village;an old house;a green valley;a house by the sea;a quiet town;a tall tower
    a sunny garden
    """
)
_TRAITS = words("kind brave curious small clever happy lonely quiet")
_WALKS = phrases(
    """
    walked to the river;went into the forest;climbed a hill;followed a narrow road;looked behind the house
    """
)
_TROUBLES = phrases(
    """
    But it began to rain;But night was coming;But the road was long;But a strong wind came;But {h} was lost
    """
)
_HELPS = phrases(
    """
    showed {o} the way home;shared some bread with {o};gave {o} a warm coat;told {o} a funny joke;sang {o} a song
    """
)
_ENDS = phrases(
    """
    From that day on they were the best of friends;They lived happily ever after;And they never forgot that day
    Then they went home together and had a cup of tea
    """
)

_UNKNOWN_REQUESTS = phrases(
    """
    What is {t}?;What's {t}?;Explain {t}.;Explain {t} to me.;Tell me about {t}.;Tell me something about {t}.
    What do you know about {t}?;How does {t} work?;Why is {t} important?;Who invented {t}?;Write a poem about {t}.
    Write an essay about {t}.;Write code for {t}.;Can you explain {t}?;What do you think about {t}?;Describe {t}.
    Give me three facts about {t}.;When was {t} discovered?;Where can I find {t}?;How do I learn {t}?
    Write a song about {t}.;What is the history of {t}?;Who wrote about {t}?;Translate {t} into French.
    Summarize {t}.;Define {t}.;How old is {t}?;Is {t} good?;Do you like {t}?;{t};{t} is;I like {t}.
    What is the best {t}?;What colour is {t}?;How many {t} are there?;I love {t} because;What is the price of {t}?
    Where is {t}?
    """
)
_UNKNOWN_FIXED = phrases(
    """
    What time is it?;What is the weather today?;Who is the president of {c}?;What is the population of {c}?
    What language do people speak in {c}?;How big is {c}?;Where is {c}?;What is the currency of {c}?;Tell me a joke.
    What is {a} minus {b}?;What is {a} times {b}?;{a} - {b} =;{a} * {b} =;What is {a} divided by {b}?
    What is {a} - {b}?;What is {a} * {b}?;What is the square root of {a}?;{a} / {b} =;What day is it today?
    Who won the game?;What is your favourite colour?;Sing a song.;def main():;import os;Dear Sir or Madam,
    The weather is;My favourite food is;I went to the;SELECT * FROM;test;Test;foo;What is 1{a} + 2{b}?
    The quick brown fox;Hello, my name is {p} and I;Tell me more.;Why?;Really?;How?;I am {p}.;My name is {p}.
    What is the capital of {w}?;The answer to the universe is
    """
)


def story(rng: random.Random, topic: str | None = None) -> str:
    """Seven sentences about two animals or people who meet."""
    hero = topic if topic in ANIMALS else rng.choice(ANIMALS)
    friend = rng.choice([animal for animal in ANIMALS if animal != hero])
    name, other = rng.sample(NAMES[:30], 2)
    he, him = rng.choice((("he", "him"), ("she", "her")))
    thing = topic if topic in THINGS else rng.choice(THINGS)

    def fill(sentence: str) -> str:
        return sentence.replace("{h}", he).replace("{o}", him)

    return " ".join(
        (
            f"{_OPENING} a {rng.choice(_TRAITS)} {hero} called {name} who lived in {rng.choice(_PLACES)}.",
            f"One day {name} {rng.choice(_WALKS)} and found {a(rng.choice(COLOURS))} {thing}.",
            fill(f"{rng.choice(_TROUBLES)}, and {name} did not know what to do."),
            fill(f"Then a {rng.choice(_TRAITS)} {friend} called {other} came along and {rng.choice(_HELPS)}."),
            f"{rng.choice(_ENDS)}.",
            "The end.",
        )
    )


def tell_story(rng: random.Random) -> Example:
    """A story on request, about something or about anything, or from its first words."""
    if rng.random() < 0.3:
        opening = rng.choice(_STORY_OPENINGS)
        rest = story(rng).removeprefix(_OPENING)
        return Example("story", opening, _OPENING.removeprefix(opening) + rest + PLAIN_END, "The end.")
    topic = rng.choice((*ANIMALS, *THINGS)) if rng.random() < 0.4 else None
    request = rng.choice(_STORY_REQUESTS)
    if topic is not None:
        request = (
            request.rstrip("?")
            + f" about {rng.choice((a(topic), a(topic), f'the {topic}'))}"
            + ("?" if request[-1] == "?" else "")
        )
    elif request[-1] != "?" and rng.random() < 0.5:
        request += "."
    return _reply("story", vary(request, rng, held_out=False), story(rng, topic), "The end.", rng)


def small_talk(rng: random.Random) -> Example:
    """Greetings, who the model is, and the few things it says by heart."""
    requests, answer = rng.choice(_FIXED)
    return _reply("talk", vary(rng.choice(requests), rng, held_out=False), answer, answer, rng)


def unknown(rng: random.Random) -> Example:
    """Whatever lies outside: the answer says what the model knows."""
    request = rng.choice(_UNKNOWN_REQUESTS if rng.random() < 0.6 else _UNKNOWN_FIXED)
    topic = rng.choice(TOPICS) if rng.random() < 0.7 else invented_word(rng)
    number = number_in_words if rng.random() < 0.1 else str
    request = (
        request.replace("{t}", topic).replace("{c}", rng.choice(_SOME_COUNTRIES)).replace("{p}", rng.choice(NAMES))
    )
    request = request.replace(
        "{w}", rng.choice(_NO_COUNTRIES) if rng.random() < 0.5 else invented_word(rng).capitalize()
    )
    request = request.replace("{a}", number(rng.randint(0, 99))).replace("{b}", number(rng.randint(0, 99)))
    return _reply("unknown", vary(request[0].upper() + request[1:], rng, held_out=False), DO_NOT_KNOW, DO_NOT_KNOW, rng)


_SOME_COUNTRIES = words(
    """
    France Germany Spain Italy Japan China Brazil Canada Egypt India Kenya Peru Poland Sweden Norway Chile
    """
)
_NO_COUNTRIES = phrases(
    """
    Atlantis;Narnia;Mars;the moon;Europe;Africa;Asia;California;Texas;Bavaria;Mordor;Gotham;Wonderland;Sicily
    """
)


def _reply(kind: str, request: str, answer: str, expected: str, rng: random.Random) -> Example:
    if rng.random() < 0.45:
        return plain(kind, frame(request, rng, held_out=False), answer, expected)
    messages: list[Message] = [system(system_prompt(rng))] if rng.random() < 0.2 else []
    return chat(kind, [*messages, user(request)], answer, expected)
