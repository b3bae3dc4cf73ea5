"""The tables of `sparse status`, as wide and as narrow terminals show them, and a file."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console, RenderableType

from brokers.dispatch.presence import LatencyPercentiles, SourceLoad, SourceRecord, WorkerLoad, WorkerRecord
from monitor.terminal.status_tables import sources_table, workers_table

FIGURES = ("draining", "lost", "2 h", "43210", "12345", "12.5", "66.6")


def worker(name: str, stage: str, state: Any = "up", **load: Any) -> WorkerRecord:
    return WorkerRecord(
        worker=name, stage=stage, pipeline="street", site="local", node="raspberrypi", pid=1, device="cuda:1",
        fingerprint="0123456789abcdef", capacity=3, up_s=7500, state=state,
        load=WorkerLoad(queue=250, queue_ms=43210, done=12345, rate=12.5, task_ms=66.6, **load),
    )  # fmt: skip


WORKERS = [
    (worker("head-1", "head", failed=3, refused=2), False),
    (worker("raspberrypi-12345", "body", "draining"), False),
    (worker("tail-1", "tail"), True),
]
SOURCE = SourceRecord(
    source="source-ab12cd34", pipeline="street", site="local", node="raspberrypi", pid=1,
    load=SourceLoad(results=12345, latency_ms=LatencyPercentiles(p50=123, p99=2345), retries={"WorkerLost": 1}),
)  # fmt: skip


def shown(table: RenderableType, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(table)
    return console.export_text()


@pytest.mark.parametrize(("width", "gap"), [(80, 1), (100, 2), (160, 2)])
def test_on_a_terminal_of_any_usual_width_no_figure_of_a_worker_is_cut(width: int, gap: int) -> None:
    screen = shown(workers_table(WORKERS, headings=True, column_gap=gap), width)
    for word in (*FIGURES, "raspberrypi-12345", "local street body", "cuda:1"):
        assert word in screen, screen
    assert "head-1  failed 3, refused 2" in screen


@pytest.mark.parametrize(("width", "gap"), [(80, 1), (100, 2)])
def test_nor_of_a_source(width: int, gap: int) -> None:
    screen = shown(sources_table([(SOURCE, False)], headings=True, column_gap=gap), width)
    for word in ("source-ab12cd34", "123", "2345", "12345", "retried WorkerLost 1"):
        assert word in screen, screen


def test_in_a_file_each_line_says_all_of_one_worker() -> None:
    row = shown(workers_table(WORKERS), 400).splitlines()[1].split()
    assert row[:8] == ["local", "street", "head", "head-1", "raspberrypi", "cuda:1", "0123456789abcdef", "up"]
    assert row[-4:] == ["failed", "3,", "refused", "2"]
