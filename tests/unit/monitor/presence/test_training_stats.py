"""What a run of training looks like from outside: what its source publishes, and whatever else anybody does."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest

from monitor.presence.training_stats import COURSES_LIMIT, Course, TrainingBoard, Trend
from tests.support.training.training_events import Event, evaluation, failed, rolled_back, step, whole_run


def board_of(events: Iterable[Event], every_s: float = 0.5) -> TrainingBoard:
    board = TrainingBoard("digits")
    for number, event in enumerate(events):
        board.heard_result(json.dumps(event).encode(), every_s * number)
    return board


def course_of(events: Iterable[Event], every_s: float = 0.5) -> Course:
    course = board_of(events, every_s).main("digits")
    assert course is not None
    return course


def test_nothing_is_known_before_the_first_event() -> None:
    board = TrainingBoard("digits")
    assert (board.main("digits"), board.heard, board.news()) == (None, 0, [])


def test_loss_and_accuracy_are_those_of_the_last_steps() -> None:
    course = course_of(step(number, loss=9.0 if number <= 10 else 2.0) for number in range(1, 31))
    assert course.loss == 2.0
    assert course.accuracy == pytest.approx(sum(step(number)["accuracy"] for number in range(15, 31)) / 16)
    assert course_of([step(1, accuracy=None)]).accuracy is None


def test_the_rate_is_of_steps_and_not_of_what_is_between_them() -> None:
    course = course_of([step(number) for number in range(1, 31)], every_s=1.0)
    assert course.rows_per_s(30.0) == 320.0  # 64 rows in 200 ms
    assert course.rows_per_s(1000.0) == 320.0
    assert course_of([step(1, step_ms=0.0)]).rows_per_s(0.0) == 0.0


def test_the_time_left_is_judged_by_how_steps_have_come_so_far() -> None:
    course = course_of([step(number) for number in range(1, 31)])
    assert course.left_s(14.5) == pytest.approx(5.0)
    assert course.left_s(15.0) == pytest.approx(4.5)
    assert course.left_s(1000.0) == 0.0
    assert course_of([step(1)]).left_s(0.0) is None
    assert course_of(whole_run()).left_s(30.0) == 0.0


def test_a_step_that_does_not_come_is_overdue() -> None:
    course = course_of([step(number) for number in range(1, 31)])
    assert course.stalled_s(19.0) == 0.0
    assert course.stalled_s(20.5) == 6.0
    assert course_of(whole_run()).stalled_s(1000.0) == 0.0  # it is done


def test_a_recovery_is_news_once_and_takes_progress_back() -> None:
    board = board_of([step(7), rolled_back(0, 7, "worker body-1 is gone")])
    course = board.main("digits")
    assert course is not None
    assert (course.done, course.rolled_back) == (0, 1)
    assert board.news() == ["worker body-1 is gone: back to step 0 (7 steps again)"]
    assert board.news() == []


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (rolled_back(40, 41), "worker tail-1 is gone: back to step 40 (1 step again)"),
        (rolled_back(40, 40), "worker tail-1 is gone: goes on from step 40"),
        (rolled_back(1, 3, ""), "something was lost: back to step 1 (2 steps again)"),
        (rolled_back(1, 3, "\x1b[2J\n"), "?[2J?: back to step 1 (2 steps again)"),
    ],
)
def test_a_recovery_is_told_in_one_harmless_line(event: Event, text: str) -> None:
    assert board_of([event]).news() == [text]


def test_evaluations_that_are_undone_are_not_shown_and_the_best_is_known() -> None:
    course = course_of([evaluation(10, 0.7), evaluation(20, 0.9), evaluation(30, 0.8)])
    assert [each.accuracy for each in course.evaluations] == [0.7, 0.9, 0.8]
    assert course.best is course.evaluations[1]
    again = course_of([evaluation(10, 0.7), evaluation(20, 0.9), rolled_back(15, 22), evaluation(20, 0.9)])
    assert [each.step for each in again.evaluations] == [10, 20]
    assert again.best is again.evaluations[1]


def test_a_failure_is_known_until_training_goes_on() -> None:
    course = course_of([step(1), failed()])
    assert course.failed is not None
    assert (course.failed.error, course.failed.stage) == ("NotFinite", "tail")
    assert course_of([step(1), failed(), step(2)]).failed is None


def test_sources_that_train_one_pipeline_have_a_course_each_and_bounds() -> None:
    board = board_of([step(3), {**step(9), "source": "more"}, {**rolled_back(8, 9), "source": "more"}])
    assert [(name, course.done) for name, course in board.courses.items()] == [("digits", 3), ("more", 8)]
    assert board.main("more") is board.courses["more"]
    assert board.main("unknown") is board.courses["digits"]
    assert board.news() == ["more: worker tail-1 is gone: back to step 8 (1 step again)"]
    for number in range(2 * COURSES_LIMIT):
        board.heard_result(json.dumps({**step(1), "source": f"s{number}"}).encode(), 9.0)
    assert len(board.courses) == COURSES_LIMIT


def test_events_of_another_pipeline_do_not_count() -> None:
    board = board_of([{**step(3), "pipeline": "other"}, {"pipeline": "street", "objects": []}])
    assert (board.courses, board.heard, board.garbage) == ({}, 0, 0)


@pytest.mark.parametrize(
    "garbage",
    [
        *(b"", b"?", b"null", b"[1]", b"\xff", b"{}", b'{"event": "step"}', b"[" * 100_000, b'{"event": "new"}'),
        *(
            json.dumps({**step(1), **wrong}).encode()
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
    board = board_of([step(1)])
    board.heard_result(garbage, 1.0)
    assert (board.garbage, board.heard) == (1, 1)


def test_a_trend_has_the_whole_course_in_bounded_memory() -> None:
    trend = Trend()
    for number in range(1, 10_001):
        trend.add(number, float(number))
    values: list[Any] = trend.values(20)
    assert len(values) <= 20
    assert values == sorted(values)
    assert (values[0] < 600, values[-1] > 9400) == (True, True)
    assert len(trend._stretches) <= 128


def test_a_trend_forgets_what_was_undone_and_may_begin_anywhere() -> None:
    trend = Trend()
    assert trend.values(10) == []
    for number, value in ((1, 5.0), (2, 4.0), (3, 99.0), (2, 4.0)):
        trend.add(number, value)
    assert trend.values(10) == [5.0, 4.0]
    late = Trend()
    late.add(1 << 52, 1.0)
    assert late.values(10) == [1.0]
