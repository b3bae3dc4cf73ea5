"""The common parts of the live view: workers, problems, and lines without a terminal."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from brokers.config.pipeline_file import Pipeline, load_pipeline
from brokers.dispatch.presence import SourceLoad, SourceRecord, WorkerLoad, WorkerRecord
from brokers.dispatch.worker_registry import PRESENCE_TIMEOUT_S
from monitor.presence.inference_stats import InferenceStats
from monitor.terminal.views import InferenceView
from tests.support.pipelines.pipeline_files import stage_table, write_pipeline_file

NOW_S = 100.0


@pytest.fixture
def pipeline(tmp_path: Path) -> Pipeline:
    stages = [stage_table("head", "double"), stage_table("tail", "double")]
    return load_pipeline(write_pipeline_file(tmp_path, stages))


def make_stats() -> InferenceStats:
    """Two workers, one of them silent for too long, and a source with problems."""
    stats = InferenceStats("test")
    for worker, seen_s in (("head-1", NOW_S), ("head-2", NOW_S - PRESENCE_TIMEOUT_S - 1)):
        record = WorkerRecord(
            worker=worker, stage="head", pipeline="test", site="local", node="camera-7", pid=1, device="cuda:1",
            fingerprint="0123456789abcdef", capacity=3, up_s=125.0,
            load=WorkerLoad(queue=17, done=4711, busy=0.83, rate=12.5, task_ms=66.6),
        )  # fmt: skip
        stats.on_presence(f"sparse/local/test/head/up/{worker}", record.to_bytes(), seen_s)
    load = SourceLoad(dropped={"superseded": 5}, retries={"WorkerLost": 2})
    source = SourceRecord(source="door", pipeline="test", site="local", node="n", pid=2, load=load)
    stats.on_presence("sparse/local/test/source/up/door", source.to_bytes(), NOW_S)
    return stats


def render(pipeline: Pipeline, width: int, stats: InferenceStats | None = None) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(InferenceView(pipeline, "mosquitto", stats or make_stats(), console)._render(NOW_S))
    return console.export_text()


@pytest.mark.parametrize("width", [80, 100, 160])
def test_view_has_workers_with_state_and_load_and_problems(pipeline: Pipeline, width: int) -> None:
    screen = render(pipeline, width)
    for text in ("cuda:1", "83%", "17", "12.5", "66.6", "4711", "2 min", "head-2", "lost"):
        assert text in screen, screen
    assert "retried WorkerLost 2" in screen
    assert "dropped superseded 5" in screen
    assert "starting ..." in screen  # the tail has no worker yet


@pytest.mark.parametrize(("width", "shown"), [(100, False), (160, True)])
def test_site_node_and_model_are_shown_on_wide_terminals(pipeline: Pipeline, width: int, shown: bool) -> None:
    screen = render(pipeline, width)
    for text in ("local", "camera-7", "0123456789abcdef"):
        assert (text in screen) is shown, screen


def test_hundreds_of_invented_workers_hide_no_real_one(pipeline: Pipeline) -> None:
    stats = make_stats()
    for number in range(300):
        record = WorkerRecord(
            worker=f"fake-{number}", stage="head", pipeline="test", site="local", node="n", pid=1, device="cpu",
            fingerprint="f", capacity=1, state="draining",
        )  # fmt: skip
        stats.on_presence(f"sparse/local/test/head/up/fake-{number}", record.to_bytes(), NOW_S)
    screen = render(pipeline, 100, stats)
    assert screen.count("\n") < 50
    assert "head-1 " in screen
    assert "and 270 more" in screen
    line = InferenceView(pipeline, "mosquitto", stats)._line(NOW_S)
    assert "and 270 more" in line
    assert len(line) < 1500


def test_line_has_status_stages_and_problems(pipeline: Pipeline) -> None:
    view = InferenceView(pipeline, "mosquitto", make_stats())
    view.status = "running"
    view.broker_restarts = 2
    line = view._line(NOW_S)
    assert "running (broker restarts: 2)" in line
    assert "head 83% head lost  retried WorkerLost 2  dropped superseded 5" in line


def test_without_a_terminal_a_line_is_printed_every_two_seconds(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = [100.0]
    monkeypatch.setattr("monitor.terminal.live.time.monotonic", lambda: now_s[0])
    stats = make_stats()
    console = Console(width=200, record=True, file=io.StringIO(), force_terminal=False)
    view = InferenceView(pipeline, "mosquitto", stats, console)
    with view:
        view.update()  # there is no result yet
        stats.on_result(b'{"source": "door", "index": 7, "latency_ms": 50}', 100.0)
        for now_s[0] in (100.0, 100.5, 101.9, 102.1, 103.0):
            view.update()
    first, second = console.export_text().splitlines()
    assert first.startswith("   0.0 s  starting  1 results")
    assert second.startswith("   2.1 s  starting  1 results")


def test_without_a_terminal_first_line_comes_after_a_while(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [100.0]
    monkeypatch.setattr("monitor.terminal.live.time.monotonic", lambda: now_s[0])
    console = Console(width=200, record=True, file=io.StringIO(), force_terminal=False)
    view = InferenceView(pipeline, "mosquitto", InferenceStats("test"), console)
    for now_s[0] in (100.0, 109.9, 110.0):
        view.update()
    [line] = console.export_text().splitlines()
    assert line.startswith("  10.0 s  starting  0 results")
