"""Hundreds of training steps leave nothing behind, and the trained network is as accurate as the unsplit one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from brokers.config.pipeline_file import load_pipeline
from sources.datasets.bundled import Digits
from sources.datasets.dataset import Batches, split_micro_batches
from sources.training.run_settings import learning_rate
from stages.models.registry import get_model_spec
from tests.soak.conftest import PrintLine, sizes
from tests.soak.harness.resource_usage import MIB, ResourceRecorder
from tests.soak.harness.training_run import (
    STAGES,
    STEPS_PER_EPOCH,
    TrainingRunCommand,
    assert_weights_equal,
    expected_weights,
    write_training_pipeline_file,
)
from tests.support.environment.checkout import ROOT
from tests.support.pipelines.processes import ProcessSandbox

# Kept forward activations of one micro-batch a step would be a hundred MiB in 500 steps.
GROWTH_LIMIT_BYTES = 8 * MIB
EXAMPLE = ROOT / "examples" / "digits.toml"


@pytest.mark.parametrize("steps", sizes(120, 501))
@pytest.mark.timeout(3600)
def test_training_steps_leave_nothing_behind(
    sandbox: ProcessSandbox, steps: int, soak_factor: int, print_line: PrintLine
) -> None:
    steps *= soak_factor
    path = write_training_pipeline_file(
        sandbox.folder, epochs=steps // STEPS_PER_EPOCH, checkpoint_every=50, evaluate_every=20
    )
    run = TrainingRunCommand(sandbox, path)
    run.wait_for_step(steps // 6)
    pids = {name: run.find_process("stage", "--worker", f"{name}-1").pid for name in STAGES}
    recorder = ResourceRecorder({**pids, "source": run.find_process("source").pid})
    # The end is left out: the source then fetches the weights of all stages.
    for step in range(steps // 6, steps - 10, 3):
        run.wait_for_step(step)
        recorder.sample()
    assert run.wait()["steps"] == steps
    assert_weights_equal(run.load_weights(), expected_weights(steps))
    assert len(list((run.folder / "checkpoints" / "head").iterdir())) == 2
    for trend in recorder.trends():
        print_line(str(trend))
        trend.assert_bounded(GROWTH_LIMIT_BYTES, extra=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_trained_network_is_as_accurate_as_the_unsplit_one(sandbox: ProcessSandbox, print_line: PrintLine) -> None:
    """tests/pipeline/training/test_suites.py compares the weights of a small network, bit by bit."""
    path = sandbox.folder / "digits.toml"
    path.write_text(EXAMPLE.read_text())
    run = TrainingRunCommand(sandbox, path)
    summary = run.wait(timeout_s=1700)
    accuracy = unsplit_accuracy(path)
    assert run.events("evaluation")[-1]["accuracy"] == accuracy
    assert accuracy >= 0.97
    print_line(f"{summary['steps']} steps, {summary['throughput_per_s']:.0f} rows/s, test accuracy {accuracy:.4f}")


def unsplit_accuracy(path: Path) -> float:
    """The accuracy on the test digits of the unsplit network, trained by plain PyTorch."""
    pipeline = load_pipeline(path)
    table = pipeline.training
    digits = Digits()
    spec: Any = get_model_spec(pipeline.pipeline.model or "", folder=str(ROOT))
    torch.set_num_threads(1)
    torch.manual_seed(pipeline.pipeline.seed)
    model = spec.build().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=table.lr, **table.settings)
    batches = Batches(digits.train(), table.batch, pipeline.pipeline.seed)

    def preprocess(images: Any) -> torch.Tensor:
        tensor = torch.from_numpy(images)
        return spec.normalise(tensor) if spec.normalise else tensor

    for step in range(table.epochs * batches.steps_per_epoch):
        inputs, labels = batches.batch(step)
        for micro_inputs, micro_labels in split_micro_batches(inputs, labels, table.micro_batches):
            loss = nn.functional.cross_entropy(model(preprocess(micro_inputs)), torch.from_numpy(micro_labels))
            torch.autograd.backward([loss * (len(micro_labels) / len(labels))])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(table, step, batches.steps_per_epoch)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    test = Batches(digits.test(), table.batch, shuffle=False)
    correct = 0
    with torch.no_grad():
        for index in range(test.steps_per_epoch):
            inputs, labels = test.batch(index)
            correct += int((model(preprocess(inputs)).argmax(1).numpy() == labels).sum())
    return correct / len(digits.test())
