"""The tables of `sparse status` on terminals of common widths and in files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from brokers.config.pipeline_file import load_pipeline
from brokers.dispatch.presence import LatencyPercentiles, SourceLoad, SourceRecord, WorkerLoad, WorkerRecord
from monitor.terminal.status_tables import format_age, sources_table, workers_table
from tests.support.pipelines.pipeline_files import stage_table, write_pipeline_file


def make_worker(name: str, stage: str, state: Any = "up", **load: Any) -> WorkerRecord:
    return WorkerRecord(
        worker=name, stage=stage, pipeline="street", site="local", node="raspberrypi", pid=1, device="cuda:1",
        fingerprint="0123456789abcdef", capacity=3, up_s=7500, state=state,
        load=WorkerLoad(queue=250, queue_ms=43210, done=12345, rate=12.5, task_ms=66.6, **load),
    )  # fmt: skip


WORKERS = [
    (make_worker("head-1", "head", failed=3, malformed=2), False),
    (make_worker("raspberrypi-12345", "body", "draining"), False),
    (make_worker("tail-1", "tail"), True),
]
WORKER_NUMBERS = ("draining", "lost", "2 h", "250", "43210", "12345", "12.5", "66.6")
SOURCE = SourceRecord(
    source="source-ab12cd34", pipeline="street", site="local", node="raspberrypi", pid=1,
    load=SourceLoad(
        results=12345, latency_ms=LatencyPercentiles(p50=123, p99=2345), retries={"WorkerLost": 1},
        failed={"PoisonRequest": 4}, duplicates=6,
    ),
)  # fmt: skip


def render(table: RenderableType, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(table)
    return console.export_text()


@pytest.mark.parametrize(("width", "gap"), [(80, 1), (100, 2), (160, 2)])
def test_numbers_of_workers_are_never_cut(width: int, gap: int) -> None:
    screen = render(workers_table(WORKERS, headings=True, column_gap=gap), width)
    for text in (*WORKER_NUMBERS, "raspberrypi-12345", "local street body", "cuda:1"):
        assert text in screen, screen
    assert "head-1  failed 3, malformed 2" in screen


@pytest.mark.parametrize(("width", "gap"), [(80, 1), (100, 2)])
def test_numbers_of_sources_are_never_cut(width: int, gap: int) -> None:
    screen = render(sources_table([(SOURCE, False)], headings=True, column_gap=gap), width)
    for text in ("source-ab12cd34", "123", "2345", "12345"):
        assert text in screen, screen
    assert "source-ab12cd34  retried WorkerLost 1  failed PoisonRequest 4  duplicates 6" in screen


def test_lines_in_a_file_are_complete() -> None:
    worker = render(workers_table(WORKERS), 400).splitlines()[1].split()
    assert worker[:8] == ["local", "street", "head", "head-1", "raspberrypi", "cuda:1", "0123456789abcdef", "up"]
    assert worker[-4:] == ["failed", "3,", "malformed", "2"]
    source = render(sources_table([(SOURCE, True)]), 400).splitlines()[1].split()
    assert source[:5] == ["local", "street", "source-ab12cd34", "raspberrypi", "lost"]
    assert source[-6:] == ["-", "WorkerLost", "1", "PoisonRequest", "4", "6"]


@pytest.mark.parametrize("headings", [True, False])
def test_stage_without_workers_has_a_row(tmp_path: Path, headings: bool) -> None:
    stages = [stage_table("head", "double"), stage_table("spare", "double")]
    pipeline = load_pipeline(write_pipeline_file(tmp_path, stages, name="street"))
    screen = render(workers_table(WORKERS[:1], pipeline, headings=headings), 400)
    assert screen.count("none up") == 1
    assert screen.index("spare") > screen.index("head-1")


def test_empty_tables_say_so() -> None:
    assert render(workers_table([]), 80) == "no worker is up\n"
    assert render(sources_table([]), 80) == "no source is up\n"


def test_text_from_the_network_is_not_markup_or_control_codes() -> None:
    record = make_worker("w", "head").model_copy(update={"node": "[red]\x1b[2J", "device": ""})
    screen = render(workers_table([(record, False)]), 400)
    assert "[red]?[2J" in screen
    assert "\x1b" not in screen


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "?"), (0.4, "0 s"), (59, "59 s"), (180, "3 min"), (7500, "2 h"), (200_000, "2 d")]
)
def test_age_is_one_number_with_its_unit(seconds: float | None, text: str) -> None:
    assert format_age(seconds) == text
