"""Mistakes in training: each is one clear line and the right exit status, and nothing that was learned is lost."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from brokers.server.local_broker import LocalBroker
from tests.support.environment.external_programs import require_dependency
from tests.support.pipelines.pipeline_files import stage_table, write_pipeline_file
from tests.support.pipelines.processes import CommandResult, ProcessSandbox, RunningCommand, eventually, process_sandbox

STAGES = ("head", "tail")
PARTS = tuple(stage_table(name) for name in STAGES)
SOURCE = {"kind": "tests.support.training.striped_images:StripedImages", "name": "stripes"}


def write_training_pipeline_file(
    folder: Path,
    *,
    stages: Sequence[Mapping[str, Any]] = PARTS,
    source: Mapping[str, Any] = SOURCE,
    pipeline: Mapping[str, Any] | None = None,
    name: str = "lesson",
    **training: Any,
) -> Path:
    """A pipeline file of two stages, 3 steps an epoch."""
    fields = {
        "kind": "training",
        "model": "tests.support.training.training_network:small_network",
        "cuts": [4],
        "seed": 5,
        **(pipeline or {}),
    }
    path = write_pipeline_file(folder, stages, source, name=name, **fields)
    table = {"epochs": 2, "batch": 32, "micro_batches": 2, "evaluate_every": 0, **training}
    settings = table.pop("settings", None)
    lines = [f"{key} = {json.dumps(value)}" for key, value in table.items()]
    if settings is not None:
        lines.append(
            "settings = {" + ", ".join(f"{key} = {json.dumps(value)}" for key, value in settings.items()) + "}"
        )
    path.write_text(path.read_text() + "\n[training]\n" + "\n".join(lines) + "\n")
    return path


def start(sandbox: ProcessSandbox, path: Path, *words: str | Path, out: str = "out") -> RunningCommand:
    require_dependency("iotcore")
    return sandbox.start_sparse(
        "run", path, "--broker", "embedded", "--json", "--no-pictures", "--out", sandbox.folder / out, *words
    )


def resume(sandbox: ProcessSandbox, path: Path, out: str = "out") -> RunningCommand:
    return sandbox.start_sparse(
        "run", path, "--broker", "embedded", "--json", "--no-pictures", "--resume", sandbox.folder / out
    )


def told(sandbox: ProcessSandbox, said: CommandResult, status: int) -> str:
    """The one line that says what is wrong, after whatever the run has told of its stages."""
    assert said.returncode == status, said.stderr
    assert "Traceback" not in said.stderr
    lines = [line for line in said.stderr.splitlines() if line.startswith("sparse: ")]
    assert len(lines) == 1, said.stderr
    assert said.stderr.splitlines()[-1] == lines[0]
    sandbox.wait_until_nothing_left()
    return lines[0].removeprefix("sparse: ")


def refused(sandbox: ProcessSandbox, path: Path, *words: str) -> str:
    """What `sparse run` says of a file that cannot be; status 2, and nothing else is said."""
    said = start(sandbox, path, *words).wait()
    assert said.stdout == ""
    return told(sandbox, said, 2)


def versions(folder: Path, name: str) -> list[int]:
    return sorted(int(path.stem.rpartition("-")[2]) for path in (folder / "checkpoints" / name).glob("*.safetensors"))


def no_traceback(folder: Path) -> None:
    """In no log of the run either."""
    for path in (folder / "logs").iterdir():
        assert "Traceback" not in path.read_text(), path.read_text()


# The pipeline file ----------------------------------------------------------------------------------------------------

FILES: dict[str, tuple[dict[str, Any], str]] = {
    "more micro-batches than rows": (
        {"batch": 3, "micro_batches": 4},
        "training: micro_batches: a batch of 3 rows makes no 4 micro-batches",
    ),
    "labels that stay, with the last stage elsewhere": (
        {
            "labels": "stay",
            "stages": [stage_table("head"), stage_table("tail", site="cloud")],
            "source": {**SOURCE, "site": "device"},
        },
        "training.labels: to stay, they need stage 'tail' at the source's site 'device', it is at 'cloud'",
    ),
    "a stage of one's own": (
        {"stages": [stage_table("head"), stage_table("tail"), stage_table("more", "double")]},
        "stage 'more': a pipeline that trains has parts of its model only, no executor",
    ),
    "a training table in an inference pipeline": (
        {"pipeline": {"kind": "inference"}},
        "training: is for a pipeline whose kind is 'training', this one's is 'inference'",
    ),
    "a half precision wire": (
        {"stages": [stage_table("head", wire="float16"), stage_table("tail")]},
        "stage 'head': training is exact: wire is 'float32' and max_batch 1, or left out",
    ),
    "a schedule that there is not": ({"schedule": "2f2b"}, "training.schedule: expected '1f1b' or 'gpipe', got '2f2b'"),
}


_SITES = """
[[site]]
name = "local"
links = [{ to = "cloud" }, { to = "device" }]

[[site]]
name = "cloud"

