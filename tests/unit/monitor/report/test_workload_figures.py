"""Completion, latency, time by stage, sweeps and learning curves equal values computed by hand from the points."""

from __future__ import annotations

import pytest

from monitor.report.workload_figures import completion, latency, learning, stage_time, sweep
from tests.unit.monitor.report.report_runs import (
    FOUR_REQUESTS,
    make_point,
    make_repeats,
    make_request,
    make_run,
    make_steps,
    select,
)


def test_completion_curve_has_each_result_at_its_time() -> None:
    table = completion([make_run("a", FOUR_REQUESTS)]).table
    expected = [("a", 0.0, 0.0), ("a", 0.5, 1 / 3), ("a", 1.0, 2 / 3), ("a", 2.0, 1.0)]
    assert select(table, "run", "time_s", "share") == expected


def test_completion_of_training_counts_rows() -> None:
    table = completion([make_run("a", make_steps(4.0, 2.0, 1.0))]).table
    assert select(table, "time_s", "share")[1:] == [(1.0, 1 / 3), (2.0, 2 / 3), (3.0, 1.0)]


def test_warm_up_is_not_measured() -> None:
    run = make_run("a", FOUR_REQUESTS, warm_up=1)  # the window starts at the end of the first request, 1.5
    assert select(completion([run]).table, "time_s", "share") == [(0.0, 0.0), (0.5, 0.5), (1.5, 1.0)]
    assert latency([run]).table.floats("latency_ms") == [800.0, 1400.0]


def test_completion_of_repeats_is_their_median_and_range() -> None:
    table = completion(make_repeats(a=1, b=5, c=2)).table
    assert table.distinct("run") == ["cloud"]
    assert table.rows[0] == ("cloud", 0.0, 0.0, 0.0, 0.0)
    assert table.rows[-1] == ("cloud", 2.0, 1.0, 1.0, 5.0)
    assert len(table.rows) == 101


def test_latency_distribution_is_of_successful_requests() -> None:
    table = latency([make_run("a", FOUR_REQUESTS)]).table
    assert select(table, "latency_ms", "share") == [(500.0, 1 / 3), (800.0, 2 / 3), (1400.0, 1.0)]


def test_percentiles_are_measured_values() -> None:
    table = latency([make_run("a", FOUR_REQUESTS)]).percentiles
    assert table is not None
    assert table.columns == ("run", "mean_ms", "p50_ms", "p95_ms", "p99_ms")
    assert table.rows == (("a", 900.0, 800.0, 1400.0, 1400.0),)


def test_request_time_is_the_mean_of_successful_requests() -> None:
    rows = select(stage_time([make_run("a", FOUR_REQUESTS)]).table, "stage", "part", "ms")
    expected = [
        *(("head", "queue", 70 / 3), ("head", "decode", 1.0), ("head", "compute", 20.0), ("head", "encode", 2.0)),
        *(("tail", "queue", 0.0), ("tail", "decode", 3.0), ("tail", "compute", 40.0), ("tail", "encode", 4.0)),
        *(("", "network", 300.0), ("", "total", 70 / 3 + 23 + 47 + 300)),
    ]
    assert [row[:2] for row in rows] == [row[:2] for row in expected]
    assert [row[2] for row in rows] == pytest.approx([row[2] for row in expected])


def test_step_time_is_busy_and_idle_time_of_the_workers() -> None:
    batches = [
        make_point("batch", 0.5 + step, {"stage": "head", "worker": "head-1", "phase": phase}, busy_ms=busy_ms)
        for step in range(2)
        for phase, busy_ms in (("forward", 200.0), ("backward", 300.0), ("update", 100.0))
    ]
    table = stage_time([make_run("a", [*make_steps(4.0, 2.0), *batches])]).table
    phases = [("forward", 200.0), ("backward", 300.0), ("update", 100.0), ("idle", 400.0), ("total", 1000.0)]
    assert select(table, "part", "ms") == phases
    assert table.distinct("stage") == ["a: head"]


def test_sweep_has_the_median_and_range_at_each_value() -> None:
    runs = [
        make_run(
            f"{value}-{number}",
            [make_request(1, 1.0 + duration_s, duration_s * 1000)],
            sweep_setting=("batch", value),
            sweep_name="cloud",
        )
        for value in (4.0, 1.0)
        for number, duration_s in enumerate((value / 8, value / 2, value))
    ]
    rows = select(sweep(runs).table, "value", "throughput_per_s", "low", "high", "repeats")
    assert rows == [(1.0, 2.0, 1.0, 8.0, 3), (4.0, 0.5, 0.25, 2.0, 3)]


def test_uncut_network_is_a_level_line_over_a_sweep() -> None:
    request = make_request(1, 3.0, 2000.0)
    cuts = [make_run(str(cut), [request], sweep_setting=("cut", cut), sweep_name="split") for cut in (4.0, 13.0)]
    uncut = make_run("a", [make_request(1, 3.0, 1000.0)], sweep_setting=("cut", None), group="uncut-at-device")
    assert select(sweep([*cuts, uncut]).table, "run", "value", "throughput_per_s") == [
        ("split", 4.0, 0.5),
        ("split", 13.0, 0.5),
        ("uncut-at-device", 4.0, 1.0),
        ("uncut-at-device", 13.0, 1.0),
    ]
    assert select(sweep([uncut]).table, "value") == [(0.0,)]


def test_learning_curve_is_over_steps_or_time() -> None:
    run = make_run("a", make_steps(4.0, 2.0, 1.0))
    by_step = learning([run], "step").table
    assert select(by_step.where("of", "loss"), "step", "value") == [(1.0, 4.0), (2.0, 2.0), (3.0, 1.0)]
    by_time = learning([run], "time_s").table
    assert select(by_time.where("of", "accuracy"), "time_s", "value") == [(1.0, 0.1), (2.0, 0.2), (3.0, 0.3)]


def test_learning_curve_of_repeats_is_their_median_by_step() -> None:
    runs = [make_run(name, make_steps(loss, loss / 2), group="x") for name, loss in (("a", 4.0), ("b", 2.0))]
    rows = select(learning(runs, "step").table.where("of", "loss"), "run", "step", "value", "low", "high")
    assert rows == [("x", 1.0, 3.0, 2.0, 4.0), ("x", 2.0, 1.5, 1.0, 2.0)]
    assert len(learning(runs, "time_s").table.where("of", "loss").rows) == 2  # of the first run
