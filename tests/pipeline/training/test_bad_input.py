"""Mistakes in training pipelines: one line, the right exit status, and checkpoints that stay as they are.

The messages are tested where they are raised: tests/unit/brokers/config/test_pipeline_file.py,
tests/unit/stages/training and tests/contract/stages/test_training_errors.py. Here one of each kind shows that it
reaches the user of `sparse run`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from brokers.server.local_broker import LocalBroker
from tests.soak.harness.training_run import STAGES, TrainingRunCommand, write_training_pipeline_file
from tests.support.pipelines.processes import ProcessSandbox, eventually, process_sandbox


def error_line(sandbox: ProcessSandbox, run: TrainingRunCommand, status: int) -> str:
    """Wait for the failure of a run; returns its last line, the only one of `sparse`."""
    result = run.command.wait()
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stderr
    for log in (run.folder / "logs").glob("*"):
        assert "Traceback" not in log.read_text()
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("sparse: ")]
    assert result.stderr.splitlines()[-1] == line
    sandbox.wait_until_nothing_left()
    return line.removeprefix("sparse: ")


def start_run(sandbox: ProcessSandbox, path: Path, resume: Path | None = None) -> TrainingRunCommand:
    return TrainingRunCommand(sandbox, path, "--broker", "embedded", resume=resume)


def test_bad_training_table(sandbox: ProcessSandbox) -> None:
    path = write_training_pipeline_file(sandbox.folder, epochs=1, schedule="2f2b")
    line = error_line(sandbox, start_run(sandbox, path), 2)
    assert line == f"{path}: training.schedule: expected '1f1b' or 'gpipe', got '2f2b'"


def test_bad_optimizer_is_reported_once(sandbox: ProcessSandbox) -> None:
    """Every stage fails with it."""
    path = write_training_pipeline_file(sandbox.folder, epochs=1, optimizer="sdg")
    assert error_line(sandbox, start_run(sandbox, path), 2).startswith(f"{path}: training.optimizer: 'sdg': expected ")


def test_checkpoint_folder_that_cannot_be_written_is_found_at_the_start(sandbox: ProcessSandbox) -> None:
    path = write_training_pipeline_file(sandbox.folder, epochs=1, checkpoints="training.toml/checkpoints")
    run = start_run(sandbox, path)
    line = error_line(sandbox, run, 2)
    assert line.startswith(f"{path}: training.checkpoints: checkpoints cannot be written to {path}/checkpoints/")
    assert ": Not a directory: name another folder" in line
    assert run.events() == []


def test_failed_step_names_stage_and_worker(sandbox: ProcessSandbox) -> None:
    path = write_training_pipeline_file(sandbox.folder, epochs=2, lr=3e37, checkpoint_every=1)
    line = error_line(sandbox, start_run(sandbox, path), 1)
    assert "failed at stage 'tail', worker 'tail-1': NotFinite: the loss is nan in step " in line
    assert "try a lower learning rate" in line


# Runs that are resumed ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", name="finished_run")
def _finished_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("finished")
    with process_sandbox(folder) as sandbox:
        run = start_run(sandbox, write_training_pipeline_file(folder, epochs=2))
        assert run.wait()["steps"] == 6
        yield run.folder


@pytest.fixture(name="copied_run")
def _copied_run(finished_run: Path, sandbox: ProcessSandbox) -> Path:
    shutil.copytree(finished_run, sandbox.folder / "run")
    return sandbox.folder / "run"


def read_checkpoints(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in (folder / "checkpoints").rglob("*.safetensors")}


def test_run_cannot_resume_with_other_settings(sandbox: ProcessSandbox, copied_run: Path) -> None:
    checkpoints = read_checkpoints(copied_run)
    path = write_training_pipeline_file(sandbox.folder, epochs=2, batch=16)
    line = error_line(sandbox, start_run(sandbox, path, resume=copied_run), 2)
    assert line.endswith("cannot resume, the run began with other settings: batch was 32, is 16")
    assert read_checkpoints(copied_run) == checkpoints


def test_checkpoints_of_another_optimizer_are_refused(sandbox: ProcessSandbox, copied_run: Path) -> None:
    checkpoints = read_checkpoints(copied_run)
    assert len(checkpoints) == len(STAGES)
    path = write_training_pipeline_file(sandbox.folder, epochs=2, optimizer="adam")
    path.write_text(path.read_text().replace("settings = {momentum = 0.9}\n", ""))
    line = error_line(sandbox, start_run(sandbox, path, resume=copied_run), 2)
    assert line.startswith(f"{path}: training.checkpoints: {copied_run}/checkpoints/")
    assert read_checkpoints(copied_run) == checkpoints


def test_folder_without_checkpoints_cannot_be_resumed(sandbox: ProcessSandbox) -> None:
    folder = sandbox.folder / "run"
    folder.mkdir()
    path = write_training_pipeline_file(sandbox.folder, epochs=2)
    line = error_line(sandbox, start_run(sandbox, path, resume=folder), 2)
    assert "expected the folder of a training run" in line


def test_second_source_of_one_name_is_refused(sandbox: ProcessSandbox, embedded_broker: LocalBroker) -> None:
    path = write_training_pipeline_file(sandbox.folder, epochs=10_000)
    broker = ("--broker", embedded_broker.address)
    for name in STAGES:
        sandbox.start_sparse("stage", path, name, *broker, "--checkpoints", sandbox.folder / "checkpoints")
    first = sandbox.start_sparse("source", path, *broker, "--out", sandbox.folder / "first")
    events = sandbox.folder / "first" / "training.jsonl"
    eventually("a step", lambda: events.exists() and '"step"' in events.read_text())
    second = sandbox.run_sparse("source", path, *broker, "--out", sandbox.folder / "second")
    assert second.returncode == 2
    (line,) = [line for line in second.stderr.splitlines() if line.startswith("sparse: ")]
    assert "a source 'stripes' trains this pipeline: stop it, or choose another name with --name" in line
    assert not first.has_exited