[[site]]
name = "device"
"""


@pytest.mark.parametrize("case", FILES)
def test_what_the_file_says(sandbox: ProcessSandbox, case: str) -> None:
    given, expected = FILES[case]
    path = write_training_pipeline_file(sandbox.folder, **given)
    if "site" in str(given):
        path.write_text(path.read_text() + _SITES)
    assert refused(sandbox, path) == f"{path}: {expected}"


# What it names --------------------------------------------------------------------------------------------------------

NAMES: dict[str, tuple[dict[str, Any], str]] = {
    "an optimizer that there is not": (
        {"optimizer": "sdg"},
        "training.optimizer: 'sdg': expected sgd, adam, adamw or package.module:NAME",
    ),
    "a loss that there is not": (
        {"loss": "cross-entropy"},
        "training.loss: 'cross-entropy': expected cross_entropy, mse or package.module:NAME",
    ),
    "a setting that the optimizer does not take": (
        {"settings": {"momentun": 0.9}},
        "training.settings: 'sgd': ",
    ),
    "a value that the optimizer does not take": (
        {"settings": {"momentum": -1.0}},
        "training.settings: 'sgd': ValueError: Invalid momentum value: -1.0",
    ),
    "a loss that is not to be called": (
        {"loss": "tests.support.training.striped_images:CLASSES"},
        "training.loss: 'tests.support.training.striped_images:CLASSES': expected a callable, found int",
    ),
    "an optimizer that is none": (
        {"optimizer": "tests.support.training.training_network:small_network"},
        "training.settings: 'tests.support.training.training_network:small_network': ",
    ),
    "a cut that there is not": ({"pipeline": {"cuts": [99]}}, "pipeline.cuts: cut 99 does not exist"),
}


@pytest.mark.parametrize("case", NAMES)
def test_what_the_file_names(sandbox: ProcessSandbox, embedded_broker: LocalBroker, case: str) -> None:
    """Every stage says so."""
    given, expected = NAMES[case]
    path = write_training_pipeline_file(sandbox.folder, **given)
    said = sandbox.start_sparse(
        "stage", path, "head", "--broker", embedded_broker.address, "--checkpoints", sandbox.folder / "kept"
    ).wait()
    assert said.stdout == ""
    assert told(sandbox, said, 2).startswith(f"{path}: {expected}")


def test_what_its_stages_say_of_the_file_is_said_once_by_the_run(sandbox: ProcessSandbox) -> None:
    given, expected = NAMES["a setting that the optimizer does not take"]
    path = write_training_pipeline_file(sandbox.folder, **given)
    assert refused(sandbox, path).startswith(f"{path}: {expected}")


def test_a_data_set_that_there_is_not(sandbox: ProcessSandbox) -> None:
    path = write_training_pipeline_file(sandbox.folder, source={"kind": "digitz", "name": "digits"})
    assert "source.kind" in refused(sandbox, path)


# While it trains ------------------------------------------------------------------------------------------------------


def test_labels_that_the_network_has_no_class_for(sandbox: ProcessSandbox) -> None:
    path = write_training_pipeline_file(
        sandbox.folder, source={"kind": "tests.support.training.striped_images:ExtraClassImages", "name": "stripes"}
    )
    line = told(sandbox, start(sandbox, path).wait(), 1)
    assert "step 0 failed at stage 'tail', worker 'tail-1': BadLabels: label " in line
    assert "is out of range: the network has 4 classes" in line
    no_traceback(sandbox.folder / "out")


def test_a_loss_that_is_no_number_says_where_and_what_to_try_and_the_last_checkpoint_stays(
    sandbox: ProcessSandbox,
) -> None:
    path = write_training_pipeline_file(sandbox.folder, lr=3e37, checkpoint_every=1)
    line = told(sandbox, start(sandbox, path).wait(), 1)
    assert "failed at stage 'tail', worker 'tail-1': NotFinite: the loss is nan in step " in line
    assert "try a lower learning rate" in line
    step = int(line.partition(" in step ")[2].split()[0])
    assert step >= 1
    for name in STAGES:
        kept = versions(sandbox.folder / "out", name)
        assert kept[-1] == step
        newest = sandbox.folder / "out" / "checkpoints" / name / f"version-{step:012d}.safetensors"
        assert all(bool(torch.isfinite(tensor).all()) for tensor in load_file(newest).values())
    no_traceback(sandbox.folder / "out")


def test_a_full_disk_while_checkpointing_says_so_and_the_run_goes_on_from_before_when_there_is_room(
    sandbox: ProcessSandbox,
) -> None:
    wide = {"model": "tests.support.training.residual_networks:wide_network", "cuts": [3]}
    out = sandbox.folder / "out"
    assert start(sandbox, write_training_pipeline_file(sandbox.folder, epochs=1, pipeline=wide)).wait().returncode == 0
    before = {name: versions(out, name) for name in STAGES}
    assert before == {"head": [3], "tail": [3]}
    path = write_training_pipeline_file(sandbox.folder, epochs=2, checkpoint_every=2, pipeline=wide)
    words = ("run", path, "--broker", "embedded", "--json", "--resume", out)
    # In blocks of 1024 bytes: too few for a checkpoint of the head, enough for all else that a run writes.
    limited = 'ulimit -f 300 && exec "$@"'
    said = sandbox.start("bash", "-c", limited, "bash", sys.executable, "-m", "brokers.cli", *words).wait()
    line = told(sandbox, said, 1)
    assert "step 3 failed at stage 'head', worker 'head-1': CannotCheckpoint: cannot write checkpoint " in line
    assert "the earlier checkpoints are intact" in line
    assert [path.name for path in (out / "checkpoints" / "head").iterdir()] == ["version-000000000003.safetensors"]
    no_traceback(out)
    again = resume(sandbox, path).wait()
    assert again.returncode == 0, again.stderr
    assert again.json_output["steps"] == 6
    assert [versions(out, name)[-1] for name in STAGES] == [6, 6]


# Going on with a run --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", name="trained")
def _trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that is done."""
    folder = tmp_path_factory.mktemp("trained")
    with process_sandbox(folder) as sandbox:
        said = start(sandbox, write_training_pipeline_file(folder)).wait()
        assert said.returncode == 0, said.stderr
        assert said.json_output["steps"] == 6
    return folder / "out"


