from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from text_generation_proto.logs import BackgroundHandler, JsonFormatter, configure_logging, send_event


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    for name in ("text_generation_router", "text_generation.events"):
        logging.getLogger(name).setLevel(logging.NOTSET)


def lines(stream: io.BytesIO) -> list[dict[str, object]]:
    for handler in logging.getLogger().handlers:
        handler.flush()
    return [json.loads(line) for line in stream.getvalue().decode().splitlines()]


def test_a_record_is_one_line_whatever_is_in_it() -> None:
    stream = io.BytesIO()
    configure_logging("info", stream)
    logging.getLogger("here").warning("two\nlines %s", "\x1b[31m", extra={"field": 1})
    (line,) = lines(stream)
    assert (line["level"], line["target"], line["field"]) == ("WARNING", "here", 1)
    assert line["message"] == "two\nlines \x1b[31m"
    assert "\x1b" not in stream.getvalue().decode()


def test_an_exception_is_part_of_the_line() -> None:
    stream = io.BytesIO()
    configure_logging("info", stream)
    try:
        raise ValueError("why")
    except ValueError:
        logging.getLogger("here").exception("it failed")
    assert "ValueError: why" in str(lines(stream)[0]["exception"])


def test_a_filter_sets_levels_by_target() -> None:
    stream = io.BytesIO()
    configure_logging("warn,text_generation_router=debug", stream)
    logging.getLogger("other").info("hidden")
    logging.getLogger("text_generation_router.app").debug("shown")
    assert [line["message"] for line in lines(stream)] == ["shown"]


def test_an_unknown_level_is_named() -> None:
    stream = io.BytesIO()
    configure_logging("info,loud", stream)
    assert "loud" in str(lines(stream)[0]["message"])


def test_no_level_silences_messages_to_the_launcher() -> None:
    stream = io.BytesIO()
    configure_logging("off", stream)
    send_event("ready", "Listening", seconds={"load": 1.5})
    (line,) = lines(stream)
    assert (line["event"], line["seconds"]) == ("ready", {"load": 1.5})


def test_a_stream_that_nobody_reads_stops_nobody() -> None:
    reading, writing = os.pipe()
    with open(reading) as reader, open(writing, "wb", buffering=0) as writer, ThreadPoolExecutor() as pool:
        handler = BackgroundHandler(writer, capacity=100)
        handler.setFormatter(JsonFormatter())

        def log(message: str) -> None:
            handler.emit(logging.LogRecord("here", logging.INFO, "", 0, message, (), None))

        for _ in range(5000):  # some 600 kB; a pipe takes 64
            log("line")
        read = pool.submit(lambda: [json.loads(line)["message"] for line in reader])
        handler.flush()
        log("last")
        handler.flush()
        writer.close()
        *before, last = read.result()
        assert last == "last"
        dropped = sum(int(message.split()[0]) for message in before if "were dropped" in message)
        assert dropped > 0
        assert before.count("line") + dropped == 5000
