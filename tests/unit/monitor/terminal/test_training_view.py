"""What a person sees of a run of training: on a terminal, without one, and at the end."""

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
from monitor.presence.inference_stats import InferenceStats
from monitor.presence.training_stats import TrainingStats
from monitor.terminal.inference_view import InferenceView
from monitor.terminal.summary import print_summary
from monitor.terminal.training_view import TrainingView, format_remaining, sparkline
from sources.training.run_stats import TrainingRunStats
from tests.support.training.training_events import (
    EventDict,
    evaluation_event,
    failure_event,
    rollback_event,
    run_events,
    step_event,
)
from tests.unit.monitor.presence.test_training_stats import make_stats

FILE = """
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
    path.write_text(FILE)
    return load_pipeline(path)


def console(width: int = 80, *, terminal: bool = True, encoding: str = "utf-8") -> Console:
    file = io.TextIOWrapper(io.BytesIO(), encoding, write_through=True)
    return Console(file=file, width=width, height=50, force_terminal=terminal, record=True, legacy_windows=False)


def join(board: TrainingStats, worker: str, state: Any = "up") -> None:
    stage = worker.partition("-")[0]
    birth = WorkerRecord(
        worker=worker, stage=stage, pipeline="digits", site="local", node="here", pid=1, device="cpu", fingerprint="",
        capacity=3, state=state, up_s=34, load=WorkerLoad(busy=0.83, done=412, rate=19.2, task_ms=41.3),
    )  # fmt: skip
    board.on_presence(f"sparse/local/digits/{stage}/up/{worker}", birth.to_bytes(), time.monotonic())


def view_of(pipeline: Pipeline, board: TrainingStats, **wanted: Any) -> tuple[TrainingView, Console]:
    screen = console(**wanted)
    view = TrainingView(pipeline, "embedded mqtt://127.0.0.1:1883", board, screen)
    view.status = "running"
    return view, screen


def shown(
    pipeline: Pipeline, events: Iterable[EventDict], workers: dict[str, str] | None = None, width: int = 80
) -> str:
    board = make_stats(events)
    for worker, state in (workers or {}).items():
        join(board, worker, state)
    view, screen = view_of(pipeline, board, width=width)
    screen.print(view._render(time.monotonic()))
    return screen.export_text()


@pytest.mark.parametrize("width", [80, 120])
def test_the_view_shows_progress_loss_evaluations_and_workers(pipeline: Pipeline, width: int) -> None:
    text = shown(pipeline, list(run_events())[:25], {"head-1": "up", "tail-1": "up", "tail-2": "standby"}, width)
    for word in (
        *("digits", "57%", "step 23/40", "epoch 3/4", "loss 0.4", "accuracy 7", "320 rows/s", "200 ms/step"),
        *("epoch 1", "epoch 2", "2.0000", "1.0000", "50.0%", "60.0%", "head-1", "tail-2", "standby", "83%", "41.3"),
    ):
        assert word in text, word
    assert max(map(len, text.splitlines())) == width
    assert "…" not in text
    assert "34 s" in text


def test_a_standby_is_dim_and_a_stage_without_worker_is_starting(pipeline: Pipeline) -> None:
    board = TrainingStats("digits")
    join(board, "tail-2", "standby")
    view, screen = view_of(pipeline, board)
    screen.print(view._render(time.monotonic()))
    assert "\x1b[2mtail-2" in screen.export_text(styles=True, clear=False)
    assert "starting ..." in screen.export_text()
    assert board.stages_up() == set()


def test_before_the_first_step_the_view_says_so(pipeline: Pipeline) -> None:
    assert "no step yet" in shown(pipeline, [])
    assert "NotFinite: the loss is not a number, stage tail, worker tail-1" in shown(pipeline, [failure_event()])


def test_a_loss_without_accuracy_has_no_row_for_it(pipeline: Pipeline) -> None:
    text = shown(pipeline, [step_event(1, accuracy=None), evaluation_event(1, None), step_event(2, accuracy=None)])
    assert "0.5000" in text
    assert "accuracy" not in text


def test_what_keeps_training_from_going_on_is_a_line(pipeline: Pipeline) -> None:
    board = make_stats([step_event(1), step_event(2), rollback_event(1, 2)])
    view, screen = view_of(pipeline, board)
    screen.print(view._render(12.5))
    assert "no step for 12 s   recoveries 1, steps again 1" in screen.export_text()


def test_two_sources_have_a_bar_each(pipeline: Pipeline) -> None:
    text = shown(pipeline, [step_event(10), {**step_event(20), "source": "other"}])
    assert all(word in text for word in ("25%", "50%", "step 10/40", "step 20/40", "other"))


def test_a_recovery_is_said_above_the_view_when_it_happens(pipeline: Pipeline) -> None:
    view, screen = view_of(pipeline, make_stats([step_event(7), rollback_event(0, 7)]))
    with view:
        view.update()
    assert screen.export_text().count("worker tail-1 is gone: rolled back to step 0, repeating 7 steps") == 1


def test_without_a_terminal_there_is_a_line_every_two_seconds(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = make_stats(list(run_events())[:25])
    join(board, "tail-1")
    now_s = [100.0]
    monkeypatch.setattr("monitor.terminal.live.time.monotonic", lambda: now_s[0])
    view, screen = view_of(pipeline, board, terminal=False)
    with view:
        for now_s[0] in (100.0, 100.5, 101.9, 102.1, 103.0):
            view.update()
    first, second = screen.export_text().splitlines()
    assert first.startswith("   0.0 s  running  step 23/40  epoch 3/4  loss 0.4")
    assert "test 60.0%  320 rows/s" in first
    assert second.startswith("   2.1 s  running")


def test_without_a_terminal_nothing_is_said_before_there_is_something_to_say(pipeline: Pipeline) -> None:
    view, screen = view_of(pipeline, TrainingStats("digits"), terminal=False)
    view.update()
    assert screen.export_text() == ""
    view, screen = view_of(pipeline, make_stats([step_event(1), failure_event()]), terminal=False)
    view.update()
    assert "NotFinite: the loss is not a number" in screen.export_text()


def test_a_terminal_without_unicode_gets_what_it_can_show(pipeline: Pipeline) -> None:
    view, screen = view_of(pipeline, make_stats(run_events()), encoding="ascii")
    screen.print(view._render(time.monotonic()))
    assert screen.export_text().isascii()


def test_results_have_a_view_of_the_same_frame(pipeline: Pipeline) -> None:
    board, screen = InferenceStats("digits"), console()
    board.on_result(b'{"source": "door", "index": 7, "latency_ms": 50, "classes": [{"label": "cat", "score": 1}]}', 0)
    view = InferenceView(pipeline, "embedded", board, screen)
    screen.print(view._render(time.monotonic()))
    assert all(word in screen.export_text(clear=False) for word in ("latency 50 ms", "1 results", "door 7", "cat 1.00"))
    assert "1 results  0.0/s  50 ms" in view._line(1000.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((None, ""), (0.0, ""), (0.4, "0 s left"), (59.4, "59 s left"), (59.6, "1 min 0 s left")),
        *((200.0, "3 min 20 s left"), (7530.0, "2 h 5 min left")),
    ],
)
def test_the_time_left_is_as_exact_as_it_is_of_use(seconds: float | None, text: str) -> None:
    assert format_remaining(seconds) == text


def test_a_sparkline_goes_from_the_lowest_to_the_highest() -> None:
    assert sparkline([0.0, 7.0, 3.0]) == "▁█▄"
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([]) == ""


def ended(events: Iterable[EventDict]) -> str:
    tally = TrainingRunStats("digits")
    for event in events:
        tally.add(event)
    files = {"model": "model.safetensors", "parts": ["head.safetensors", "tail.safetensors"], "curves": "training.png"}
    screen = console()
    print_summary({**tally.summary(["head", "tail"], 61.2), "outputs": "runs/x", "files": files}, screen)
    return screen.export_text()


def test_the_end_of_a_run_says_what_was_learned_and_where_the_time_went() -> None:
    text = ended(run_events(rollbacks={17: 10, 30: 30}))
    for line in (
        "40 steps, 4 epochs, in 61.2 s: 320 rows/s, a step p50 200, p95 200, p99 200 ms",
        *("training loss 0.1712, accuracy 97.0%", "test     loss 0.5, accuracy 80.0%"),
        "went back to a checkpoint 2 times, did 7 steps again",
        *("mean time of a micro-batch, in ms", "  model     runs/x/model.safetensors"),
        *("  parts     runs/x/head.safetensors, tail.safetensors", "  curves    runs/x/training.png"),
    ):
        assert line in text, line
    stage = next(line.split() for line in text.splitlines() if line.startswith("head"))
    assert stage == ["head", "1", "1.0", "0.5", "2.0", "3.0", "1.0", "0.2", "0.0", "0.1"]
    assert "…" not in text


def test_the_end_of_a_run_that_failed_says_with_what() -> None:
    text = ended([step_event(1, accuracy=None), failure_event()])
    assert "1 x NotFinite" in text
    assert "went back" not in text
    assert "accuracy" not in text
    assert "0 steps, 0 epochs" in ended([])
