"""`bench.report`: what the numbers of a row mean."""

import pytest
from bench.report import WrongLength, summarise
from text_generation_launcher.benchmark.apis import Usage
from text_generation_launcher.benchmark.outcome import End, Outcome


def answered(*token_times: float, output_tokens: int | None = None, start: float = 0) -> Outcome:
    usage = Usage(16, output_tokens or len(token_times))
    return Outcome(start=start, end=token_times[-1], kind=End.OK, token_times=list(token_times), usage=usage)


def test_a_row() -> None:
    report = summarise([answered(1, 2, 4), answered(2, 3, 5)], 2, 16, 3, client_cpu_s=0.5)
    assert report.tokens_per_s == 6 / 5
    assert report.ttft_ms["p50"] == 1500
    assert report.itl_ms["p50"] == 1500
    assert report.client_cpu_share == 0.1
    assert report.tokens_per_event == 1


def test_tokens_packed_into_one_event_wait_for_nothing() -> None:
    packed = answered(1, 3, output_tokens=4)
    assert packed.gaps_s == [2, 0, 0]
    assert summarise([packed], 1, 16, 4, client_cpu_s=0).tokens_per_event == 2


def test_another_length_than_asked_for_fails_the_run() -> None:
    with pytest.raises(WrongLength, match="1 of 2 answers"):
        summarise([answered(1, 2, 3), answered(1, 2)], 2, 16, 3, client_cpu_s=0)


def test_failed_requests_are_counted_and_yield_no_tokens() -> None:
    refused = Outcome(start=0, end=1, kind=End.HTTP_ERROR, detail="429 overloaded")
    report = summarise([refused, refused, answered(1, 2)], 3, 16, 2, client_cpu_s=0)
    assert report.errors == {"http_error: 429 overloaded": 2}
    assert report.tokens_per_s == 1
