"""The live view of a training pipeline, on a terminal and without one."""

from __future__ import annotations

import io
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from brokers.config.pipeline_file import Pipeline, load_pipeline
from brokers.dispatch.presence import WorkerLoad, WorkerRecord
from monitor.presence.training_stats import TrainingStats
from monitor.terminal.views import TrainingView, format_remaining, sparkline
from tests.support.training.training_events import (
    EventDict,
    evaluation_event,
    failure_event,
    rollback_event,
    run_events,
    step_event,
)
from tests.unit.monitor.presence.test_training_stats import make_stats

PIPELINE = """
[pipeline]
name = "digits"
kind = "training"
model = "vgg11"
cuts = [6]
[[stage]]
name = "head"
[[stage]]
name = "tail"
[source]
name = "digits"
"""


@pytest.fixture
def pipeline(tmp_path: Path) -> Pipeline:
    path = tmp_path / "digits.toml"
    path.write_text(PIPELINE)
    return load_pipeline(path)


def make_view(
    pipeline: Pipeline, stats: TrainingStats, *, width: int = 80, terminal: bool = True, encoding: str = "utf-8"
) -> TrainingView:
    file = io.TextIOWrapper(io.BytesIO(), encoding, write_through=True)
    console = Console(file=file, width=width, height=50, force_terminal=terminal, record=True, legacy_windows=False)
    view = TrainingView(pipeline, "embedded mqtt://127.0.0.1:1883", stats, console)
    view.status = "running"
    return view


def add_worker(stats: TrainingStats, worker: str, state: Any = "up") -> None:
    stage = worker.partition("-")[0]
    record = WorkerRecord(
        worker=worker, stage=stage, pipeline="digits", site="local", node="here", pid=1, device="cpu", fingerprint="",
        capacity=3, state=state, up_s=34, load=WorkerLoad(busy=0.83, done=412, rate=19.2, task_ms=41.3),
    )  # fmt: skip
    stats.on_presence(f"sparse/local/digits/{stage}/up/{worker}", record.to_bytes(), time.monotonic())


def render(view: TrainingView, now_s: float | None = None) -> str:
    view._console.print(view._render(time.monotonic() if now_s is None else now_s))
    return view._console.export_text(clear=False)


def render_events(pipeline: Pipeline, events: Iterable[EventDict]) -> str:
    return render(make_view(pipeline, make_stats(events)))


@pytest.mark.parametrize("width", [80, 120])
def test_view_has_progress_loss_evaluations_and_workers(pipeline: Pipeline, width: int) -> None:
    stats = make_stats(list(run_events())[:25])
    for worker, state in {"head-1": "up", "tail-1": "up", "tail-2": "standby"}.items():
        add_worker(stats, worker, state)
    screen = render(make_view(pipeline, stats, width=width))
    for text in (
        *("digits", "57%", "step 23/40", "epoch 3/4", "loss 0.4", "accuracy 7", "320 rows/s", "200 ms/step"),
        *("epoch 1", "epoch 2", "2.0000", "1.0000", "50.0%", "60.0%", "head-1", "tail-2", "standby", "83%", "41.3"),
    ):
        assert text in screen, text
    assert max(map(len, screen.splitlines())) == width
    assert "…" not in screen
    assert "34 s" in screen


def test_standby_is_dim_and_stage_without_worker_is_starting(pipeline: Pipeline) -> None:
    stats = TrainingStats("digits")
    add_worker(stats, "tail-2", "standby")
    view = make_view(pipeline, stats)
    assert "starting ..." in render(view)
    assert "\x1b[2mtail-2" in view._console.export_text(styles=True)
    assert stats.stages_up() == set()


def test_view_before_first_step_has_failure(pipeline: Pipeline) -> None:
    assert "no step yet" in render_events(pipeline, [])
    failure = "NotFinite: the loss is not a number, stage tail, worker tail-1"
    assert failure in render_events(pipeline, [failure_event()])


def test_loss_without_accuracy_has_no_accuracy_row(pipeline: Pipeline) -> None:
    events = [step_event(1, accuracy=None), evaluation_event(1, None), step_event(2, accuracy=None)]
    screen = render_events(pipeline, events)
    assert "0.5000" in screen
    assert "accuracy" not in screen


def test_stall_and_rollbacks_are_one_line(pipeline: Pipeline) -> None:
    stats = make_stats([step_event(1), step_event(2), rollback_event(1, 2)])
    screen = render(make_view(pipeline, stats), now_s=12.5)
    assert "no step for 12 s   rollbacks 1, steps repeated 1" in screen


def test_each_of_several_sources_has_a_bar(pipeline: Pipeline) -> None:
    screen = render_events(pipeline, [step_event(10), {**step_event(20), "source": "other"}])
    assert all(text in screen for text in ("25%", "50%", "step 10/40", "step 20/40", "other"))


def test_rollback_is_printed_once_above_the_view(pipeline: Pipeline) -> None:
    view = make_view(pipeline, make_stats([step_event(7), rollback_event(0, 7)]))
    with view:
        view.update()
    assert view._console.export_text().count("worker tail-1 is gone: rolled back to step 0, repeating 7 steps") == 1


def test_line_without_a_terminal_has_progress(pipeline: Pipeline) -> None:
    view = make_view(pipeline, make_stats(list(run_events())[:25]), terminal=False)
    view.update()
    line = view._console.export_text()
    assert "running  step 23/40  epoch 3/4  loss 0.4" in line
    assert "test 60.0%  320 rows/s" in line


def test_line_without_a_terminal_has_failure(pipeline: Pipeline) -> None:
    view = make_view(pipeline, make_stats([step_event(1), failure_event()]), terminal=False)
    view.update()
    assert "NotFinite: the loss is not a number" in view._console.export_text()


def test_terminal_without_unicode_gets_ascii(pipeline: Pipeline) -> None:
    assert render(make_view(pipeline, make_stats(run_events()), encoding="ascii")).isascii()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((None, ""), (0.0, ""), (0.4, "0 s left"), (59.4, "59 s left"), (59.6, "1 min 0 s left")),
        *((200.0, "3 min 20 s left"), (7530.0, "2 h 5 min left")),
    ],
)
def test_remaining_time_has_two_units_at_most(seconds: float | None, text: str) -> None:
    assert format_remaining(seconds) == text


def test_sparkline_is_scaled_from_lowest_to_highest() -> None:
    assert sparkline([0.0, 7.0, 3.0]) == "▁█▄"
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([]) == ""
