"""How families of models mark what they think before they answer, by the names of ``--reasoning-parser``."""

from __future__ import annotations

ReasoningMarks = tuple[str, str]

_THINK = ("<think>", "</think>")
REASONING_MARKS: dict[str, ReasoningMarks] = {
    "think": _THINK,
    "deepseek_r1": _THINK,
    "qwen3": _THINK,
    "mistral": ("[THINK]", "[/THINK]"),
}
