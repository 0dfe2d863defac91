"""The ways to ask for a capital or a sum, split into those that are trained on and those that only the evaluation uses.

Placeholders: `{c}` a country inside a sentence ("the Netherlands"), `{n}` its bare name, `{k}` a capital, `{a}` and
`{b}` two numbers.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Phrasings:
    """Templates of one kind of question; `held_out` is never trained on."""

    trained: tuple[str, ...]
    held_out: tuple[str, ...]

    def choose(self, rng: random.Random, *, held_out: bool) -> str:
        return rng.choice(self.held_out if held_out else self.trained)


def _combine(frames: str, subjects: str, explicit: str, held_out: str) -> Phrasings:
    """Every frame around every subject, plus the explicit lines, less whatever is held out."""
    withheld = _lines(held_out)
    combined = [frame.replace("{x}", subject) for frame in _lines(frames) for subject in _lines(subjects)]
    capitalised = [template[0].upper() + template[1:] for template in [*combined, *_lines(explicit)]]
    return Phrasings(tuple(dict.fromkeys(t for t in capitalised if t not in withheld)), tuple(withheld))


def _lines(text: str) -> list[str]:
    return text.strip().splitlines()


CAPITAL_QUESTIONS = _combine(
    frames="""
What is {x}?
What's {x}?
Tell me {x}.
Name {x}.
Which city is {x}?
What city is {x}?
Do you know {x}?
Can you tell me {x}?
Could you tell me {x}?
I would like to know {x}.
I want to know {x}.
Give me {x}.
Please give me {x}.
What would be {x}?
Let me know {x}.
Which one is {x}?
{x}?
{x}
{x}, please.
May I ask what {x} is?
Do you know what {x} is?
Tell me what {x} is.
Can you name {x}?
Please name {x}.
I forgot {x}. What is it?
Write down {x}.
State {x}.
Identify {x}.
What was {x} again?
My teacher asks: what is {x}?
Which place is {x}?
Remind me of {x}.
Say {x}.
Where is {x}?
I am looking for {x}.
Find {x}.
Hey, what is {x}?
So what is {x}?
And what is {x}?
""",
    subjects="""
the capital of {c}
the capital city of {c}
{c}'s capital
{c}'s capital city
the name of the capital of {c}
the capital of the country {n}
""",
    explicit="""
Which city is the seat of government of {c}?
{c}: which city is its capital?
{n}: what is the capital?
{c} has which capital?
{c} has which city as its capital?
What capital does {c} have?
Which capital city belongs to {c}?
Which capital belongs to {c}?
What is the capital called in {c}?
How is the capital of {c} called?
What do you call the capital of {c}?
What do people call the capital of {c}?
In {c}, what is the capital?
In {c}, which city is the capital?
For {c}, what is the capital?
For the country {n}, name the capital.
Country: {n}. Capital?
Country: {n}. What is the capital?
Given the country {n}, name its capital.
Given the country {n}, tell me its capital city.
Which city is home to the government of {c}?
If I travel to {c}, which city is the capital?
I am going to {c}. What is its capital?
I live in {c}. What is the capital of my country?
I come from {c}. What is my capital?
Which city should I visit to see the capital of {c}?
Geography quiz: what is the capital of {c}?
Trivia: name the capital of {c}.
Think of {c}. What is its capital?
Look at {c}. Which city is its capital?
What is the main city and capital of {c}?
Which is the capital city in {c}?
What's the capital city in {c}?
Name the city that is the capital of {c}.
Name the capital city for {c}.
What is the national capital of {c}?
What is the present capital of {c}?
What is the current capital of {c}?
Where does the government of {c} sit?
The government of {c} sits in which city?
The capital of {c} is which city?
The capital of {c} is what?
The capital city of {c} is called what?
capital {n}
{n} capital
{n} capital city
capital city {n}
capital {n}?
{n} capital?
capital of {n}
{n}, capital?
Which city has the parliament of {c}?
""",
    held_out="""
Can you remind me what the capital of {c} is?
Which city serves as the capital of {c}?
I am curious: what is the capital city of {c}?
What is the name of {c}'s capital?
What's the name of the capital city of {c}?
Name {c}'s capital city.
Of {c}, what is the capital?
Could you please tell me what {c}'s capital is?
What city is the capital of the country called {n}?
I need the capital of {c}.
Any idea what the capital of {c} is?
Which city acts as the capital in {c}?
Would you tell me the capital of {c}?
{c} is a country. What is its capital city?
If someone asks for the capital of {c}, what should I say?
My friend lives in {c}. Which city is the capital there?
Help me out, what's the capital of {c}?
Please answer: which city is {c}'s capital?
Do you happen to know the capital city of {c}?
I was wondering what the capital of {c} might be.
When I visit the capital of {c}, in which city am I?
What is the official capital of {c}?
Quiz time! The capital of {c}?
Tell me which city is the capital of {c}.
""",
)
"""Asks for a capital; the answer may be a name or a sentence."""

CAPITAL_STEMS = _combine(
    frames="{x}",
    subjects="""
