"""The live view of a run, as a terminal shows it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from brokers.config.pipeline_file import load_pipeline
from brokers.dispatch.presence import SourceLoad, SourceRecord, WorkerLoad, WorkerRecord
from brokers.dispatch.worker_registry import PRESENCE_TIMEOUT_S
from monitor.presence.inference_stats import InferenceStats
from monitor.terminal.inference_view import InferenceView
from tests.support.pipelines.pipeline_files import stage_table, write_pipeline_file

NOW_S = 100.0


def board() -> InferenceStats:
    """Two workers, one of them silent for too long, and a source with troubles."""
    found = InferenceStats("test")
    for worker, heard_s in (("head-1", NOW_S), ("head-2", NOW_S - PRESENCE_TIMEOUT_S - 1)):
        birth = WorkerRecord(
            worker=worker, stage="head", pipeline="test", site="local", node="camera-7", pid=1, device="cuda:1",
            fingerprint="0123456789abcdef", capacity=3, up_s=125.0,
            load=WorkerLoad(queue=17, done=4711, busy=0.83, rate=12.5, task_ms=66.6),
        )  # fmt: skip
        found.on_presence(f"sparse/local/test/head/up/{worker}", birth.to_bytes(), heard_s)
    load = SourceLoad(dropped={"superseded": 5}, retries={"WorkerLost": 2})
    source = SourceRecord(source="door", pipeline="test", site="local", node="n", pid=2, load=load)
    found.on_presence("sparse/local/test/source/up/door", source.to_bytes(), NOW_S)
    return found


def shown(folder: Path, width: int, found: InferenceStats | None = None) -> str:
    pipeline = load_pipeline(
        write_pipeline_file(folder, [stage_table("head", "double"), stage_table("tail", "double")])
    )
    view = InferenceView(pipeline, "mosquitto", found or board())
    view._console = Console(width=width, record=True, file=io.StringIO())
    view._console.print(view._render(NOW_S))
    return view._console.export_text()


@pytest.mark.parametrize("width", [80, 100, 160])
def test_it_shows_each_worker_with_its_state_load_and_age_and_what_was_dropped_and_retried(
    tmp_path: Path, width: int
) -> None:
    screen = shown(tmp_path, width)
    for word in ("cuda:1", "83%", "17", "12.5", "66.6", "4711", "2 min", "head-2", "lost"):
        assert word in screen, screen
    assert "retried WorkerLost 2" in screen
    assert "dropped newer_came 5" in screen
    assert "starting ..." in screen  # the other stage has nobody yet


def test_a_wide_terminal_shows_where_each_runs_and_of_which_model_it_is(tmp_path: Path) -> None:
    screen = shown(tmp_path, 160)
    for word in ("local", "camera-7", "0123456789abcdef"):
        assert word in screen, screen


def test_a_narrow_one_shows_what_changes(tmp_path: Path) -> None:
    assert "camera-7" not in shown(tmp_path, 100)


def test_thousands_of_workers_fill_no_screen_and_no_log_and_crowd_nobody_out(tmp_path: Path) -> None:
    found = board()
    for number in range(3000):  # of anybody's invention
        ghost = WorkerRecord(
            worker=f"ghost-{number}", stage="head", pipeline="test", site="local", node="n", pid=1, device="cpu",
            fingerprint="f", capacity=1, state="draining",
        )  # fmt: skip
        found.on_presence(f"sparse/local/test/head/up/ghost-{number}", ghost.to_bytes(), NOW_S)
    screen = shown(tmp_path, 100, found)
    assert screen.count("\n") < 50
    assert "head-1 " in screen
    assert "and 2970 more" in screen
    pipeline = load_pipeline(write_pipeline_file(tmp_path, [stage_table("head", "double")]))
    assert len(InferenceView(pipeline, "mosquitto", found)._line(NOW_S)) < 1500
