"""Numbers as people read them: times and rates with three or four digits and a unit."""

from __future__ import annotations

NOTHING = "-"


def milliseconds(seconds: float | None) -> str:
    """``12.34 ms``, whatever the size: columns are compared."""
    return NOTHING if seconds is None else f"{seconds * 1e3:.2f} ms"


def tokens_per_second(rate: float | None) -> str:
    return NOTHING if rate is None else f"{rate:.2f} tokens/s"


def short(number: float) -> str:
    """Three digits: ``0.12``, ``1.23``, ``12.3``, ``123``, ``12.3k``."""
    if number >= 99_950:
        return f"{number / 1e3:.0f}k"
    if number >= 9_995:
        return f"{number / 1e3:.1f}k"
    if number >= 99.95:
        return f"{number:.0f}"
    return f"{number:.1f}" if number >= 9.995 else f"{number:.2f}"


def clock(seconds: float) -> str:
    """``1:05``, ``1:00:05``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
