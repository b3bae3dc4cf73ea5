"""The figures of a training run, from events that are made up."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from sources.training.run_stats import TrainingRunStats
from tests.support.training.training_events import (
    EventDict,
    evaluation_event,
    failure_event,
    rollback_event,
    run_events,
    stage_times,
    step_event,
)


def tally_of(events: Iterable[EventDict]) -> TrainingRunStats:
    tally = TrainingRunStats("digits")
    for event in events:
        tally.add(event)
    return tally


def test_a_run_adds_up() -> None:
    summary = tally_of(run_events()).summary(["head", "tail"], elapsed_s=9.1234)
    assert {key: summary[key] for key in summary if key not in ("stages", "loss", "accuracy")} == {
        "pipeline": "digits", "requests": 160, "results": 160, "failed": 0, "failures": {}, "lost": 0, "dropped": 0,
        "retries": 0, "elapsed_s": 9.123, "throughput_per_s": 320.0, "rows": 2560, "steps": 40, "epochs": 4,
        "test_loss": 0.5, "test_accuracy": 0.8, "best_test_accuracy": 0.8, "rolled_back": 0, "repeated_steps": 0,
        "step_ms": {"p50": 200.0, "p95": 200.0, "p99": 200.0}, "idle_ms": 9.0,
    }  # fmt: skip
    last_epoch = [step_event(number) for number in range(31, 41)]
    assert summary["loss"] == pytest.approx(sum(event["loss"] for event in last_epoch) / 10, abs=1e-6)
    assert summary["accuracy"] == pytest.approx(sum(event["accuracy"] for event in last_epoch) / 10, abs=1e-6)


def test_stage_times_are_means_of_a_micro_batch_in_the_order_of_the_pipeline() -> None:
    events = list(run_events())
    events[-2]["time"]["stages"] = [stage_times("tail", "tail-2")]
    summary = tally_of(events).summary(["head", "tail"])
    assert list(summary["stages"]) == ["head", "tail"]
    assert summary["stages"]["tail"] == {
        "workers": 2, "tasks": 160, "queue_ms": 1.0, "decode_ms": 0.5, "compute_ms": 6.0, "encode_ms": 0.25,
        "forward_ms": 2.0, "backward_ms": 3.0, "bytes_in": 40_000, "bytes_out": 80_000,
    }  # fmt: skip
    assert (summary["stages"]["head"]["workers"], summary["stages"]["head"]["tasks"]) == (1, 156)


def test_a_step_that_was_done_again_was_asked_twice_and_learned_once() -> None:
    calm, killed = tally_of(run_events()), tally_of(run_events(rollbacks={17: 10, 30: 30, 40: 20}))
    learned = ("loss", "accuracy", "test_accuracy", "steps", "epochs", "rows")
    before, after = calm.summary(), killed.summary()
    assert {key: after[key] for key in learned} == {key: before[key] for key in learned}
    assert (after["rolled_back"], after["repeated_steps"], after["retries"]) == (3, 27, 108)
    assert (before["requests"], after["requests"], after["lost"]) == (160, 268, 0)


def test_a_source_that_was_killed_goes_back_without_a_word() -> None:
    events = [*(step_event(number) for number in range(1, 18)), *(step_event(number) for number in range(11, 41))]
    summary = tally_of(events).summary()
    assert (summary["steps"], summary["repeated_steps"], summary["rolled_back"]) == (40, 7, 0)


def test_an_epoch_of_which_a_part_is_undone_has_the_mean_of_what_counts() -> None:
    tally = tally_of([step_event(1, loss=4.0), step_event(2, loss=9.0), rollback_event(1, 2), step_event(2, loss=2.0)])
    assert tally.summary()["loss"] == 3.0


def test_the_first_step_warms_up_and_is_not_in_the_throughput_unless_there_is_no_other() -> None:
    first = step_event(1, step_ms=6400.0)
    assert tally_of([first]).summary()["throughput_per_s"] == 10.0
    assert tally_of([first, step_event(2), step_event(3)]).summary()["throughput_per_s"] == 320.0


def test_a_loss_without_accuracy_has_none() -> None:
    summary = tally_of([step_event(1, accuracy=None), evaluation_event(1, None)]).summary()
    assert (summary["accuracy"], summary["test_accuracy"], summary["best_test_accuracy"]) == (None, None, None)
    assert summary["test_loss"] == 0.5


def test_the_best_accuracy_outlives_a_worse_one() -> None:
    summary = tally_of([evaluation_event(1, 0.7), evaluation_event(2, 0.9), evaluation_event(3, 0.8)]).summary()
    assert (summary["test_accuracy"], summary["best_test_accuracy"]) == (0.8, 0.9)


def test_nothing_has_no_figures_and_divides_by_none() -> None:
    summary = TrainingRunStats("digits").summary()
    nothing: dict[str, Any] = {"loss": None, "test_loss": None, "steps": 0, "throughput_per_s": 0.0, "stages": {}}
    assert {key: summary[key] for key in nothing} == nothing


def test_a_failure_is_counted_and_what_a_later_version_says_is_read_over() -> None:
    summary = tally_of([step_event(1), failure_event(), {"event": "new"}, {}]).summary()
    assert (summary["failed"], summary["failures"], summary["steps"]) == (1, {"NotFinite": 1}, 1)


def test_memory_stays_flat() -> None:
    tally = tally_of(step_event(number, steps=30_000, epochs=1) for number in range(1, 20_001))
    assert len(tally._steps) == 10_000
    assert tally.summary()["steps"] == 20_000
