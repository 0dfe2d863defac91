"""Pure: which texts of a batch are computed together, at one length."""

from __future__ import annotations

from collections.abc import Sequence

MAX_PADDING = 0.05
"""Share of a pass that may be padding, before a pass of its own is cheaper."""
FEW_TOKENS = 128
"""A pass so small takes as long as its weights take to be read, whatever it computes: there padding is free."""


def group_by_length(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of ``lengths`` in groups, longest first; a text of more than ``max_tokens`` is alone in its group."""
    groups: list[list[int]] = []
    longest = total = 0
    for index in sorted(range(len(lengths)), key=lambda each: -lengths[each]):
        length = lengths[index]
        if groups:
            rows = len(groups[-1]) + 1
            padding = rows * longest - (total + length)
            few = rows * longest <= FEW_TOKENS
            if rows * longest <= max_tokens and (few or padding <= MAX_PADDING * rows * longest):
                groups[-1].append(index)
                total += length
                continue
        groups.append([index])
        longest = total = length
    return groups