@pytest.fixture(name="copy")
def _copy(trained: Path, sandbox: ProcessSandbox) -> Path:
    shutil.copytree(trained, sandbox.folder / "out")
    return sandbox.folder / "out"


def test_a_run_with_other_settings_is_not_gone_on_with(sandbox: ProcessSandbox, copy: Path) -> None:
    path = write_training_pipeline_file(sandbox.folder, lr=0.01, batch=16)
    line = told(sandbox, resume(sandbox, path).wait(), 2)
    assert line.endswith("cannot resume, the run began with other settings: batch was 32, is 16; lr was 0.05, is 0.01")
    assert [versions(copy, name) for name in STAGES] == [[6], [6]]


@pytest.mark.parametrize(
    "change",
    [
        {"pipeline": {"cuts": [5]}},
        {"pipeline": {"model": "tests.support.training.residual_networks:dropout_network"}},
        {"optimizer": "adam"},
    ],
    ids=["cut", "model", "optimizer"],
)
def test_checkpoints_of_another_cut_model_or_optimizer_are_refused_and_stay(
    sandbox: ProcessSandbox, copy: Path, change: dict[str, Any]
) -> None:
    before = {path: path.read_bytes() for path in (copy / "checkpoints").rglob("*.safetensors")}
    path = write_training_pipeline_file(sandbox.folder, **change)
    line = told(sandbox, resume(sandbox, path).wait(), 2)
    assert line.startswith(f"{path}: training.checkpoints: {copy}/checkpoints/")
    assert "is no checkpoint of this stage: expected the part " in line
    assert line.endswith("another model, cut or recipe; name another folder, or move it away")
    assert {path: path.read_bytes() for path in (copy / "checkpoints").rglob("*.safetensors")} == before


def test_a_checkpoint_that_was_cut_off_is_refused_by_its_name(sandbox: ProcessSandbox, copy: Path) -> None:
    (newest,) = (copy / "checkpoints" / "tail").glob("*.safetensors")
    newest.write_bytes(newest.read_bytes()[:1000])
    line = told(sandbox, resume(sandbox, write_training_pipeline_file(sandbox.folder)).wait(), 2)
    assert f"{newest} is no checkpoint of this stage: it cannot be read" in line


def test_a_second_run_on_the_checkpoints_of_the_first_asks_for_resume(sandbox: ProcessSandbox, copy: Path) -> None:
    path = write_training_pipeline_file(sandbox.folder, checkpoints=str(copy / "checkpoints"))
    line = told(sandbox, start(sandbox, path, out="again").wait(), 2)
    assert "source 'stripes' has trained 6 steps of this pipeline already: continue with --resume" in line


def test_a_folder_that_is_no_run_cannot_be_gone_on_with(sandbox: ProcessSandbox) -> None:
    (sandbox.folder / "out").mkdir()
    line = told(sandbox, resume(sandbox, write_training_pipeline_file(sandbox.folder)).wait(), 2)
    assert "there is no checkpoints/ in it: expected the folder of a training run" in line


# Each by itself -------------------------------------------------------------------------------------------------------


def test_a_second_source_of_the_same_name_is_refused_while_the_first_trains(
    sandbox: ProcessSandbox, embedded_broker: LocalBroker
) -> None:
    path = write_training_pipeline_file(sandbox.folder, epochs=10_000, name="duplicates")
    broker = ("--broker", embedded_broker.address)
    for name in STAGES:
        sandbox.start_sparse("stage", path, name, *broker, "--checkpoints", sandbox.folder / "versions")
    first = sandbox.start_sparse("source", path, *broker, "--out", sandbox.folder / "first")
    record = sandbox.folder / "first" / "training.jsonl"
    eventually("a step", lambda: record.exists() and '"step"' in record.read_text())
    said = sandbox.start_sparse("source", path, *broker, "--out", sandbox.folder / "second").wait()
    assert said.returncode == 2
    (line,) = [line for line in said.stderr.splitlines() if line.startswith("sparse: ")]
    assert "a source 'stripes' trains this pipeline: stop it, or choose another name with --name" in line
    assert first.process.poll() is None
