"""Lines for people and for machines, and a writer that never holds anything up."""

from __future__ import annotations

import json
import threading

import pytest
from text_generation_launcher.logs import LogSink, Record, own_level, parse_line, render_json, render_text
from text_generation_launcher.progress import Progress, Span

SHARD = {"rank": 0, "name": "shard-manager"}
LINE = (
    b'{"timestamp": "2026-01-02T03:04:05.000006+00:00", "level": "WARNING", "target": "a.b", "message": "hot", "n": 1}'
)


def test_a_shards_line_in_tgis_json() -> None:
    record, structured = parse_line(LINE, span=SHARD, flat=False)
    assert structured
    assert json.loads(render_json(record)) == {
        "timestamp": "2026-01-02T03:04:05.000006Z",
        "level": "WARN",
        "fields": {"message": "hot", "n": 1},
        "target": "a.b",
        "span": SHARD,
        "spans": [SHARD],
    }


def test_a_routers_line_is_flat_as_tgis_is() -> None:
    line = json.loads(render_json(parse_line(LINE, span=None, flat=True)[0]))
    assert (line["message"], line["n"], line["target"], "fields" in line) == ("hot", 1, "a.b", False)


def test_a_line_for_people() -> None:
    text = render_text(parse_line(LINE, span=SHARD, flat=False)[0])
    assert text == "2026-01-02T03:04:05.000006Z  WARN shard-manager{rank=0}: a.b: hot n=1"


def test_a_request_of_the_router_is_a_span() -> None:
    line = b'{"message": "Success", "target": "r", "timestamp": "T", "span": {"name": "generate", "seed": 1}}'
    record, _ = parse_line(line, span=None, flat=True)
    assert render_text(record) == "T  INFO generate{seed=1}: r: Success"
    spans = json.loads(render_json(record))
    assert spans["span"] == {"name": "generate", "seed": 1}
    assert spans["spans"] == [spans["span"]]


@pytest.mark.parametrize("line", [b"plain", b'{"no": "message"}', b"[1]", b"\xff\xfe", b'{"message": ' + b"[" * 99_999])
def test_any_other_line_is_kept(line: bytes) -> None:
    record, structured = parse_line(line, span=SHARD, flat=False)
    assert not structured
    assert record.level == "INFO"
    assert record.message == line.decode("utf-8", "replace")


def test_a_message_cannot_control_the_terminal_or_pass_for_another_line() -> None:
    record = Record(message="a\x1b[2J\r\nERROR b\x9b", target="child", timestamp="T", fields={"key": "\x07\n"})
    assert render_text(record) == "T  INFO child: a\\x1b[2J\\x0d\n    ERROR b\\x9b key=\\x07\\n"


def test_colour_is_around_the_line_alone() -> None:
    assert "\x1b[31mERROR\x1b[0m" in render_text(Record(message="m", level="ERROR"), colour=True)


def test_an_exception_follows_its_line() -> None:
    record = Record(message="m", target="t", timestamp="T", fields={"exception": "Traceback\nError"})
    assert render_text(record) == "T  INFO t: m\n    Traceback\n    Error"


@pytest.mark.parametrize(
    ("log_level", "level"),
    [("debug", 10), ("warn", 30), ("off", 50), ("info,text_generation_launcher=error", 40), ("h2=off", 20), ("?", 20)],
)
def test_the_launchers_own_level(log_level: str, level: int) -> None:
    assert own_level(log_level) == level


class Paper:
    """A display that can be made to stop, or to fail."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.open = threading.Event()
        self.open.set()
        self.torn = False

    def line(self, text: str) -> None:
        self.open.wait()
        if self.torn:
            raise BrokenPipeError
        self.lines.append(text)

    def progress(self, progress: Progress, span: Span) -> None: ...

    def end_progress(self, span: Span) -> None: ...

    def close(self) -> None: ...


def test_what_a_blocked_reader_misses_is_counted() -> None:
    paper = Paper()
    paper.open.clear()
    sink = LogSink(paper, lambda record: record.message, capacity=3)
    for number in range(10):
        sink.info(str(number))  # returns at once
    assert not sink.close(timeout=0.05)
    paper.open.set()
    assert sink.close()
    assert paper.lines[0] == "0"
    assert sum(line.endswith("log lines were dropped: the log was not read") for line in paper.lines) == 1


def test_a_reader_that_leaves_is_no_error() -> None:
    paper = Paper()
    paper.torn = True
    sink = LogSink(paper, lambda record: record.message)
    sink.info("a")
    assert sink.close()


def test_own_lines_below_the_level_are_not_written() -> None:
    paper = Paper()
    sink = LogSink(paper, lambda record: f"{record.level} {record.message}", level=30)
    sink.info("a")
    sink.warning("b")
    sink.error("c")
    assert sink.close()
    assert paper.lines == ["WARN b", "ERROR c"]
