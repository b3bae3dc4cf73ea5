"""Wherever the parts of a network are, and whichever way its labels go: it learns the same, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest

from tests.soak.harness.training_run import (
    TrainingRunCommand,
    assert_weights_equal,
    expected_weights,
    write_training_pipeline_file,
)
from tests.support.pipelines.processes import ProcessSandbox

SUITES: dict[str, dict[str, Any]] = {
    "on-device": {"sites": ("device", "cloudlet", "cloud"), "schedule": "gpipe"},
    "U-shaped": {"sites": ("device", "cloud", "device"), "labels": "stay"},
}


@pytest.mark.parametrize("suite", SUITES)
def test_the_suites_learn_what_the_uncut_network_learns(sandbox: ProcessSandbox, suite: str) -> None:
    lesson = TrainingRunCommand(sandbox, write_training_pipeline_file(sandbox.folder, epochs=4, **SUITES[suite]))
    summary = lesson.wait()
    assert (summary["steps"], summary["rolled_back"]) == (12, 0)
    assert_weights_equal(lesson.load_weights(), expected_weights(12))
    sandbox.assert_nothing_left()