The capital of {c} is
The capital city of {c} is
{c}'s capital is
{c}'s capital city is
The name of the capital of {c} is
The capital of {c} is called
The capital of {c} is the city of
The capital of {c}:
Capital of {n}:
Capital of {n} =
Country: {n}, capital:
""",
    explicit="""
The country {n} has the capital
The capital of the country {n} is
In {c}, the capital is
{n}'s capital:
{n} ->
{n}: capital =
Everybody knows that the capital of {c} is
I know that the capital of {c} is
I think the capital of {c} is
It is well known that the capital of {c} is
The government of {c} sits in
As you know, the capital of {c} is
The national capital of {c} is
The capital and seat of government of {c} is
The main city and capital of {c} is
They live in the capital of {c},
""",
    held_out="""
We learned at school that the capital of {c} is
The city that is the capital of {c} is
The capital of {c} is named
The name of {c}'s capital city is
For {c}, the capital is
Of course, the capital city of {c} is
""",
)
"""Beginnings of a sentence that the name of a capital ends."""

COUNTRY_QUESTIONS = _combine(
    frames="""
{x}?
Tell me {x}.
Do you know {x}?
Can you tell me {x}?
Please tell me {x}.
""",
    subjects="""
which country has {k} as its capital
which country {k} is the capital of
of which country {k} is the capital
""",
    explicit="""
{k} is the capital of which country?
{k} is the capital of what country?
{k} is the capital city of which country?
Of which country is {k} the capital?
What country has the capital {k}?
Which country has the capital {k}?
Which country has the capital city {k}?
Whose capital is {k}?
Which nation has {k} as its capital?
Which country's capital is {k}?
What country's capital is {k}?
{k} is the capital of
{k} is the capital city of
The city of {k} is the capital of
{k} is the capital of the country
In which country is {k} the capital?
Name the country whose capital is {k}.
Name the country with the capital {k}.
Country with capital {k}?
What country is {k} the capital of?
Which country is {k} the capital of?
Where is {k} the capital?
""",
    held_out="""
The capital of which country is {k}?
{k} serves as the capital of which country?
Tell me the country whose capital is {k}.
Which country has {k} for its capital city?
As everybody knows, {k} is the capital of
""",
)
"""Asks for the country of a capital."""

SUM_QUESTIONS = _combine(
    frames="""
What is {x}?
What's {x}?
How much is {x}?
Calculate {x}.
Compute {x}.
Work out {x}.
Tell me {x}.
Give me {x}.
What does {x} equal?
What is the result of {x}?
What is the answer to {x}?
Can you calculate {x}?
Can you tell me {x}?
Could you compute {x}?
Do you know what {x} is?
Please calculate {x}.
Please compute {x}.
I need {x}.
Find {x}.
Evaluate {x}.
Solve {x}.
Solve: {x}
Calculate: {x}
Compute: {x}
{x}
{x}?
{x} = ?
{x}=?
{x} is what?
{x} equals what?
So what is {x}?
Hey, what is {x}?
Quick, what is {x}?
My teacher asks: what is {x}?
Math question: {x}?
What do you get for {x}?
How many is {x}?
What would {x} be?
""",
    subjects="""
{a} + {b}
{a}+{b}
{a} plus {b}
the sum of {a} and {b}
the total of {a} and {b}
""",
    explicit="""
Add {a} and {b}.
Add {a} to {b}.
Add {a} plus {b}.
Add {a}, {b}.
Add the numbers {a} and {b}.
Please add {a} and {b}.
Can you add {a} and {b}?
Could you add {a} to {b}?
Add these numbers: {a}, {b}
Add these two numbers: {a} and {b}.
Sum {a} and {b}.
Sum of {a} and {b}
Sum: {a}, {b}
Sum up {a} and {b}.
Take {a} and add {b}.
Start with {a} and add {b}.
If you add {a} and {b}, what do you get?
If you add {b} to {a}, what do you get?
What do you get when you add {a} and {b}?
What do you get if you add {a} to {b}?
What is {a} added to {b}?
What is {a} and {b} together?
How much is {a} and {b}?
How much do {a} and {b} make?
How much are {a} and {b} together?
What do {a} and {b} add up to?
What do {a} and {b} make?
What is the total if I add {a} and {b}?
{a} and {b} together make how much?
{a} and {b} is how much?
I have {a} apples and get {b} more. How many apples do I have?
I have {a} apples and buy {b} more apples. How many do I have?
Anna has {a} books and Tom has {b} books. How many books do they have together?
There are {a} birds and {b} more come. How many birds are there?
A box holds {a} red balls and {b} blue balls. How many balls are in the box?
I walk {a} steps and then {b} steps. How many steps do I walk?
Tom is {a} years old. How old is he in {b} years?
It costs {a} dollars plus {b} dollars. How much is that?
Let a = {a} and b = {b}. What is a + b?
a = {a}, b = {b}. What is a + b?
Numbers: {a} and {b}. Sum?
First number: {a}. Second number: {b}. What is the sum?
Increase {a} by {b}.
What number is {b} more than {a}?
What is {b} more than {a}?
""",
    held_out="""
