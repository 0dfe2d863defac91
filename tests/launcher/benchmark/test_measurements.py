"""What the numbers of a row mean."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_generation_launcher.benchmark.measurements import BatchResult, Run, Summary, percentile, summarise


@given(values=st.lists(st.floats(0, 1e6), min_size=1), percent=st.sampled_from([0, 50, 90, 99, 100]))
def test_percentiles_are_numpys(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(float(numpy.percentile(values, percent)))


def test_a_percentile_of_nothing_is_not_a_number() -> None:
    assert math.isnan(percentile([], 50))


def test_a_summary_has_tgis_columns() -> None:
    assert summarise([3.0, 1.0, 2.0, 5.0, 4.0]) == Summary(
        average=3.0, lowest=1.0, highest=5.0, p50=3.0, p90=percentile([1, 2, 3, 4, 5], 90), p99=4.96
    )
    assert summarise([]) is None


def test_rates_count_what_each_step_yields(make_run: Callable[..., Run]) -> None:
    run = make_run(4, prefill_ms=10, token_ms=(2, 3, 5))
    assert run.prefill_rate == pytest.approx(4 / 0.010), "one token for each sequence, as TGI counts"
    assert run.prompt_rate == pytest.approx(40 / 0.010)
    assert run.decode_rate == pytest.approx(12 / 0.010)


def test_without_decode_steps_there_is_no_rate(make_run: Callable[..., Run]) -> None:
    result = BatchResult(1, [make_run(1, token_ms=())])
    assert (result.token_s, result.decode_s, result.decode_rates) == ([], [], [])
    assert len(result.prefill_rates) == 1


def test_a_result_holds_the_values_of_all_its_runs(make_run: Callable[..., Run]) -> None:
    result = BatchResult(2, [make_run(2, prefill_ms=1), make_run(2, prefill_ms=2)])
    assert result.prefill_s == [0.001, 0.002]
    assert len(result.token_s) == 6
    assert len(result.decode_s) == len(result.decode_rates) == 2
