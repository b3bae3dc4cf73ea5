"""The figures of a report: which ones it has, their captions, and the reasons for omitted ones."""

from __future__ import annotations

from monitor.report.figures import FIGURE_NAMES, build_figures
from tests.unit.monitor.report.report_runs import (
    FOUR_REQUESTS,
    LINK_TRAFFIC,
    make_hop,
    make_point,
    make_request,
    make_run,
    make_steps,
)


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
    assert reasons["GPU use and power"] == reasons["Energy"] == "no power sensor could be read (pi: no driver)"
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
