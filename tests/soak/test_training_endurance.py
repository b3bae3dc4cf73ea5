"""Hundreds of steps leave nothing behind; and what is learned is what the uncut network learns: real digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from brokers.config.pipeline_file import load_pipeline
from sources.datasets.batches import Batches, split_micro_batches
from sources.datasets.digits import Digits
from sources.training.lr_schedule import learning_rate
from stages.models.registry import get_model_spec
from tests.soak.conftest import PrintLine
from tests.soak.harness.resource_usage import MIB, ResourceWatcher
from tests.soak.harness.training_run import (
    STAGES,
    TrainingRunCommand,
    assert_weights_equal,
    expected_weights,
    write_training_pipeline_file,
)
from tests.support.environment.checkout import ROOT
from tests.support.pipelines.processes import ProcessSandbox
from tests.support.training.training_network import MODEL

STEPS, SHORT_STEPS = 501, 150
# One forward that is kept of each step would be a hundred MiB in the long form. Seen: 0.3.
GROWTH_BYTES = 8 * MIB


def test_five_hundred_steps_leave_nothing_behind(
    sandbox: ProcessSandbox, is_long_run: bool, print_line: PrintLine
) -> None:
    steps = STEPS if is_long_run else SHORT_STEPS
    path = write_training_pipeline_file(sandbox.folder, epochs=steps // 3, checkpoint_every=50, evaluate_every=20)
    lesson = TrainingRunCommand(sandbox, path)
    lesson.wait_for_step(20)
    processes = {name: lesson.find_process("stage", "--worker", f"{name}-1").pid for name in STAGES}
    with ResourceWatcher({**processes, "source": lesson.find_process("source").pid}, 0.05) as watch:
        lesson.wait_for_step(steps - 10)  # then it joins the weights, and leaves
    assert lesson.wait()["steps"] == steps
    assert_weights_equal(lesson.load_weights(), expected_weights(steps))
    assert len(list((lesson.folder / "checkpoints" / "head").iterdir())) == 2
    for trend in watch.trends(0.2):
        print_line(str(trend))
        assert trend.growth_bytes < GROWTH_BYTES, trend
        assert trend.file_descriptors[-1] <= trend.file_descriptors[0] + 1, trend
        assert trend.threads[-1] <= trend.threads[0] + 1, trend


def digits_file(folder: Path, is_long_run: bool) -> Path:
    """The example of the README; in the short form with a small network, which learns digits in seconds."""
    text = (ROOT / "examples" / "digits.toml").read_text()
    if not is_long_run:
        text = text.replace('"vgg11-small"', f'"{MODEL.replace("small", "reader")}"').replace("[6, 11]", "[3, 7]")
        text = text.replace("lr = 0.02", "lr = 0.1")
    path = folder / "digits.toml"
    path.write_text(text)
    return path


@pytest.mark.timeout(1200)
def test_digits_are_read_as_well_as_the_uncut_network_reads_them(
    sandbox: ProcessSandbox, is_long_run: bool, print_line: PrintLine
) -> None:
    path = digits_file(sandbox.folder, is_long_run)
    lesson = TrainingRunCommand(sandbox, path)
    summary = lesson.wait(timeout_s=1100)
    tested = [event for event in lesson.events() if event["event"] == "evaluation"]
    wanted = read_plainly(path)
    assert tested[-1]["accuracy"] == wanted
    assert wanted >= 0.97
    print_line(
        f"{summary['steps']} steps, {summary['throughput_per_s']:.0f} rows/s, test accuracy {wanted:.4f}, as uncut"
    )


def read_plainly(path: Path) -> float:
    """The accuracy on the test digits of the uncut network, trained by plain torch."""
    pipeline = load_pipeline(path)
    table, digits = pipeline.training, Digits()
    spec: Any = get_model_spec(pipeline.pipeline.model or "", folder=str(ROOT))
    torch.set_num_threads(1)
    torch.manual_seed(pipeline.pipeline.seed)
    model = spec.build().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=table.lr, **table.settings)
    batches = Batches(digits.train(), table.batch, pipeline.pipeline.seed)

    def fitted(pictures: Any) -> torch.Tensor:
        tensor = torch.from_numpy(pictures)
        return spec.normalise(tensor) if spec.normalise else tensor

    for step in range(table.epochs * batches.steps_per_epoch):
        inputs, labels = batches.batch(step)
        for some, theirs in split_micro_batches(inputs, labels, table.micro_batches):
            loss = nn.functional.cross_entropy(model(fitted(some)), torch.from_numpy(theirs))
            torch.autograd.backward([loss * (len(theirs) / len(labels))])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(table, step, batches.steps_per_epoch)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    test = Batches(digits.test(), table.batch, shuffle=False)
    right = 0
    with torch.no_grad():
        for index in range(test.steps_per_epoch):
            inputs, labels = test.batch(index)
            right += int((model(fitted(inputs)).argmax(1).numpy() == labels).sum())
    return right / len(digits.test())