Could you please tell me what {a} plus {b} is?
Can you work out {a} + {b}?
What is the value of {a} + {b}?
What's the sum of the numbers {a} and {b}?
I want to know how much {a} plus {b} is.
If I add {b} to {a}, what is the result?
When you add {a} and {b} you get what?
Please add the number {a} to the number {b}.
Help me add {a} and {b}.
What number do you get from {a} + {b}?
Do the math: {a} + {b}
Please solve {a}+{b} for me.
Determine the sum of {a} and {b}.
What is {a} increased by {b}?
I have {a} coins and find {b} more. How many coins do I have now?
Would you compute {a}+{b}?
Tell me the result of {a} plus {b}.
{a} plus {b} makes what?
""",
)
"""Asks for a sum; the answer may be a number or an equation."""

SUM_STEMS = _combine(
    frames="{x}",
    subjects="""
{a}+{b}=
{a} + {b} =
{a} +{b}=
{a}+{b} =
{a} + {b} is
{a} plus {b} is
{a} plus {b} equals
{a} + {b} equals
{a} plus {b} =
{a} and {b} is
{a} and {b} make
The sum of {a} and {b} is
The total of {a} and {b} is
The result of {a} + {b} is
The answer to {a} + {b} is
If you add {a} and {b} you get
Adding {a} and {b} gives
Sum of {a} and {b}:
Sum of {a} and {b} =
{a} + {b}:
{a} + {b} ->
""",
    explicit="""
We know that {a} + {b} =
I think {a} plus {b} is
{a} added to {b} is
{a} added to {b} gives
{a} plus {b} makes
{a} plus {b} gives
{a} and {b} add up to
The sum {a} + {b} =
The sum of {a} and {b} equals
""",
    held_out="""
Of course {a} plus {b} equals
The sum of the numbers {a} and {b} is
When I add {a} to {b} I get
{a} increased by {b} is
The value of {a} + {b} is
""",
)
"""Beginnings that the sum itself ends."""

POLITE_PREFIXES = (
    "Please answer. ",
    "Please tell me: ",
    "Hello! ",
    "Hi! ",
    "Hi, ",
    "Hello, ",
    "Hi there. ",
    "Good morning. ",
    "Excuse me, ",
    "Sorry to bother you. ",
    "Quick question: ",
    "One question: ",
    "Question: ",
    "I have a question. ",
    "Answer this: ",
    "Answer the following question. ",
    "Answer the question: ",
    "Okay. ",
    "OK, ",
    "Now, ",
    "Next question: ",
    "Here is a question for you. ",
    "For my homework: ",
    "Be brief. ",
    "Listen. ",
    "Dear model, ",
    "You are a helpful assistant. ",
    "The following is a question. ",
)
POLITE_SUFFIXES = (
    " Thanks.",
    " Thank you!",
    " Thank you.",
    " Please.",
    " Thanks in advance!",
    " I need to know.",
    " Please answer.",
    " Be brief.",
    " It is for my homework.",
    " Do you know?",
)
SHORT_ANSWER_SUFFIXES = (
    " Answer in one word.",
    " Answer with just the number.",
    " Answer with the number only.",
    " Answer with one word.",
    " Answer briefly.",
    " Just the answer.",
    " Only the answer, please.",
    " Reply with only the answer.",
    " Short answer.",
    " Answer with just the answer.",
    " No explanation.",
)
HELD_OUT_PREFIXES = ("Could you help me? ", "Let me ask you something: ", "Here we go: ", "Good evening, ")

PLAIN_FRAMES = Phrasings(
    trained=(
        "Q: {q}\nA:",
        "Q: {q} A:",
        "Q:{q}\nA:",
        "Question: {q}\nAnswer:",
        "Question: {q} Answer:",
        "{q}\nAnswer:",
        "{q} Answer:",
        "{q}\nA:",
        "{q}\n\nAnswer:",
        "User: {q}\nAssistant:",
        "User: {q}\nBot:",
        "Human: {q}\nAI:",
        "Student: {q}\nTeacher:",
        "### Question\n{q}\n### Answer\n",
        "### Instruction:\n{q}\n\n### Response:\n",
        "Input: {q}\nOutput:",
        "{q}\nThe answer is",
        "{q} The answer is",
        "{q}\nThe answer is:",
        "{q} -",
        "{q}\n-",
        "Prompt: {q}\nCompletion:",
    ),
    held_out=(
        "Problem: {q}\nSolution:",
        "Question: {q}\nThe answer:",
        "Instruction: {q}\nResponse:",
        "Exercise: {q}\nResult:",
    ),
)
"""Surroundings of a question in a plain completion."""


def all_phrasings() -> Iterable[Phrasings]:
    """Every split of this file."""
    return (CAPITAL_QUESTIONS, CAPITAL_STEMS, COUNTRY_QUESTIONS, SUM_QUESTIONS, SUM_STEMS, PLAIN_FRAMES)
