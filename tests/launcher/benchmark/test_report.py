"""What is left when a benchmark is over: JSON, a picture, one line for an error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from text_generation_launcher.benchmark import report
from text_generation_launcher.benchmark.config import Flags
from text_generation_launcher.benchmark.plot import plot
from text_generation_launcher.benchmark.progress import Progress
from text_generation_launcher.benchmark.record import machine, record
from text_generation_launcher.benchmark.session import End, Session
from text_generation_launcher.benchmark.target import Surprises

MakeProgress = Callable[..., Progress]


def ending(monkeypatch: pytest.MonkeyPatch, end: End, progress: Progress | None, error: str = "") -> None:
    async def run(config: object, make_view: object) -> Session:
        return Session(end=end, progress=progress, surprises=Surprises(), error=error)

    monkeypatch.setattr(report, "run", run)


def test_the_record_can_be_read_back(make_progress: MakeProgress) -> None:
    progress = make_progress(2, batch_size=[1, 2], top_k=3)
    content = record(progress.config, progress.description, Surprises(), progress.measured, is_complete=True)
    back = json.loads(json.dumps(content, allow_nan=False))
    assert (back["schema"], back["is_complete"], back["parameters"]["top_k"]) == (1, True, 3)
    assert [batch["batch_size"] for batch in back["batches"]] == [1, 2]
    first = back["batches"][0]
    assert len(first["runs"]) == 10
    assert first["runs"][0]["prefill_s"] == [0.01]
    assert first["latency_s"]["Prefill"]["lowest"] == 0.01
    assert first["throughput"]["Decode"]["average"] == pytest.approx(3 / 0.009)
    assert {"text-generation-inference", "grpcio", "python"} <= set(back["versions"])


def test_the_machine_is_named(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name\t: A Fast One\n")
    assert machine(tmp_path / "cpuinfo")["cpu"] == "A Fast One"
    assert machine(tmp_path / "absent")["cpu"]


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_the_plot_is_a_picture_with_something_in_it(make_progress: MakeProgress, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"plot{suffix}"
    plot(make_progress(3, 1).measured, "title", path)
    assert path.stat().st_size > 5000
    if suffix == ".png":
        from matplotlib import image

        pixels = image.imread(path)
        assert pixels.shape[0] > 400
        assert len({tuple(pixel) for row in pixels[::7] for pixel in row[::7]}) > 10


def test_a_plot_of_a_prefill_alone(make_progress: MakeProgress, tmp_path: Path) -> None:
    results = make_progress(1, decode_length=1).measured
    for run in results[0].runs:
        object.__setattr__(run, "token_s", ())
    plot(results, "title", tmp_path / "plot.png")


def test_tables_go_to_standard_output(
    monkeypatch: pytest.MonkeyPatch, make_progress: MakeProgress, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ending(monkeypatch, End.COMPLETE, make_progress(1, batch_size=[1]))
    assert report.benchmark(Flags(batch_size=[1], json=str(tmp_path / "x.json"))) == 0
    out, err = capsys.readouterr()
    assert out.startswith("| Parameter")
    assert err == ""
    assert json.loads((tmp_path / "x.json").read_text())["is_complete"] is True


def test_json_may_take_their_place(
    monkeypatch: pytest.MonkeyPatch, make_progress: MakeProgress, capsys: pytest.CaptureFixture[str]
) -> None:
    ending(monkeypatch, End.INTERRUPTED, make_progress(1, 2, batch_size=[1, 2]))
    assert report.benchmark(Flags(batch_size=[1, 2], json="-")) == 130
    out, err = capsys.readouterr()
    assert json.loads(out)["is_complete"] is False
    assert err == "Stopped before the end.\n"


def test_an_error_comes_behind_the_tables_of_what_there_is(
    monkeypatch: pytest.MonkeyPatch, make_progress: MakeProgress, capsys: pytest.CaptureFixture[str]
) -> None:
    ending(monkeypatch, End.FAILED, make_progress(1, batch_size=[1, 2]), error="the shard is gone")
    assert report.benchmark(Flags(batch_size=[1, 2])) == 1
    out, err = capsys.readouterr()
    assert "Not complete: batch size 2 (nothing)" in out
    assert err == "Error: the shard is gone\n"


def test_nothing_measured_is_no_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ending(monkeypatch, End.FAILED, None, error="nobody there")
    assert report.benchmark(Flags()) == 1
    assert capsys.readouterr() == ("", "Error: nobody there\n")


def test_a_file_that_cannot_be_written_is_an_error_behind_the_tables(
    monkeypatch: pytest.MonkeyPatch, make_progress: MakeProgress, capsys: pytest.CaptureFixture[str]
) -> None:
    ending(monkeypatch, End.COMPLETE, make_progress(1, batch_size=[1]))
    assert report.benchmark(Flags(batch_size=[1], json="/dev/full")) == 1
    out, err = capsys.readouterr()
    assert out.startswith("| Parameter")
    assert "cannot write" in err
