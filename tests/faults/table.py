"""Writes what the tests of faults have seen into the table of docs/reliability.md."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"


def rows(results: Path) -> list[dict[str, str]]:
    """By the number of the fault."""

    def number(row: dict[str, str]) -> tuple[str, int]:
        match = re.fullmatch(r"(\D+)(\d+)", row["fault"])
        return (match[1], int(match[2])) if match else (row["fault"], 0)

    return sorted((json.loads(line) for line in results.read_text().splitlines()), key=number)


def table(results: Path) -> str:
    lines = ["| # | fault | expected | seen |", "|---|---|---|---|"]
    lines += [
        "| " + " | ".join(row[name].replace("|", "\\|") for name in ("fault", "what", "expected", "seen")) + " |"
        for row in rows(results)
    ]
    return "\n".join(lines)


def write_into(document: str, text: str) -> str:
    """The document with another table between its marks. Raises: ValueError where they are missing."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document has no {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    document = arguments.output.read_text()
    arguments.output.write_text(write_into(document, table(arguments.results)))


if __name__ == "__main__":
    main()
