"""Plots show the numbers of their tables."""

from __future__ import annotations

from collections import defaultdict

import numpy
import pytest

from monitor.report.plots import draw_figure, render_image
from monitor.report.table import TOTAL, ReportFigure
from monitor.report.writer import build_figures
from tests.unit.monitor.report.report_runs import (
    FOUR_REQUESTS,
    LINK_TRAFFIC,
    make_cpu_samples,
    make_repeats,
    make_request,
    make_run,
    select,
)


@pytest.fixture(scope="module", name="figures")
def _figures() -> dict[str, ReportFigure]:
    runs = [make_run("a", [*FOUR_REQUESTS, *LINK_TRAFFIC]), make_run("b", [*FOUR_REQUESTS[:2], *LINK_TRAFFIC])]
    return {figure.name: figure for figure in build_figures(runs)[0]}


@pytest.mark.parametrize("name", ["completion", "latency", "network", "network-cdf"])
def test_lines_go_through_the_points_of_the_table(figures: dict[str, ReportFigure], name: str) -> None:
    table = figures[name].table
    lines = draw_figure(figures[name], ["a", "b"]).axes[0].get_lines()
    plotted = [[tuple(point) for point in numpy.asarray(line.get_xydata()).tolist()] for line in lines]
    assert plotted == [select(table.where("run", run), *table.columns[1:3]) for run in ("a", "b")]


@pytest.mark.parametrize(("name", "value"), [("where", "ms"), ("link-bytes", "kb_per_sample")])
def test_parts_of_bars_follow_each_other(figures: dict[str, ReportFigure], name: str, value: str) -> None:
    table = figures[name].table
    parts = draw_figure(figures[name], ["a", "b"]).axes[0].patches
    widths = [part.get_width() for part in parts]  # type: ignore[attr-defined]
    assert widths == pytest.approx(table.where("part", TOTAL, differs=True).floats(value))
    ends: dict[float, float] = defaultdict(float)
    for part in parts:
        assert part.get_x() == pytest.approx(ends[part.get_y()])  # type: ignore[attr-defined]
        ends[part.get_y()] += part.get_width()  # type: ignore[attr-defined]
    assert len(ends) == len(table.distinct("run"))


def test_shared_time_axis_covers_the_longest_run() -> None:
    samples = make_cpu_samples((0.0, 10.0), (0.0, 10.0), "stage", "head-1")
    runs = [
        make_run(name, [make_request(1, 1.5, 500.0), make_request(2, end_s, 100.0), *samples])
        for name, end_s in (("long", 9.0), ("short", 3.0))
    ]
    (figure,) = [figure for figure in build_figures(runs)[0] if figure.name == "cpu"]
    for axes in draw_figure(figure, ["long", "short"]).axes:
        left, right = axes.get_xlim()
        assert left == 0
        assert right >= max(figure.table.floats("time_s")) == 7.75


def test_band_covers_the_range_of_the_repeats() -> None:
    completion = build_figures(make_repeats(a=1, b=5, c=2))[0][0]
    (band,) = draw_figure(completion, ["cloud"]).axes[0].collections
    edge = {tuple(point) for point in numpy.asarray(band.get_paths()[0].vertices).tolist()}
    assert {*select(completion.table, "low", "share"), *select(completion.table, "high", "share")} <= edge


def test_images_have_no_date() -> None:
    completion = build_figures(make_repeats(a=1, b=5))[0][0]
    first, second = (render_image(draw_figure(completion, ["cloud"]), "svg") for _ in range(2))
    assert first == second
