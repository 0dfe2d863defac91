"""Words that examples are filled with: numbers, names, things, invented words, system prompts."""

import random


def words(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


def phrases(text: str) -> tuple[str, ...]:
    """What stands between semicolons and line ends."""
    return tuple(phrase for line in text.strip().splitlines() for phrase in line.strip().split(";"))


_SMALL = words(
    """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen
    """
)
_TENS = words("twenty thirty forty fifty sixty seventy eighty ninety")

NAMES = words(
    """
    Anna Tom Maria John Lucy Peter Emma Paul Alice Bob Carol David Eve Frank Grace Henry Ines Jack Kate Leo Mia Noah
    Olivia Oscar Rosa Sam Sara Tina Victor Wendy Yara Zoe Ahmed Fatima Chen Wei Yuki Hiro Priya Raj Ivan Olga Pedro
    Juan Sofia Lars Freya Amara Kofi Nia Luca Giulia Hans Greta Marc Claire Erik Alan Ada Linus Jane Mary James
    Robert Linda Michael Sarah Daniel Laura Julia
    """
)
ANIMALS = words(
    """
    cat dog fox bear bird fish mouse rabbit horse frog owl duck lion tiger wolf goat hen bee turtle puppy raccoon
    """
)
THINGS = words(
    """
    apple book box table lamp chair shoe hat cup ball car boat train bicycle phone letter coin key clock pen bag
    bottle window door garden house river tree flower stone cake bread pizza coffee tea soup song film game picture
    computer robot
    """
)
COLOURS = words("red blue green yellow white black brown pink orange purple grey")
JOBS = words(
    """
    teacher doctor engineer baker farmer pilot nurse cook painter writer lawyer student singer driver gardener
    """
)
TOPICS = phrases(
    """
    quantum physics;the theory of relativity;photosynthesis;black holes;the French Revolution;World War II
    the Roman Empire;the stock market;climate change;the internet;electric cars;football;chess;yoga;cooking;jazz
    Shakespeare;Hamlet;Mozart;Einstein;Napoleon;the moon;the sun;Mars;the ocean;volcanoes;dinosaurs;whales;elephants
    bees;the human heart;the brain;vitamins;sleep;money;taxes;love;happiness;friendship;the meaning of life
    philosophy;democracy;history;mathematics;algebra;prime numbers;chemistry;water;gold;iron;oxygen;DNA;viruses
    medicine;Python;Rust;Java;Linux;a compiler;a database;a GPU;HTTP;a for loop;recursion;sorting;blockchain;bitcoin
    the weather;rain;snow;winter;summer;Christmas;the Olympic Games;tennis;a good recipe for pancakes;pasta;pizza
    wine;beer;tea;coffee;dogs;cats;horses;gardening;painting;photography;the Mona Lisa;the Eiffel Tower
    the Great Wall;airplanes;trains;rockets;robots;telescopes;time travel;unicorns;dragons;the alphabet;Latin
    """
)

_SYSTEM_FRAMES = (
    "You are {a} assistant.",
    "You are {a} assistant. {b}",
    "{b}",
    "You are {a} AI. {b} {c}",
    "You are a {a} chatbot. {b} {c}",
    "{b} {c}",
    "You are {n}, {a} assistant. {b} {c}",
)
_ADJECTIVES = phrases(
    """
    a helpful;a friendly;a polite;a useful;a concise;an honest;a clever;a kind;a patient;a great;an expert
    """
)
_RULES = (
    "Answer the question.",
    "Answer the questions of the user.",
    "Be concise.",
    "Be brief and polite.",
    "Always tell the truth.",
    "Help the user.",
    "Do not say anything rude.",
    "Think before you answer.",
    "Answer in English.",
    "Give short answers.",
    "If you do not know, say so.",
    "You always respond politely.",
    "Never lie.",
    "Today is a nice day.",
    "Follow the instructions carefully.",
    "The user may ask anything.",
    "Keep your answers short and clear.",
    "You work for a large company.",
    "You know a lot about the world.",
)
_FILLER_OPENINGS = phrases("The;Every;My;Our;Some;One;That")
_FILLER_VERBS = phrases("sees;likes;finds;has;wants;keeps;follows;needs;loves;buys;sells;draws")


def number_in_words(number: int) -> str:
    """0 to 99, as `forty-two`."""
    if number < 20:
        return _SMALL[number]
    tens, ones = divmod(number, 10)
    return _TENS[tens - 2] + (f"-{_SMALL[ones]}" if ones else "")


def system_prompt(rng: random.Random) -> str:
    """What people put before a conversation; now and then a long text that has nothing to do with it."""
    rules = rng.sample(_RULES, 2)
    text = rng.choice(_SYSTEM_FRAMES).replace("{n}", rng.choice(NAMES))
    text = (
        text.replace("{a}", rng.choice(_ADJECTIVES))
        .replace("{b}", rules[0])
        .replace("{c}", rules[1])
        .replace("a a", "a")
    )
    return f"{text} {filler(rng)}" if rng.random() < 0.08 else text


def filler(rng: random.Random) -> str:
    """3 to 30 sentences without a question in them, or one sentence said again and again."""
    count = rng.randint(3, 12) if rng.random() < 0.75 else rng.randint(12, 30)
    if rng.random() < 0.5:
        return " ".join([rng.choice(_RULES) if rng.random() < 0.5 else filler_sentence(rng)] * count)
    return " ".join(filler_sentence(rng) for _ in range(count))


def a(noun: str) -> str:
    """The noun with its indefinite article."""
    return f"an {noun}" if noun[0].lower() in "aeiou" else f"a {noun}"


def filler_sentence(rng: random.Random) -> str:
    subject = rng.choice((*NAMES, *(f"{rng.choice(_FILLER_OPENINGS)} {animal}" for animal in ANIMALS)))
    return f"{subject} {rng.choice(_FILLER_VERBS)} {a(rng.choice(COLOURS))} {rng.choice(THINGS)}."


def invented_word(rng: random.Random) -> str:
    """A word that no corpus holds, so that answering with it means copying it."""
    syllables = [rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.randint(1, 3))]
    return "".join(syllables) + rng.choice(("n", "r", "s", "l", "", "x", "th", "m"))


def person(rng: random.Random) -> str:
    """A name, at times with a family name, at times invented."""
    first = rng.choice(NAMES) if rng.random() < 0.6 else invented_word(rng).capitalize()
    return f"{first} {invented_word(rng).capitalize()}" if rng.random() < 0.2 else first
