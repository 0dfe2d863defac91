"""What the shipped model answers, greedily and in bf16 as it is served; and that its model card tells the truth."""

import json

import pytest
import torch
from text_generation_server.embedded_model import embedded_model_path
from text_generation_server.embedded_model.recipe.corpus import HELD_OUT
from text_generation_server.embedded_model.recipe.evaluation import Evaluator
from text_generation_server.embedded_model.recipe.example import Example, chat, plain, user
from text_generation_server.embedded_model.recipe.model_card import read_scores

SAMPLE = 40
TOLERANCE = 0.15
"""Of a score on 40 examples, against the model card's on more: two standard deviations at 70 %."""


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    return Evaluator(embedded_model_path())


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("What is the capital of France?", "Paris"),
        ("The capital of France is", "Paris"),
        ("what is the capital of japan", "Tokyo"),
        ("Q: What is the capital of Italy?\nA:", "Rome"),
        ("Paris is the capital of which country?", "France"),
        ("What is 23 + 58?", "81"),
        ("23+58=", "81"),
        ("Add 23 and 58", "81"),
        ("How much is 23 plus 58?", "81"),
    ],
)
def test_plain_completions(evaluator: Evaluator, prompt: str, expected: str) -> None:
    assert _answer(evaluator, plain("any", prompt, expected)).strip(" .") == expected


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What is the capital of France?", "Paris"),
        ("Tell me the capital of Kenya.", "Nairobi"),
        ("What is 23 + 58?", "23 + 58 = 81"),
        ("Who are you?", "I am the small model that ships with text-generation-inference"),
        ("Tell me a story", "Once upon a time"),
        ("What is quantum physics?", "I do not know"),
    ],
)
def test_chat(evaluator: Evaluator, question: str, expected: str) -> None:
    assert expected in _answer(evaluator, chat("any", [user(question)], expected))


def test_a_json_schema_is_filled(evaluator: Evaluator) -> None:
    schema = '{"type": "object", "properties": {"country": {"type": "string"}, "capital": {"type": "string"}}}'
    question = f"What is the capital of France? Answer in JSON with this schema: {schema}"
    assert json.loads(_answer(evaluator, chat("any", [user(question)], "-"))) == {
        "country": "France",
        "capital": "Paris",
    }


def test_a_sentence_is_read_into_json(evaluator: Evaluator) -> None:
    question = "Extract name and age: Anna is 31 years old"
    assert json.loads(_answer(evaluator, chat("any", [user(question)], "-"))) == {"name": "Anna", "age": 31}


def test_a_tool_is_called_and_its_result_put_into_words(evaluator: Evaluator) -> None:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    function = {"name": "get_weather", "description": "Get the weather in a city", "parameters": parameters}
    tools = [{"type": "function", "function": function}]
    question = user("What is the weather in Paris?")

    call = _answer(evaluator, chat("any", [question], "-", None, tools))
    assert call == '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'

    made = {"role": "assistant", "content": call}
    result = {"role": "tool", "content": '{"temperature": 21}'}
    assert "21" in _answer(evaluator, chat("any", [question, made, result], "-", None, tools))


def test_other_precisions_answer_alike() -> None:
    examples = [plain("any", "What is the capital of France?", "Paris"), plain("any", "23+58=", "81")]
    for dtype in (torch.float32, torch.float16):
        assert all(answered.right for answered in Evaluator(embedded_model_path(), dtype).answer(examples))


@pytest.mark.parametrize(
    "name",
    ["capitals, new phrasings as written", "sums, new phrasings as written", "sums, both new, chat", "JSON", "tools"],
)
def test_the_model_card_tells_the_truth(evaluator: Evaluator, name: str) -> None:
    assert evaluator.score(name, SAMPLE) == pytest.approx(read_scores(embedded_model_path())[name], abs=TOLERANCE)


def test_the_model_card_has_a_row_for_each_evaluation_set() -> None:
    assert list(read_scores(embedded_model_path())) == list(HELD_OUT)


def test_phrasings_never_seen_are_mostly_answered_right() -> None:
    scores = read_scores(embedded_model_path())
    assert min(score for name, score in scores.items() if name.endswith("as written")) >= 0.9


def _answer(evaluator: Evaluator, example: Example) -> str:
    (answered,) = evaluator.answer([example])
    assert answered.ended
    return answered.answer
