"""The summary at the end of a run."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

from rich.console import Console

from monitor.terminal.summary import print_summary
from sources.training.run_stats import TrainingRunStats
from tests.support.training.training_events import EventDict, failure_event, run_events, step_event


def printed(summary: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=80, record=True, highlight=False)
    print_summary(summary, console)
    return console.export_text()


def printed_training(events: Iterable[EventDict]) -> str:
    stats = TrainingRunStats("digits")
    for event in events:
        stats.add(event)
    files = {"model": "model.safetensors", "parts": ["head.safetensors", "tail.safetensors"], "curves": "training.png"}
    return printed({**stats.summary(["head", "tail"], 61.2), "outputs": "runs/x", "files": files})


INFERENCE: dict[str, Any] = {
    "requests": 100, "results": 97, "lost": 0, "dropped": 2, "failed": 3, "retries": 4, "unreadable": 1,
    "elapsed_s": 9.14, "throughput_per_s": 10.6, "latency_ms": {"p50": 190.2, "p95": 240.0, "p99": 260.0},
    "dropped_by_reason": {"superseded": 2}, "retries_by_reason": {"WorkerLost": 3, "Busy": 1},
    "failures": {"PoisonRequest": 3}, "outputs": "runs/x", "files": {"results": "results.jsonl", "clip": None},
    "links": [{"site": "device", "to": "cloud", "delay_ms": 8.0, "rate_mbit": 50.0, "bytes_out": 123e5, "bytes_in": 0}],
    "stages": {
        "head": {
            "workers": 2, "tasks": 100, "queue_ms": 1.0, "decode_ms": 0.4, "compute_ms": 33.0, "encode_ms": 0.5,
            "bytes_in": 2_000_000, "bytes_out": 0,
        }
    },
}  # fmt: skip


def test_summary_of_inference_has_counts_reasons_stages_links_and_files() -> None:
    text = printed(INFERENCE)
    for line in (
        "97 results of 100 requests in 9.1 s: 10.6/s, latency p50 190, p95 240, p99 260",
        "lost 0, dropped 2 (superseded 2), failed 3, retries 4 (WorkerLost 3, Busy 1)",
        "1 samples could not be read; logs/source.log names them",
        "  3 x PoisonRequest",
        "mean time of a task, in ms",
        "  link device - cloud (8 ms, 50 Mbit/s): 12.3 MB sent, 0.0 MB received",
        "  results   runs/x/results.jsonl",
    ):
        assert line in text, text
    assert "clip" not in text
    stage = next(line.split() for line in text.splitlines() if line.startswith("head"))
    assert stage == ["head", "2", "100", "1.0", "0.4", "33.0", "0.5", "2.0", "0.0"]


def test_summary_of_training_has_loss_rollbacks_stages_and_files() -> None:
    text = printed_training(run_events(rollbacks={17: 10, 30: 30}))
    for line in (
        "40 steps, 4 epochs, in 61.2 s: 320 rows/s, step p50 200, p95 200, p99 200 ms",
        *("training loss 0.1712, accuracy 97.0%", "test     loss 0.5, accuracy 80.0%"),
        "2 rollbacks to a checkpoint, 7 steps repeated",
        *("mean time of a micro-batch, in ms", "  model     runs/x/model.safetensors"),
        *("  parts     runs/x/head.safetensors, tail.safetensors", "  curves    runs/x/training.png"),
    ):
        assert line in text, line
    stage = next(line.split() for line in text.splitlines() if line.startswith("head"))
    assert stage == ["head", "1", "1.0", "0.5", "2.0", "3.0", "1.0", "0.2", "0.0", "0.1"]
    assert "…" not in text


def test_summary_of_failed_training_has_its_error() -> None:
    text = printed_training([step_event(1, accuracy=None), failure_event()])
    assert "1 x NotFinite" in text
    assert "rollback" not in text
    assert "accuracy" not in text
    assert "0 steps, 0 epochs" in printed_training([])
