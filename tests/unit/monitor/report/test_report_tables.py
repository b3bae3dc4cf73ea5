"""What the figures of a report show is what the raw records of a run say, counted by hand, point by point."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy
import pytest

from monitor.bench.manifest import Manifest
from monitor.points.points import FieldValue, TelemetryPoint
from monitor.report import resource_tables as report_load
from monitor.report import workload_tables as report_tables
from monitor.report.about import provenance_html
from monitor.report.figures import FIGURE_NAMES, build_figures
from monitor.report.plots import draw_figure
from monitor.report.run import ReportRun
from monitor.report.summary import ratio_to_baseline, summarize
from monitor.report.table import TOTAL, DataTable, downsample
from tests.support.monitor.synthetic_runs import make_manifest, time_ns_at


def point(name: str, second: float, *, tags: dict[str, str] | None = None, **fields: FieldValue) -> TelemetryPoint:
    return TelemetryPoint(name, time_ns_at(second), tags or {}, fields)


def run(name: str, points: Sequence[TelemetryPoint], **other: object) -> ReportRun:
    by_name: dict[str, list[TelemetryPoint]] = defaultdict(list)
    for each in points:
        by_name[each.measurement].append(each)
    return ReportRun(name, by_name, **other)  # type: ignore[arg-type]


def request(number: int, second: float, latency_ms: float, network_ms: float = 0.0, error: str = "") -> TelemetryPoint:
    fields: dict[str, FieldValue] = {"latency_ms": latency_ms, "network_ms": network_ms, "attempts": 1}
    return point("request", second, tags={"pipeline": "street"}, request=str(number), error=error, **fields)


def hop(
    number: int, second: float, stage: str, place: int, times_ms: tuple[float, float, float, float]
) -> TelemetryPoint:
    queue, decode, compute, encode = times_ms
    tags = {"stage": stage, "worker": f"{stage}-1"}
    return point(
        "hop", second, tags=tags, request=str(number), place=place,
        queue_ms=queue, decode_ms=decode, compute_ms=compute, encode_ms=encode,
    )  # fmt: skip


# Asked at 1.0, 1.2, 1.4, 1.6; the third fails. By hand: the first measured one was asked at 1.0.
FOUR = [
    request(1, 1.5, 500.0, 100.0),
    request(2, 2.0, 800.0, 300.0),
    request(3, 2.4, 1000.0, error="DeadlinePassed"),
    request(4, 3.0, 1400.0, 500.0),
    *(hop(number, 0.0, "head", 0, (10.0 * number, 1.0, 20.0, 2.0)) for number in (1, 2, 3, 4)),
    *(hop(number, 0.0, "tail", 1, (0.0, 3.0, 40.0, 4.0)) for number in (1, 2, 3, 4)),
]
OVER_LINK = [
    point("link", second, tags={"from": "device", "to": "cloud"}, bytes_out=out, bytes_in=back)
    for second, out, back in ((0.5, 0, 0), (1.0, 1_000_000, 0), (2.0, 3_000_000, 100_000), (3.0, 4_000_000, 100_000))
]


def rows(table: DataTable, *names: str) -> list[tuple[object, ...]]:
    return list(zip(*(table.column(name) for name in names), strict=True))


def test_a_completion_curve_has_each_result_at_its_time() -> None:
    found = rows(report_tables.completion_table([run("a", FOUR)]), "run", "time_s", "share")
    assert found == [("a", 0.0, 0.0), ("a", 0.5, 1 / 3), ("a", 1.0, 2 / 3), ("a", 2.0, 1.0)]


def test_a_warm_up_is_no_part_of_any_curve() -> None:
    # The first request is the warm-up: time begins at its end, 1.5.
    one = run("a", FOUR, warm_up=1)
    found = rows(report_tables.completion_table([one]), "time_s", "share")
    assert found == [(0.0, 0.0), (0.5, 0.5), (1.5, 1.0)]
    assert report_tables.latency_table([one]).floats("latency_ms") == [800.0, 1400.0]


def test_repeats_are_one_curve_of_medians_between_the_least_and_the_most() -> None:
    repeats = [
        run(name, [request(1, 1.0 + took, took * 1000)], group="cloud") for name, took in (("a", 1), ("b", 5), ("c", 2))
    ]
    table = report_tables.completion_table(repeats)
    assert table.distinct("run") == ["cloud"]
    assert table.rows[0] == ("cloud", 0.0, 0.0, 0.0, 0.0)
    assert table.rows[-1] == ("cloud", 2.0, 1.0, 1.0, 5.0)
    assert len(table.rows) == 101


def test_latencies_are_in_order_and_failures_are_none() -> None:
    found = rows(report_tables.latency_table([run("a", FOUR)]), "latency_ms", "share")
    assert found == [(500.0, 1 / 3), (800.0, 2 / 3), (1400.0, 1.0)]


def test_percentiles_are_those_of_the_benchmarks() -> None:
    found = report_tables.percentiles_table([run("a", FOUR)])
    assert found.columns == ("run", "mean_ms", "p50_ms", "p95_ms", "p99_ms")
    assert found.rows == (("a", 900.0, 800.0, 1400.0, 1400.0),)


def test_where_the_time_went_is_the_mean_of_each_part_of_the_requests_that_succeeded() -> None:
    found = rows(report_tables.request_time_table([run("a", FOUR)]), "stage", "part", "ms")
    assert found.pop() == ("", "total", pytest.approx(70 / 3 + 23 + 47 + 300))
    head = [("head", "queue", 70 / 3), ("head", "decode", 1.0), ("head", "compute", 20.0), ("head", "encode", 2.0)]
    tail = [("tail", "queue", 0.0), ("tail", "decode", 3.0), ("tail", "compute", 40.0), ("tail", "encode", 4.0)]
    assert [each[:2] for each in found] == [each[:2] for each in [*head, *tail, ("", "network", 300.0)]]
    assert [each[2] for each in found] == pytest.approx([each[2] for each in [*head, *tail, ("", "network", 300.0)]])


def test_the_network_rate_is_what_the_links_carried_in_each_bin() -> None:
    # From 1.0 to 3.0 in bins of half a second: 2 MB and 0.1 MB in the first second, 1 MB in the second.
    found = rows(report_load.network_rate_table([run("a", [*FOUR, *OVER_LINK])]), "time_s", "rate_mb_per_s")
    assert found == [
        (0.25, pytest.approx(2.1)),
        (0.75, pytest.approx(2.1)),
        (1.25, pytest.approx(1.0)),
        (1.75, pytest.approx(1.0)),
    ]
    shares = rows(report_load.network_distribution_table([run("a", [*FOUR, *OVER_LINK])]), "rate_mb_per_s", "share")
    assert [share for _, share in shares] == [0.25, 0.5, 0.75, 1.0]
    assert [rate for rate, _ in shares] == pytest.approx([1.0, 1.0, 2.1, 2.1])


def test_a_link_that_began_again_did_not_carry_less_than_nothing() -> None:
    again = [
        point("link", second, tags={"from": "a", "to": "b"}, bytes_out=out, bytes_in=0)
        for second, out in ((1.0, 5_000_000), (2.0, 1_000_000), (3.0, 2_000_000))
    ]
    found = report_load.network_rate_table([run("a", [*FOUR, *again])]).floats("rate_mb_per_s")
    assert found == pytest.approx([1.0, 1.0, 1.0, 1.0])


def test_without_links_the_interfaces_count_and_the_loopback_once() -> None:
    seen = [
        point("interface", second, tags={"interface": name}, sent_bytes=500_000, received_bytes=250_000)
        for second in (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
        for name in ("lo", "eth0")
    ]
    found = report_load.network_rate_table([run("a", [*FOUR, *seen])]).floats("rate_mb_per_s")
    assert found == pytest.approx([2 * (0.5 + 0.75)] * 4)


def test_bytes_between_sites_are_for_a_sample_and_by_direction() -> None:
    # A link carries nothing before the first request: 4 MB there and 0.1 MB back, for three results.
    found = rows(report_load.link_bytes_table([run("a", [*FOUR, *OVER_LINK])]), "part", "kb_per_sample")
    there, back = pytest.approx(4000 / 3), pytest.approx(100 / 3)
    assert found == [("device to cloud", there), ("cloud to device", back), ("total", pytest.approx(4100 / 3))]


def test_processors_are_the_growth_of_their_time_in_each_bin() -> None:
    seen = [
        point("process", second, tags={"role": role, "name": name}, cpu_s=cpu_s, pid=1)
        for second, cpu_s in ((0.0, 10.0), (2.0, 12.0), (4.0, 13.0))
        for role, name in (("stage", "head-1"), ("monitor", "monitor"))
    ]
    table = report_load.cpu_table([run("a", [*FOUR, *seen])])
    assert rows(table, "process", "time_s", "cores") == [
        ("head-1", 0.25, 1.0), ("head-1", 0.75, 1.0), ("head-1", 1.25, 0.5), ("head-1", 1.75, 0.5)
    ]  # fmt: skip
    # From 11.0 s at 1.0 to 12.5 s at 3.0, for three results; the monitor is not what is measured.
    cost = report_load.cpu_seconds_table([run("a", [*FOUR, *seen])])
    assert rows(cost, "part", "s_per_sample") == [("stage", pytest.approx(0.5)), ("total", pytest.approx(0.5))]


def test_every_bar_has_its_parts_in_one_order_and_its_spread_on_the_whole_alone() -> None:
    def of(name: str, **cpu_s: float) -> ReportRun:
        seen = [
            point("process", second, tags={"role": role, "name": role}, cpu_s=second * each, pid=1)
            for second in (0.0, 4.0)
            for role, each in cpu_s.items()
        ]
        return run(name, [*FOUR, *seen], group=name[0])

    runs = [of("a1", broker=3.0, monitor=9.0, stage=3.0), of("a2", other=3.0, run=3.0, stage=9.0), of("b", source=3.0)]
    found = rows(report_load.cpu_seconds_table(runs), "run", "part", "s_per_sample", "low", "high")
    assert found == [
        *(("a", part, pytest.approx(each), None, None)
          for part, each in (("stage", 4.0), ("run", 1.0), ("broker", 1.0), ("other", 1.0))),
        ("a", "total", pytest.approx(7.0), pytest.approx(4.0), pytest.approx(10.0)),
        ("b", "source", pytest.approx(2.0), None, None),
        ("b", "total", pytest.approx(2.0), None, None),
    ]  # fmt: skip
    assert summarize(runs[:2])[1][0].values["processors"].median == pytest.approx(7.0)  # type: ignore[union-attr]
    figures, _ = build_figures(runs)
    assert {figure.name for figure in figures} <= set(FIGURE_NAMES)


def test_a_run_shorter_than_a_bin_has_one_network_rate() -> None:
    # One request, asked at 1.0 and done at 1.2: a tenth of what crosses from 1.0 to 3.0 would, had it been even.
    short = run("a", [request(1, 1.2, 200.0), *OVER_LINK])
    assert rows(report_load.network_rate_table([short]), "time_s", "rate_mb_per_s") == [(0.25, pytest.approx(2.1))]
    unseen = run("b", [request(1, 0.4, 200.0), *OVER_LINK])
    reasons = {each.title: each.reason for each in build_figures([unseen])[1]}
    assert reasons["Network rate"].startswith("no monitor saw links or interfaces from the beginning to the end of any")


def test_the_stages_are_listed_in_order_where_bars_are_too_short_for_their_names() -> None:
    fast = [request(1, 1.5, 500.0), hop(1, 0.0, "only", 0, (1.0, 1.0, 1.0, 1.0))]
    captions = [
        next(figure.caption for figure in build_figures(runs)[0] if figure.name == "where")
        for runs in ([run("a", FOUR), run("b", FOUR)], [run("a", FOUR), run("b", fast)])
    ]
    assert captions[0].endswith("Stages, in order: head, tail.")
    assert captions[1].endswith("Stages, in order, of a: head, tail; of b: only.")


def test_what_was_taken_out_of_a_file_and_numbers_that_equal_yes_and_no_are_told_as_they_are() -> None:
    told = make_manifest({"cloud": []})
    told["suites"][0]["changed"] = {"pipeline.cuts": None, "source.limit": 1, "source.loop": True}
    page = provenance_html([run("a", FOUR, manifest=Manifest.model_validate(told))])
    assert "pipeline.cuts left out, source.limit 1, source.loop yes" in page
    assert "memory 7.5 GiB" in page
    assert "dirty no" in page


def test_energy_is_that_of_the_measured_time_alone() -> None:
    seen = [
        point("gpu", second, tags={"gpu": "0"}, use=second / 10, power_w=20.0, energy_j=20.0)
        for second in (0.0, 1.0, 2.0, 3.0, 4.0)
    ]
    table = report_load.energy_table([run("a", [*FOUR, *seen])])
    assert rows(table, "part", "j_per_sample") == [("gpu 0", pytest.approx(40 / 3)), ("total", pytest.approx(40 / 3))]
    use = report_load.gpu_table([run("a", [*FOUR, *seen])])
    assert rows(use.where("of", "GPU use (share)"), "time_s", "value") == [(0.25, 0.1), (1.25, 0.2)]


def steps(*losses: float) -> list[TelemetryPoint]:
    """One a second, of 32 rows."""
    return [
        point("step", float(number), step=number, rows=32, step_ms=1000.0, loss=loss, accuracy=number / 10)
        for number, loss in enumerate(losses, start=1)
    ]


def test_training_is_shown_by_rows_by_step_and_by_time() -> None:
    one = run("a", steps(4.0, 2.0, 1.0))
    assert rows(report_tables.completion_table([one]), "time_s", "share")[1:] == [
        (1.0, 1 / 3),
        (2.0, 2 / 3),
        (3.0, 1.0),
    ]
    by_step = report_tables.learning_table([one], "step")
    assert rows(by_step.where("of", "loss"), "step", "value") == [(1.0, 4.0), (2.0, 2.0), (3.0, 1.0)]
    by_time = report_tables.learning_table([one], "time_s")
    assert rows(by_time.where("of", "accuracy"), "time_s", "value") == [(1.0, 0.1), (2.0, 0.2), (3.0, 0.3)]


def test_a_step_of_training_is_what_its_workers_computed_and_waited() -> None:
    batches = [
        point("batch", 0.5 + number, tags={"stage": "head", "worker": "head-1", "phase": phase}, busy_ms=busy_ms)
        for number in range(2)
        for phase, busy_ms in (("forward", 200.0), ("backward", 300.0), ("update", 100.0))
    ]
    table = report_tables.step_time_table([run("a", [*steps(4.0, 2.0), *batches])])
    parts = [("forward", 200.0), ("backward", 300.0), ("update", 100.0), ("idle", 400.0)]
    assert rows(table, "part", "ms") == [*parts, ("total", 1000.0)]


def test_a_sweep_has_the_median_of_its_repeats_at_each_value() -> None:
    runs = [
        run(f"{value}-{number}", [request(1, 1.0 + took, took * 1000)], setting=("batch", value), sweep="cloud")
        for value in (4.0, 1.0)
        for number, took in enumerate((value / 8, value / 2, value))
    ]
    table = report_tables.sweep_table(runs)
    assert rows(table, "value", "throughput_per_s", "low", "high", "repeats") == [
        (1.0, 2.0, 1.0, 8.0, 3), (4.0, 0.5, 0.25, 2.0, 3)
    ]  # fmt: skip


def test_a_point_beside_a_sweep_is_level_over_it() -> None:
    cut = [run(str(value), [request(1, 3.0, 2000.0)], setting=("cut", value), sweep="split") for value in (4.0, 13.0)]
    uncut = run("a", [request(1, 3.0, 1000.0)], setting=("cut", None), group="uncut-at-device")
    table = report_tables.sweep_table([*cut, uncut])
    assert rows(table, "run", "value", "throughput_per_s") == [
        ("split", 4.0, 0.5), ("split", 13.0, 0.5), ("uncut-at-device", 4.0, 1.0), ("uncut-at-device", 13.0, 1.0)
    ]  # fmt: skip


def test_what_is_drawn_are_the_numbers_of_the_table() -> None:
    runs = [run("a", [*FOUR, *OVER_LINK]), run("b", [*FOUR[:2], *OVER_LINK])]
    figures, _ = build_figures(runs)
    for figure in figures:
        axes = draw_figure(figure, ["a", "b"]).axes[0]
        if figure.name in ("completion", "latency", "network", "network-cdf"):
            x, y = figure.table.columns[1:3]
            drawn = [[tuple(place) for place in line.get_xydata().tolist()] for line in axes.get_lines()]  # type: ignore[union-attr]
            assert drawn == [rows(figure.table.where("run", name), x, y) for name in ("a", "b")], figure.name
        else:
            drawn_widths = [bar.get_width() for bar in axes.patches]  # type: ignore[attr-defined]
            value = next(name for name in figure.table.columns if name in ("ms", "kb_per_sample"))
            assert drawn_widths == pytest.approx(figure.table.where_not("part", TOTAL).floats(value)), figure.name
            begins: dict[float, float] = defaultdict(float)  # by bar: where its next part begins
            for bar in axes.patches:
                assert bar.get_x() == pytest.approx(begins[bar.get_y()])  # type: ignore[attr-defined]
                begins[bar.get_y()] += bar.get_width()  # type: ignore[attr-defined]
            assert len(begins) == len(figure.table.distinct("run"))
    assert {figure.name for figure in figures} == {
        "completion", "where", "latency", "network", "network-cdf", "link-bytes"
    }  # fmt: skip


def test_panels_with_one_time_axis_show_the_longest_run_whole() -> None:
    runs = []
    for name, seconds in (("long", 9.0), ("short", 3.0)):
        seen = [
            point("process", second, tags={"role": "stage", "name": "head-1"}, cpu_s=second) for second in (0.0, 10.0)
        ]
        runs.append(run(name, [request(1, 1.5, 500.0), request(2, seconds, 100.0), *seen]))
    (figure,) = [figure for figure in build_figures(runs)[0] if figure.name == "cpu"]
    for axes in draw_figure(figure, ["long", "short"]).axes:
        begin, end = axes.get_xlim()
        assert begin == 0
        assert end >= max(figure.table.floats("time_s")) == 7.75


def test_the_band_around_a_line_reaches_from_the_least_to_the_most() -> None:
    repeats = [
        run(name, [request(1, 1.0 + took, took * 1000)], group="x") for name, took in (("a", 1), ("b", 5), ("c", 2))
    ]
    completion = build_figures(repeats)[0][0]
    (band,) = draw_figure(completion, ["x"]).axes[0].collections
    edge = {tuple(place) for place in numpy.asarray(band.get_paths()[0].vertices).tolist()}
    low, high = completion.table.floats("low"), completion.table.floats("high")
    shares = completion.table.floats("share")
    assert {*zip(low, shares, strict=True), *zip(high, shares, strict=True)} <= edge


def test_a_figure_that_no_run_has_numbers_for_is_left_out_with_the_reason() -> None:
    told = [
        TelemetryPoint("missing", time_ns_at(0), {"node": "pi", "sensor": "gpu"}, {"reason": "NVML is not there"}),
    ]
    _, absent = build_figures([run("a", [*FOUR, *told])])
    reasons = {each.title: each.reason for each in absent}
    assert "pi: NVML is not there" in reasons["GPU use and power"]
    assert reasons["Bytes between sites"] == "all of it was on one site: there are no links"
    assert reasons["Throughput by batch"] == "none of the runs is part of a sweep"


def test_each_row_of_the_summary_is_held_against_the_first() -> None:
    _, found = summarize([run("a", FOUR), run("b", FOUR[:1])])
    assert [row.label for row in found] == ["a", "b"]
    assert found[0].values["throughput"] is not None
    assert found[0].values["throughput"].median == 1.5  # three results in two seconds
    assert ratio_to_baseline(found[1], found[0], "throughput") == pytest.approx(
        2.0 / 1.5
    )  # one result in half a second
    assert ratio_to_baseline(found[1], found[0], "failed") == 0.0
    assert ratio_to_baseline(found[0], found[1], "failed") is None


def test_thinned_rows_keep_both_ends() -> None:
    found = downsample([(number,) for number in range(5001)], 2000)
    assert (len(found), found[0], found[-1]) == (2000, (0,), (5000,))
    assert found == sorted(set(found))


def test_a_csv_file_has_the_very_numbers() -> None:
    table = report_tables.completion_table([run('a, "b"', FOUR)])
    assert table.to_csv().splitlines()[:3] == [
        "run,time_s,share,low,high",
        '"a, ""b""",0.0,0.0,,',
        f'"a, ""b""",0.5,{1 / 3},,',
    ]
