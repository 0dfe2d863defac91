"""TGI's metric names, types, labels and buckets."""

from __future__ import annotations

import re

import pytest
from prometheus_client.parser import text_string_to_metric_families
from text_generation_router.metrics import DURATION_BUCKETS, HELP, Counter, Histogram, Metrics, linear_buckets

TGI = {
    "counter": [
        "tgi_request_count",
        "tgi_request_success",
        "tgi_request_failure",
        "tgi_batch_inference_count",
        "tgi_batch_inference_success",
        "tgi_batch_inference_failure",
        "tgi_batch_concat",
    ],
    "gauge": [
        "tgi_queue_size",
        "tgi_batch_current_size",
        "tgi_batch_current_max_tokens",
        "tgi_batch_max_total_tokens",
        "tgi_batch_size",
    ],
    "histogram": [
        "tgi_request_duration",
        "tgi_request_validation_duration",
        "tgi_request_queue_duration",
        "tgi_request_inference_duration",
        "tgi_request_mean_time_per_token_duration",
        "tgi_request_input_length",
        "tgi_request_max_new_tokens",
        "tgi_request_generated_tokens",
        "tgi_request_skipped_tokens",
        "tgi_batch_next_size",
        "tgi_batch_inference_duration",
        "tgi_batch_forward_duration",
        "tgi_batch_decode_duration",
        "tgi_batch_filter_duration",
        "tgi_batch_concat_duration",
        "tgi_request_duration_seconds",
    ],
}


def metrics() -> Metrics:
    return Metrics(max_input_tokens=1000, max_total_tokens=2048)


def lines(subject: Metrics) -> list[str]:
    return subject.render().decode().splitlines()


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in TGI.items() for name in names])
def test_tgis_metrics_are_there_from_the_start(kind: str, name: str) -> None:
    text = lines(metrics())
    assert f"# TYPE {name} {kind}" in text
    wanted = f"{name}_bucket" if kind == "histogram" else name
    assert any(re.match(rf"{wanted}(\{{.*\}})? 0$", line) for line in text)


def test_the_text_is_what_prometheus_reads() -> None:
    subject = metrics()
    subject.request_failure.inc(err="validation")
    subject.request_duration.observe(0.2)
    subject.kv_cache_usage.set(0.25)
    families = {family.name: family for family in text_string_to_metric_families(subject.render().decode())}
    assert set(families) == {f"tgi_{name}" for name in vars(subject)} == {f"tgi_{name}" for name in HELP}
    assert [s.value for s in families["tgi_kv_cache_usage"].samples] == [0.25]
    failures = {sample.labels["err"]: sample.value for sample in families["tgi_request_failure"].samples}
    assert failures["validation"] == 1


def test_labels() -> None:
    text = "\n".join(lines(metrics()))
    for sample in (
        'tgi_request_failure{err="overloaded"} 0',
        'tgi_batch_inference_count{method="prefill"} 0',
        'tgi_batch_forward_duration_bucket{method="decode",le="+Inf"} 0',
        'tgi_batch_forward_duration_sum{method="decode"} 0',
        'tgi_batch_concat{reason="backpressure"} 0',
    ):
        assert f"\n{sample}\n" in text


def test_buckets() -> None:
    assert len(DURATION_BUCKETS) == 35
    assert DURATION_BUCKETS[0] == pytest.approx(0.00015)
    assert DURATION_BUCKETS[-1] == pytest.approx(145.7, rel=1e-3)
    assert linear_buckets(2048)[:2] == (20.48, 40.96)
    assert linear_buckets(2048)[-1] == 2048
    text = "\n".join(lines(metrics()))
    assert 'tgi_request_input_length_bucket{le="1000"} 0' in text
    assert 'tgi_request_generated_tokens_bucket{le="20.48"} 0' in text
    assert 'tgi_batch_next_size_bucket{le="1024"} 0' in text


def test_a_histogram_counts_up_to_and_with_its_bounds() -> None:
    histogram = Histogram([1.0, 2.0])
    for value in (0.5, 1.0, 1.5, 2.0, 3.0):
        histogram.observe(value)
    assert list(histogram.samples("x")) == [
        'x_bucket{le="1"} 2',
        'x_bucket{le="2"} 4',
        'x_bucket{le="+Inf"} 5',
        "x_sum 8",
        "x_count 5",
    ]


def test_the_second_names_are_the_same_numbers() -> None:
    subject = metrics()
    subject.request_duration.observe(1.0)
    subject.batch_current_size.set(3)
    text = lines(subject)
    assert "tgi_request_duration_seconds_count 1" in text
    assert "tgi_batch_size 3" in text


def test_a_new_label_value_is_a_new_series() -> None:
    counter = Counter("err", ["a"])
    counter.inc(err="b")
    counter.inc(2, err="b")
    assert list(counter.samples("x")) == ['x{err="a"} 0', 'x{err="b"} 3']


def test_the_dashboards_queries_have_their_series() -> None:
    """Names in TGI's Grafana dashboard, from its panels."""
    names = {line.split("{")[0].split(" ")[0] for line in lines(metrics()) if not line.startswith("#")}
    for histogram in ("tgi_request_queue_duration", "tgi_request_skipped_tokens", "tgi_batch_filter_duration"):
        assert {f"{histogram}_bucket", f"{histogram}_sum", f"{histogram}_count"} <= names
    assert not any(name.endswith("_total") and name != "tgi_kv_cache_blocks_total" for name in names)
