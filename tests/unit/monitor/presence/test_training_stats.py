"""Progress of training from published events, including events that any other client may publish."""

from __future__ import annotations

import json
from collections.abc import Iterable

import pytest

from monitor.presence.training_stats import (
    SERIES_LIMIT,
    SOURCES_LIMIT,
    DownsampledSeries,
    TrainingProgress,
    TrainingStats,
)
from tests.support.training.training_events import (
    EventDict,
    evaluation_event,
    failure_event,
    rollback_event,
    run_events,
    step_event,
)


def make_stats(events: Iterable[EventDict], every_s: float = 0.5) -> TrainingStats:
    stats = TrainingStats("digits")
    for number, event in enumerate(events):
        stats.on_result(json.dumps(event).encode(), every_s * number)
    return stats


def make_progress(events: Iterable[EventDict], every_s: float = 0.5) -> TrainingProgress:
    progress = make_stats(events, every_s).progress_of("digits")
    assert progress is not None
    return progress


def test_stats_are_empty_before_the_first_event() -> None:
    stats = TrainingStats("digits")
    assert (stats.progress_of("digits"), stats.results_received, list(stats.notices)) == (None, 0, [])


def test_loss_and_accuracy_are_means_of_recent_steps() -> None:
    progress = make_progress(step_event(number, loss=9.0 if number <= 10 else 2.0) for number in range(1, 31))
    assert progress.loss == 2.0
    assert progress.accuracy == pytest.approx(sum(step_event(number)["accuracy"] for number in range(15, 31)) / 16)
    assert make_progress([step_event(1, accuracy=None)]).accuracy is None


def test_rate_leaves_out_pauses_between_steps() -> None:
    progress = make_progress([step_event(number) for number in range(1, 31)], every_s=1.0)
    assert progress.rows_per_s(30.0) == 320.0  # 64 rows in 200 ms
    assert progress.rows_per_s(1000.0) == 320.0
    assert make_progress([step_event(1, step_ms=0.0)]).rows_per_s(0.0) == 0.0


def test_remaining_time_follows_the_pace_of_steps() -> None:
    progress = make_progress([step_event(number) for number in range(1, 31)])
    assert progress.remaining_s(14.5) == pytest.approx(5.0)
    assert progress.remaining_s(15.0) == pytest.approx(4.5)
    assert progress.remaining_s(1000.0) == 0.0
    assert make_progress([step_event(1)]).remaining_s(0.0) is None
    assert make_progress(run_events()).remaining_s(30.0) == 0.0


def test_overdue_step_is_a_stall() -> None:
    progress = make_progress([step_event(number) for number in range(1, 31)])
    assert progress.stalled_s(19.0) == 0.0
    assert progress.stalled_s(20.5) == 6.0
    assert make_progress(run_events()).stalled_s(1000.0) == 0.0, "training is complete"


def test_rollback_is_a_notice_and_reduces_progress() -> None:
    stats = make_stats([step_event(7), rollback_event(0, 7, "worker body-1 is gone")])
    progress = stats.progress_of("digits")
    assert progress is not None
    assert (progress.completed_steps, progress.rollbacks, progress.repeated_steps) == (0, 1, 7)
    assert list(stats.notices) == ["worker body-1 is gone: rolled back to step 0, repeating 7 steps"]


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (rollback_event(40, 41), "worker tail-1 is gone: rolled back to step 40, repeating 1 step"),
        (rollback_event(40, 40), "worker tail-1 is gone: rolled back to step 40"),
        (rollback_event(1, 3, ""), "unknown reason: rolled back to step 1, repeating 2 steps"),
        (rollback_event(1, 3, "\x1b[2J\n"), "?[2J?: rolled back to step 1, repeating 2 steps"),
    ],
)
def test_notice_of_a_rollback_is_one_safe_line(event: EventDict, text: str) -> None:
    assert list(make_stats([event]).notices) == [text]


