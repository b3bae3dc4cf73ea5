"""A report has the figures with data, and replaces an older report in its folder, and no other files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from brokers.errors import UsageError
from monitor.report.inputs import ReportInputs
from monitor.report.table import ReportFigure
from monitor.report.writer import FIGURE_NAMES, build_figures, write_report
from tests.unit.monitor.report.report_runs import (
    FOUR_REQUESTS,
    LINK_TRAFFIC,
    make_hop,
    make_point,
    make_request,
    make_run,
    make_steps,
)


@pytest.fixture(autouse=True)
def _fast_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images without rendering, which test_plots.py and tests/pipeline/monitor/test_report.py do."""
    monkeypatch.setattr("monitor.report.writer.draw_figure", lambda *_: None)
    monkeypatch.setattr("monitor.report.writer.render_image", lambda *_: b"<svg></svg>")


def write(folder: Path) -> dict[str, object]:
    return write_report(folder, ReportInputs([make_run("a", FOUR_REQUESTS)], ["b: no telemetry"]), lambda _: None)


def test_report_has_a_page_images_and_data(tmp_path: Path) -> None:
    result = write(tmp_path / "report")
    files = {str(path.relative_to(tmp_path / "report")) for path in (tmp_path / "report").rglob("*.*")}
    names = ("completion", "latency", "where")
    images = {f"figures/{name}.{kind}" for name in names for kind in ("svg", "pdf", "png")}
    tables = {f"data/{name}.csv" for name in (*names, "latency-percentiles", "summary")}
    assert files == {"index.html", *images, *tables}
    assert result["page"] == str(tmp_path / "report" / "index.html")
    assert result["figures"] == ["completion", "where", "latency"]
    assert result["skipped"] == ["b: no telemetry"]


def test_older_report_is_replaced(tmp_path: Path) -> None:
    write(tmp_path)
    old = tmp_path / "figures" / "sweep.pdf"
    old.touch()
    write(tmp_path)
    assert not old.exists()


def test_figure_that_cannot_be_plotted_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def draw(figure: ReportFigure, labels: Sequence[str]) -> None:
        if figure.name == "latency":
            raise RuntimeError("no such\nfont")

    monkeypatch.setattr("monitor.report.writer.draw_figure", draw)
    result = write(tmp_path)
    assert result["figures"] == ["completion", "where"]
    assert caplog.messages == ["figure 'Request latency' could not be plotted: RuntimeError: no such font"]
    assert "could not be plotted: RuntimeError: no such font" in (tmp_path / "index.html").read_text()
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"completion", "where"}


@pytest.mark.parametrize("files", [["mine.txt"], ["index.html", "figures/gpu.png"], ["figures/note.txt"]])
def test_folder_with_other_files_is_refused(tmp_path: Path, files: list[str]) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError) as caught:
        write(tmp_path)
    assert (caught.value.code, caught.value.fields["path"]) == ("BadFolder", str(tmp_path))
    assert all((tmp_path / name).read_text() == "mine" for name in files)


def test_report_with_an_added_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "data" / "note.txt").touch()
    with pytest.raises(UsageError):
        write(tmp_path)


def test_unwritable_folder_raises_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError) as caught:
        write(tmp_path / "file" / "report")
    assert caught.value.code == "BadFolder"


def test_figures_with_data_are_shown() -> None:
    figures, omitted = build_figures([make_run("a", [*FOUR_REQUESTS, *LINK_TRAFFIC])])
    assert [figure.name for figure in figures] == [
        "completion",
        "where",
        "latency",
        "network",
        "network-cdf",
        "link-bytes",
    ]
    assert {figure.name for figure in (*figures, *omitted)} <= set(FIGURE_NAMES)


def test_training_has_learning_curves() -> None:
    figures, omitted = build_figures([make_run("a", make_steps(4.0, 2.0))])
    assert {"learning-step", "learning-time"} <= {figure.name for figure in figures}
    assert {figure.name for figure in (*figures, *omitted)} == set(FIGURE_NAMES)


def test_omitted_figures_have_a_reason() -> None:
    missing = make_point("missing", 0, {"node": "pi", "sensor": "gpu"}, reason="no driver")
    _, omitted = build_figures([make_run("a", [*FOUR_REQUESTS, missing])])
    reasons = {figure.title: figure.missing_reason for figure in omitted}
    assert reasons["GPU use and power"] == reasons["Energy"] == "no power was measured: gpu: no driver"
    assert reasons["Traffic between sites"] == "there are no links: everything ran on one site"
    assert reasons["Throughput by batch"] == "no run is part of a sweep"
    assert reasons["Network rate"] == "the monitor sampled no links or interfaces"
    short = make_run("b", [make_request(1, 0.4, 200.0), *LINK_TRAFFIC])
    reasons = {figure.title: figure.missing_reason for figure in build_figures([short])[1]}
    assert reasons["Network rate"] == "the monitor's samples of links or interfaces cover no whole bin of 0.5 s"


def test_caption_lists_the_stages_in_order() -> None:
    other = make_run("b", [make_request(1, 1.5, 500.0), make_hop(1, "only", 0, (1.0, 1.0, 1.0, 1.0))])
    same = make_run("b", FOUR_REQUESTS)
    captions = [
        next(
            figure.caption for figure in build_figures([make_run("a", FOUR_REQUESTS), run])[0] if figure.name == "where"
        )
        for run in (same, other)
    ]
    assert captions[0].endswith("Stages in order: head, tail.")
    assert captions[1].endswith("Stages in order, for a: head, tail; for b: only.")
