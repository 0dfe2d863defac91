"""`bench.interference`: which gaps are quiet ones, which fall into the window, and what makes a repetition void."""

from dataclasses import replace
from itertools import accumulate, repeat

import pytest
from bench.interference import NoWindow, Setting, gaps_inside, gaps_touching, judge, row
from text_generation_launcher.benchmark.apis import Usage
from text_generation_launcher.benchmark.outcome import End, Outcome

SETTING = Setting(
    streams=2, prompt_tokens=128, output_tokens=101, long_tokens=3000, long_output_tokens=1, quiet_s=5
)  # fmt: skip


def stream(gap_s: float, slow_s: float, slow_from: int, slow: int) -> Outcome:
    """101 tokens from second 0 on, `slow` of which come later than the others."""
    gaps = [slow_s if slow_from <= i < slow_from + slow else gap_s for i in range(100)]
    times = list(accumulate([0.0, *gaps]))
    return Outcome(start=0, end=times[-1], kind=End.OK, token_times=times, usage=Usage(128, 101))


def long_prompt(sent: float, answered: float) -> Outcome:
    return Outcome(start=sent, end=answered, kind=End.OK, token_times=[answered], usage=Usage(3000, 1))


# 50 gaps of 0.1 s, then 20 of 0.4 s while the prompt is computed.
STREAMS = [stream(0.1, 0.4, slow_from=50, slow=20) for _ in range(2)]


def test_a_gap_at_the_rim_belongs_to_the_window_and_not_to_the_quiet() -> None:
    times = [0.0, 1.0, 2.0, 3.0, 4.0]
    assert gaps_inside(times, 0, 2.5) == [1.0, 1.0]
    assert gaps_touching(times, 2.5, 3.5) == [1.0, 1.0]


def test_the_ratio_is_that_of_the_slow_gaps() -> None:
    found = judge(STREAMS, long_prompt(5.05, 13), SETTING)
    assert found.ratio == pytest.approx(4)
    assert found.long_ttft_s == pytest.approx(7.95)
    assert max(found.quiet_s) == pytest.approx(0.1)
    assert min(found.during_s) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("long", "message"),
    [
        pytest.param(long_prompt(5.05, 99), "ended before", id="streams that are over see nothing"),
        pytest.param(long_prompt(0.5, 8), "quiet gaps", id="too little quiet"),
        pytest.param(replace(long_prompt(5.05, 13), usage=Usage(2999, 1)), "instead of", id="another prompt"),
        pytest.param(replace(long_prompt(5.05, 13), kind=End.HTTP_ERROR, detail="429"), "429", id="refused"),
    ],
)
def test_what_makes_a_repetition_void(long: Outcome, message: str) -> None:
    with pytest.raises(NoWindow, match=message):
        judge(STREAMS, long, SETTING)


def test_a_row_has_milliseconds_the_ratio_and_seconds() -> None:
    found = judge(STREAMS, long_prompt(5.05, 13), SETTING)
    assert row("ours", list(repeat(found, 3))) == "| ours | 100.0 | 100.0 | 400.0 | 400.0 | 4.00 | 7.95 |"