def test_rolled_back_evaluations_are_dropped_and_the_best_is_kept() -> None:
    progress = make_progress([evaluation_event(10, 0.7), evaluation_event(20, 0.9), evaluation_event(30, 0.8)])
    assert [each.accuracy for each in progress.evaluations] == [0.7, 0.9, 0.8]
    assert progress.best_evaluation is progress.evaluations[1]
    repeated = make_progress(
        [evaluation_event(10, 0.7), evaluation_event(20, 0.9), rollback_event(15, 22), evaluation_event(20, 0.9)]
    )
    assert [each.step for each in repeated.evaluations] == [10, 20]
    assert repeated.best_evaluation is repeated.evaluations[1]


def test_failure_is_cleared_by_the_next_step() -> None:
    progress = make_progress([step_event(1), failure_event()])
    assert progress.failure is not None
    assert (progress.failure.error, progress.failure.stage) == ("NotFinite", "tail")
    assert make_progress([step_event(1), failure_event(), step_event(2)]).failure is None


def test_sources_have_separate_progress_and_are_bounded() -> None:
    other = {"source": "more"}
    stats = make_stats([step_event(3), {**step_event(9), **other}, {**rollback_event(8, 9), **other}])
    assert [(name, each.completed_steps) for name, each in stats.progress_by_source.items()] == [
        ("digits", 3),
        ("more", 8),
    ]
    assert stats.progress_of("more") is stats.progress_by_source["more"]
    assert stats.progress_of("unknown") is stats.progress_by_source["digits"]
    assert list(stats.notices) == ["more: worker tail-1 is gone: rolled back to step 8, repeating 1 step"]
    for number in range(2 * SOURCES_LIMIT):
        stats.on_result(json.dumps({**step_event(1), "source": f"s{number}"}).encode(), 9.0)
    assert len(stats.progress_by_source) == SOURCES_LIMIT


def test_events_of_another_pipeline_are_ignored() -> None:
    stats = make_stats([{**step_event(3), "pipeline": "other"}, {"pipeline": "street", "objects": []}])
    assert (stats.progress_by_source, stats.results_received, stats.rejected) == ({}, 0, 0)


MALFORMED = [b"", b"?", b"null", b"[1]", b"\xff", b"{}", b'{"event": "step"}', b"[" * 100_000, b'{"event": "new"}']
WRONG_FIELDS: list[EventDict] = [
    {"step": -1},
    {"step": "1"},
    {"steps": 1 << 60},
    {"loss": None},
    {"loss": float("nan")},
    {"loss": 1e300},
    {"step_ms": float("inf")},
    {"source": "s" * 5000},
    {"source": 7},
]


@pytest.mark.parametrize(
    "payload",
    MALFORMED + [json.dumps({**step_event(1), **fields}).encode() for fields in WRONG_FIELDS],
    ids=lambda payload: repr(payload[:20]),
)
def test_malformed_events_are_counted_and_ignored(payload: bytes) -> None:
    stats = make_stats([step_event(1)])
    stats.on_result(payload, 1.0)
    assert (stats.rejected, stats.results_received) == (1, 1)


def test_series_covers_all_steps_in_bounded_memory() -> None:
    series = DownsampledSeries()
    for number in range(1, 10_001):
        series.add(number, float(number))
    values = series.values(20)
    assert len(values) <= 20
    assert values == sorted(values)
    assert (values[0] < 600, values[-1] > 9400) == (True, True)
    assert len(series._values) <= SERIES_LIMIT


def test_series_drops_rolled_back_steps() -> None:
    series = DownsampledSeries()
    assert series.values(10) == []
    for number, value in ((1, 5.0), (2, 4.0), (3, 99.0), (2, 4.0)):
        series.add(number, value)
    assert series.values(10) == [5.0, 4.0]


def test_series_may_start_at_any_step() -> None:
    series = DownsampledSeries()
    series.add(1 << 52, 1.0)
    assert series.values(10) == [1.0]
