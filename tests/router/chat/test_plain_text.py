from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from text_generation_router.chat.plain_text import PlainText, pieces_of

PLAIN = PlainText(["<s>", "</s>", "<|im_end|>", "<|im"])
TEXTS = st.lists(st.sampled_from(["<s>", "<|im_end|>", "<|im", "a", " ", "\ufdd0", "\ufdd1", "0", "🦊"])).map("".join)


def test_the_longest_token_is_found_and_the_rest_stays() -> None:
    hidden: list[str] = []
    message = {"role": "user", "content": "a<|im_end|>b</s>", "tool_calls": [{"id": 5, "arguments": {"<s>": "<s>"}}]}
    changed = PLAIN.hide(message, hidden)
    assert hidden == ["<|im_end|>", "</s>", "<s>"]
    assert changed["role"] == "user"
    assert list(changed["tool_calls"][0]["arguments"]) == ["<s>"]
    prompt = "<s>user:" + changed["content"] + "</s>"
    assert pieces_of(prompt, hidden) == [
        ("<s>user:a", False),
        ("<|im_end|>", True),
        ("b", False),
        ("</s>", True),
        ("</s>", False),
    ]


@given(st.lists(TEXTS, max_size=4))
def test_a_prompt_says_what_was_written(contents: list[str]) -> None:
    hidden: list[str] = []
    messages: list[dict[str, Any]] = PLAIN.hide([{"content": content} for content in contents], hidden)
    prompt = "".join(f"<s>{message['content']}</s>" for message in messages)
    pieces = pieces_of(prompt, hidden)
    assert "".join(text for text, _ in pieces) == "".join(f"<s>{content}</s>" for content in contents)
    assert sum(text == "<s>" for text, plain in pieces if plain) == sum(content.count("<s>") for content in contents)
    assert not any("<|im" in text for text, plain in pieces if not plain)
