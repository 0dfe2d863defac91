"""How a benchmark ends other than well."""

from __future__ import annotations


class BenchmarkError(Exception):
    """The text is the one line that says what is wrong and what to change; exit code 1."""
