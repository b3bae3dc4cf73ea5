"""Handling of the outputs and exits of a run's processes; tests/pipeline/cli runs whole pipelines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from brokers.config.pipeline_file import load_pipeline
from brokers.errors import SparseError, UsageError
from monitor.launch.child_process import ChildProcess
from monitor.launch.run import _exit_error, _parse_summary, create_live_view
from monitor.presence.inference_stats import InferenceStats
from monitor.presence.training_stats import TrainingStats
from monitor.terminal.views import InferenceView, TrainingView
from tests.support.pipelines.pipeline_files import stage_table, write_pipeline_file


@pytest.mark.parametrize(
    ("kind", "stats", "view"),
    [("inference", InferenceStats, InferenceView), ("training", TrainingStats, TrainingView)],
)
def test_live_view_fits_the_kind_of_pipeline(tmp_path: Path, kind: str, stats: type, view: type) -> None:
    path = write_pipeline_file(tmp_path, [stage_table("head")], name="digits", model="vgg11", kind=kind)
    table, live = create_live_view(load_pipeline(path), "embedded")
    assert (type(table), type(live), table.pipeline) == (stats, view, "digits")


@pytest.mark.parametrize(
    ("output", "summary"),
    [
        (b'hello\n{"outputs": "runs/a"}\n', {"outputs": "runs/a"}),
        (b'{"outputs": "runs/a"}\n{"a": 1}\n\xff\n', {"outputs": "runs/a"}),
        (b'["outputs"]\n' + b"[" * 100_000, None),
        (b"", None),
    ],
)
def test_summary_is_found_among_other_output(output: bytes, summary: dict[str, Any] | None) -> None:
    assert _parse_summary(output) == summary


@pytest.mark.parametrize(
    ("program", "log", "kind", "code", "text"),
    [
        ("exit(2)", "sparse: a.toml: no stage 'x'\n", UsageError, "ProcessRefused", "a.toml: no stage 'x'"),
        ("exit(1)", "boom\n", SparseError, "ProcessEnded", "stage x ended with status 1: boom (its log: {log})"),
        ("exit(2)", "", SparseError, "ProcessEnded", "stage x ended with status 2: no output (its log: {log})"),
        (
            "import os; os.kill(os.getpid(), 9)",
            "",
            SparseError,
            "ProcessEnded",
            "stage x ended with signal 9: no output (its log: {log})",
        ),
    ],
)
def test_error_of_a_process_that_exited_too_early(
    tmp_path: Path, program: str, log: str, kind: type, code: str, text: str
) -> None:
    child = ChildProcess("stage x", (), tmp_path / "x.log")
    child.log_file.write_text(log)
    child._process = subprocess.Popen([sys.executable, "-c", program])
    child.process.wait()
    error = _exit_error(child)
    assert (type(error), error.code, str(error)) == (kind, code, text.format(log=child.log_file))
