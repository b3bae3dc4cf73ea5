"""Statistics and learning curves of a training run, from its events."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy
import pytest

from sources.training.run_stats import MIN_CURVE_POINTS, Curve, CurvePoint, Rollback, TrainingRunStats
from tests.support.training.training_events import (
    EventDict,
    evaluation_event,
    failure_event,
    rollback_event,
    run_events,
    stage_times,
    step_event,
)


def stats_of(events: Iterable[EventDict]) -> TrainingRunStats:
    stats = TrainingRunStats("digits")
    for event in events:
        stats.add(event)
    return stats


def test_summary_of_a_run() -> None:
    summary = stats_of(run_events()).summary(["head", "tail"], elapsed_s=9.1234)
    assert {key: summary[key] for key in summary if key not in ("stages", "loss", "accuracy")} == {
        "pipeline": "digits", "requests": 160, "results": 160, "failed": 0, "failures": {}, "lost": 0, "dropped": 0,
        "retries": 0, "elapsed_s": 9.123, "throughput_per_s": 320.0, "rows": 2560, "steps": 40, "epochs": 4,
        "test_loss": 0.5, "test_accuracy": 0.8, "best_test_accuracy": 0.8, "rollbacks": 0, "repeated_steps": 0,
        "step_ms": {"p50": 200.0, "p95": 200.0, "p99": 200.0}, "idle_ms": 9.0,
    }  # fmt: skip
    last_epoch = [step_event(number) for number in range(31, 41)]
    assert summary["loss"] == pytest.approx(sum(event["loss"] for event in last_epoch) / 10, abs=1e-6)
    assert summary["accuracy"] == pytest.approx(sum(event["accuracy"] for event in last_epoch) / 10, abs=1e-6)


def test_stage_times_are_means_of_a_micro_batch() -> None:
    events = list(run_events())
    events[-2]["time"]["stages"] = [stage_times("tail", "tail-2")]
    stages = stats_of(events).summary(["head", "tail"])["stages"]
    assert list(stages) == ["head", "tail"]
    assert stages["tail"] == {
        "workers": 2, "tasks": 160, "queue_ms": 1.0, "decode_ms": 0.5, "compute_ms": 6.0, "encode_ms": 0.25,
        "forward_ms": 2.0, "backward_ms": 3.0, "bytes_in": 40_000, "bytes_out": 80_000,
    }  # fmt: skip
    assert (stages["head"]["workers"], stages["head"]["tasks"]) == (1, 156)


def test_step_times_have_nearest_rank_percentiles() -> None:
    times_ms = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 90.0, 100.0]
    stats = stats_of(step_event(number, step_ms=time_ms) for number, time_ms in enumerate(times_ms, start=1))
    expected = numpy.percentile(times_ms, [50, 95, 99], method="inverted_cdf")
    assert stats.summary()["step_ms"] == dict(zip(("p50", "p95", "p99"), expected, strict=True))


def test_repeated_steps_count_in_requests_and_not_in_losses() -> None:
    undisturbed = stats_of(run_events()).summary()
    killed = stats_of(run_events(rollbacks={17: 10, 30: 30, 40: 20})).summary()
    for key in ("loss", "accuracy", "test_accuracy", "steps", "epochs", "rows"):
        assert killed[key] == undisturbed[key]
    assert (killed["rollbacks"], killed["repeated_steps"], killed["retries"]) == (3, 27, 108)
    assert (undisturbed["requests"], killed["requests"], killed["lost"]) == (160, 268, 0)


def test_restarted_source_repeats_steps_without_a_rollback() -> None:
    events = [*(step_event(number) for number in range(1, 18)), *(step_event(number) for number in range(11, 41))]
    summary = stats_of(events).summary()
    assert (summary["steps"], summary["repeated_steps"], summary["rollbacks"]) == (40, 7, 0)


def test_loss_of_an_epoch_leaves_out_undone_steps() -> None:
    stats = stats_of([step_event(1, loss=4.0), step_event(2, loss=9.0), rollback_event(1, 2), step_event(2, loss=2.0)])
    assert stats.summary()["loss"] == 3.0


def test_throughput_leaves_out_the_first_step_unless_it_is_the_only_one() -> None:
    first = step_event(1, step_ms=6400.0)
    assert stats_of([first]).summary()["throughput_per_s"] == 10.0
    assert stats_of([first, step_event(2), step_event(3)]).summary()["throughput_per_s"] == 320.0


def test_loss_without_accuracy_has_no_accuracy() -> None:
    summary = stats_of([step_event(1, accuracy=None), evaluation_event(1, None)]).summary()
    assert (summary["accuracy"], summary["test_accuracy"], summary["best_test_accuracy"]) == (None, None, None)
    assert summary["test_loss"] == 0.5


def test_best_accuracy_is_kept_when_later_ones_are_worse() -> None:
    summary = stats_of([evaluation_event(1, 0.7), evaluation_event(2, 0.9), evaluation_event(3, 0.8)]).summary()
    assert (summary["test_accuracy"], summary["best_test_accuracy"]) == (0.8, 0.9)


def test_summary_of_an_empty_run() -> None:
    summary = TrainingRunStats("digits").summary()
    expected: dict[str, Any] = {
        "loss": None, "test_loss": None, "steps": 0, "throughput_per_s": 0.0, "step_ms": {}, "stages": {},
    }  # fmt: skip
    assert {key: summary[key] for key in expected} == expected


def test_failures_are_counted_and_unknown_events_ignored() -> None:
    summary = stats_of([step_event(1), failure_event(), {"event": "new"}, {}]).summary()
    assert (summary["failed"], summary["failures"], summary["steps"]) == (1, {"NotFinite": 1}, 1)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sources.training.run_stats._RECENT_STEPS", 10)
    stats = stats_of(step_event(number) for number in range(1, 21))
    assert len(stats._steps) == 10
    assert stats.summary()["steps"] == 20


# Curves: repeated steps count once, long curves are thinned out.


def test_repeated_step_counts_once_as_it_was_done_last() -> None:
    stats = stats_of(
        [
            step_event(1),
            step_event(2, loss=7.0),
            evaluation_event(2),
            rollback_event(1, 2),
            step_event(2, loss=3.0),
            step_event(3),
        ]
    )
    points = stats.train_curve.plot_points
    assert [point.step for point in points] == [1, 2, 3]
    assert points[1].loss == 3.0
    assert stats.test_curve.plot_points == []
    assert list(stats.rollbacks) == [Rollback(1, 2, "worker tail-1 is gone")]
    assert stats.executed_steps == 4


def test_restart_at_an_earlier_step_is_a_rollback() -> None:
    stats = stats_of([step_event(1), step_event(2), step_event(3), step_event(2), step_event(3)])
    assert [point.step for point in stats.train_curve.plot_points] == [1, 2, 3]
    assert list(stats.rollbacks) == [Rollback(1, 3, "restarted")]


def test_rollbacks_do_not_change_the_curves() -> None:
    undisturbed = stats_of(run_events())
    killed = stats_of(run_events(rollbacks={17: 10, 33: 20}))
    assert killed.train_curve.plot_points == undisturbed.train_curve.plot_points
    assert killed.test_curve.plot_points == undisturbed.test_curve.plot_points


def test_long_curve_is_thinned_out_evenly_and_keeps_its_end() -> None:
    curve = Curve()
    for step in range(1, 50_001):
        curve.add(CurvePoint(step, 0.5, None))
    steps = numpy.array([point.step for point in curve.plot_points])
    assert MIN_CURVE_POINTS <= len(steps) <= 2 * MIN_CURVE_POINTS + 1
    assert (steps[0], steps[-1]) == (1, 50_000)
    assert set(numpy.diff(steps)[:-1]) == {16}
