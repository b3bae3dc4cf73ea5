"""Training at several sites, with labels that stay or travel: the weights are those of the uncut network."""

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

DEPLOYMENTS: dict[str, dict[str, Any]] = {
    "on-device": {"sites": ("device", "cloudlet", "cloud"), "schedule": "gpipe"},
    "U-shaped": {"sites": ("device", "cloud", "device"), "labels": "stay"},
}


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
def test_weights_equal_those_of_the_uncut_network(sandbox: ProcessSandbox, deployment: str) -> None:
    path = write_training_pipeline_file(sandbox.folder, epochs=4, **DEPLOYMENTS[deployment])
    run = TrainingRunCommand(sandbox, path)
    summary = run.wait()
    assert (summary["steps"], summary["rollbacks"]) == (12, 0)
    assert_weights_equal(run.load_weights(), expected_weights(12))
    sandbox.assert_nothing_left()
