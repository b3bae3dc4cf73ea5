"""Learning curves from events: repeated steps count once, long curves are thinned out."""

from __future__ import annotations

from collections.abc import Iterable

import numpy

from sources.training.history import MIN_CURVE_POINTS, Curve, CurvePoint, Rollback, TrainingHistory
from tests.support.training.training_events import EventDict, evaluation_event, rollback_event, run_events, step_event


def history_of(events: Iterable[EventDict]) -> TrainingHistory:
    history = TrainingHistory()
    for event in events:
        history.add(event)
    return history


def test_repeated_step_counts_once_as_it_was_done_last() -> None:
    history = history_of(
        [
            step_event(1),
            step_event(2, loss=7.0),
            evaluation_event(2),
            rollback_event(1, 2),
            step_event(2, loss=3.0),
            step_event(3),
        ]
    )
    points = history.train_curve.plot_points
    assert [point.step for point in points] == [1, 2, 3]
    assert points[1].loss == 3.0
    assert history.test_curve.plot_points == []
    assert list(history.rollbacks) == [Rollback(1, 2, "worker tail-1 is gone")]
    assert history.executed_steps == 4


def test_restart_at_an_earlier_step_is_a_rollback() -> None:
    history = history_of([step_event(1), step_event(2), step_event(3), step_event(2), step_event(3)])
    assert [point.step for point in history.train_curve.plot_points] == [1, 2, 3]
    assert list(history.rollbacks) == [Rollback(1, 3, "restarted")]


def test_rollbacks_do_not_change_the_curves() -> None:
    undisturbed = history_of(run_events())
    killed = history_of(run_events(rollbacks={17: 10, 33: 20}))
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
