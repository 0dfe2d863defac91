from __future__ import annotations

import json
from pathlib import Path

import pytest
from faults.table import BEGIN, END, table, write_into


def test_rows_stand_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    results = tmp_path / "results"
    found = [("F10", "x | y"), ("L5", "l"), ("F2", "z")]
    results.write_text(
        "\n".join(json.dumps({"fault": number, "what": what, "expected": "e", "seen": "s"}) for number, what in found)
    )
    assert table(results).splitlines()[2:] == ["| F2 | z | e | s |", "| F10 | x \\| y | e | s |", "| L5 | l | e | s |"]


def test_only_what_is_between_the_marks_changes() -> None:
    assert write_into(f"a\n{BEGIN}\nold\n{END}\nz", "new") == f"a\n{BEGIN}\nnew\n{END}\nz"
    with pytest.raises(ValueError, match="faults: begin"):
        write_into("nothing", "new")
