"""What a run of training looks like from outside: what its source publishes, and whatever else anybody does."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest

from monitor.presence.training_stats import SOURCES_LIMIT, DownsampledSeries, TrainingProgress, TrainingStats
from tests.support.training.training_events import (
    EventDict,
    evaluation_event,
    failure_event,
    rollback_event,
    run_events,
    step_event,
)


def training_stats_of(events: Iterable[EventDict], every_s: float = 0.5) -> TrainingStats:
    board = TrainingStats("digits")
    for number, event in enumerate(events):
        board.on_result(json.dumps(event).encode(), every_s * number)
    return board


def course_of(events: Iterable[EventDict], every_s: float = 0.5) -> TrainingProgress:
    course = training_stats_of(events, every_s).progress_of("digits")
    assert course is not None
    return course


def test_nothing_is_known_before_the_first_event() -> None:
    board = TrainingStats("digits")
    assert (board.progress_of("digits"), board.results_received, board.pop_notices()) == (None, 0, [])


def test_loss_and_accuracy_are_those_of_the_last_steps() -> None:
    course = course_of(step_event(number, loss=9.0 if number <= 10 else 2.0) for number in range(1, 31))
    assert course.loss == 2.0
    assert course.accuracy == pytest.approx(sum(step_event(number)["accuracy"] for number in range(15, 31)) / 16)
    assert course_of([step_event(1, accuracy=None)]).accuracy is None


def test_the_rate_is_of_steps_and_not_of_what_is_between_them() -> None:
    course = course_of([step_event(number) for number in range(1, 31)], every_s=1.0)
    assert course.rows_per_s(30.0) == 320.0  # 64 rows in 200 ms
    assert course.rows_per_s(1000.0) == 320.0
    assert course_of([step_event(1, step_ms=0.0)]).rows_per_s(0.0) == 0.0


def test_the_time_left_is_judged_by_how_steps_have_come_so_far() -> None:
    course = course_of([step_event(number) for number in range(1, 31)])
    assert course.remaining_s(14.5) == pytest.approx(5.0)
    assert course.remaining_s(15.0) == pytest.approx(4.5)
    assert course.remaining_s(1000.0) == 0.0
    assert course_of([step_event(1)]).remaining_s(0.0) is None
    assert course_of(run_events()).remaining_s(30.0) == 0.0


def test_a_step_that_does_not_come_is_overdue() -> None:
    course = course_of([step_event(number) for number in range(1, 31)])
    assert course.stalled_s(19.0) == 0.0
    assert course.stalled_s(20.5) == 6.0
    assert course_of(run_events()).stalled_s(1000.0) == 0.0  # it is done


def test_a_recovery_is_news_once_and_takes_progress_back() -> None:
    board = training_stats_of([step_event(7), rollback_event(0, 7, "worker body-1 is gone")])
    course = board.progress_of("digits")
    assert course is not None
    assert (course.completed_steps, course.rollbacks) == (0, 1)
    assert board.pop_notices() == ["worker body-1 is gone: back to step 0 (7 steps again)"]
    assert board.pop_notices() == []


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (rollback_event(40, 41), "worker tail-1 is gone: back to step 40 (1 step again)"),
        (rollback_event(40, 40), "worker tail-1 is gone: goes on from step 40"),
        (rollback_event(1, 3, ""), "something was lost: back to step 1 (2 steps again)"),
        (rollback_event(1, 3, "\x1b[2J\n"), "?[2J?: back to step 1 (2 steps again)"),
    ],
)
def test_a_recovery_is_told_in_one_harmless_line(event: EventDict, text: str) -> None:
    assert training_stats_of([event]).pop_notices() == [text]


def test_evaluations_that_are_undone_are_not_shown_and_the_best_is_known() -> None:
    course = course_of([evaluation_event(10, 0.7), evaluation_event(20, 0.9), evaluation_event(30, 0.8)])
    assert [each.accuracy for each in course.evaluations] == [0.7, 0.9, 0.8]
    assert course.best_evaluation is course.evaluations[1]
    again = course_of(
        [evaluation_event(10, 0.7), evaluation_event(20, 0.9), rollback_event(15, 22), evaluation_event(20, 0.9)]
    )
    assert [each.step for each in again.evaluations] == [10, 20]
    assert again.best_evaluation is again.evaluations[1]


def test_a_failure_is_known_until_training_goes_on() -> None:
    course = course_of([step_event(1), failure_event()])
    assert course.failure is not None
    assert (course.failure.error, course.failure.stage) == ("NotFinite", "tail")
    assert course_of([step_event(1), failure_event(), step_event(2)]).failure is None


def test_sources_that_train_one_pipeline_have_a_course_each_and_bounds() -> None:
    board = training_stats_of(
        [step_event(3), {**step_event(9), "source": "more"}, {**rollback_event(8, 9), "source": "more"}]
    )
    assert [(name, course.completed_steps) for name, course in board.progress_by_source.items()] == [
        ("digits", 3),
        ("more", 8),
    ]
    assert board.progress_of("more") is board.progress_by_source["more"]
    assert board.progress_of("unknown") is board.progress_by_source["digits"]
    assert board.pop_notices() == ["more: worker tail-1 is gone: back to step 8 (1 step again)"]
    for number in range(2 * SOURCES_LIMIT):
        board.on_result(json.dumps({**step_event(1), "source": f"s{number}"}).encode(), 9.0)
    assert len(board.progress_by_source) == SOURCES_LIMIT


def test_events_of_another_pipeline_do_not_count() -> None:
    board = training_stats_of([{**step_event(3), "pipeline": "other"}, {"pipeline": "street", "objects": []}])
    assert (board.progress_by_source, board.results_received, board.rejected) == ({}, 0, 0)


@pytest.mark.parametrize(
    "garbage",
    [
        *(b"", b"?", b"null", b"[1]", b"\xff", b"{}", b'{"event": "step"}', b"[" * 100_000, b'{"event": "new"}'),
        *(
            json.dumps({**step_event(1), **wrong}).encode()
            for wrong in (
                {"step": -1},
                {"step": "1"},
                {"steps": 1 << 60},
                {"loss": None},
                {"loss": float("nan")},
                {"loss": 1e300},
                {"step_ms": float("inf")},
                {"source": "s" * 5000},
                {"source": 7},
                {"padding": "x" * 70_000},
            )
        ),
    ],
)
def test_what_anybody_else_publishes_is_counted_and_does_no_harm(garbage: bytes) -> None:
    board = training_stats_of([step_event(1)])
    board.on_result(garbage, 1.0)
    assert (board.rejected, board.results_received) == (1, 1)


def test_a_trend_has_the_whole_course_in_bounded_memory() -> None:
    trend = DownsampledSeries()
    for number in range(1, 10_001):
        trend.add(number, float(number))
    values: list[Any] = trend.values(20)
    assert len(values) <= 20
    assert values == sorted(values)
    assert (values[0] < 600, values[-1] > 9400) == (True, True)
    assert len(trend._stretches) <= 128


def test_a_trend_forgets_what_was_undone_and_may_begin_anywhere() -> None:
    trend = DownsampledSeries()
    assert trend.values(10) == []
    for number, value in ((1, 5.0), (2, 4.0), (3, 99.0), (2, 4.0)):
        trend.add(number, value)
    assert trend.values(10) == [5.0, 4.0]
    late = DownsampledSeries()
    late.add(1 << 52, 1.0)
    assert late.values(10) == [1.0]
