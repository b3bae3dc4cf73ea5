"""Mistakes on the command line and in files: exit status 2, and one line with the place and the reason.

All messages of pipeline files, executors, models and sources are tested in tests/unit, next to the code that raises
them. Here one of each kind shows that it reaches the user, also from the processes that `sparse run` starts.
"""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.support.environment.external_programs import require_broker
from tests.support.pipelines.pipeline_files import counting_source_table, stage_table, write_pipeline_file
from tests.support.pipelines.processes import ProcessSandbox

STAGES = [stage_table("double", "double")]
PARTS = [{"name": "head"}, {"name": "tail"}]
TINY_NETWORK = "tests.support.training.factories:tiny_network"
UNREACHABLE = "mqtt://127.0.0.1:9"
# A run prints its progress while its stages start, on a busy machine.
PROGRESS = re.compile(r"^ *\d+\.\d s  starting  .*\n", re.MULTILINE)


def error_line(sandbox: ProcessSandbox, *arguments: str | Path, environment: dict[str, str] | None = None) -> str:
    """Run a command that fails with status 2, and return the one line that it prints."""
    result = sandbox.run_sparse(*arguments, environment=environment)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    text = PROGRESS.sub("", result.stderr)
    assert text.startswith("sparse: ")
    assert text.count("\n") == 1, result.stderr
    sandbox.wait_until_nothing_left()
    return text.removeprefix("sparse: ").rstrip("\n")


def run_error_line(sandbox: ProcessSandbox, path: Path, *options: str) -> str:
    require_broker("embedded")
    return error_line(sandbox, "run", path, "--broker", "embedded", "--json", "--out", sandbox.folder / "out", *options)


# Files ----------------------------------------------------------------------------------------------------------------


def test_missing_file(sandbox: ProcessSandbox) -> None:
    assert run_error_line(sandbox, sandbox.folder / "no.toml") == f"{sandbox.folder}/no.toml: no such file"


def test_unknown_key(sandbox: ProcessSandbox) -> None:
    path = write_pipeline_file(sandbox.folder, [stage_table("double", "double", max_bach=4)])
    line = run_error_line(sandbox, path)
    assert line.startswith(f"{path}: ")
    assert "max_bach: unknown key (did you mean 'max_batch'?)" in line


@pytest.mark.parametrize(
    ("stages", "pipeline", "key", "value"),
    [
        ([*STAGES, {"name": "mine", "executor": "my_stages:smooth"}], {}, "stage.executor", "'my_stages:smooth'"),
        (PARTS, {"model": TINY_NETWORK, "cuts": [9]}, "pipeline.cuts", "cut 9 does not exist"),
    ],
    ids=["executor", "cut"],
)
def test_error_of_a_stage_is_that_of_the_run(
    sandbox: ProcessSandbox, stages: list[dict[str, Any]], pipeline: dict[str, Any], key: str, value: str
) -> None:
    path = write_pipeline_file(sandbox.folder, stages, counting_source_table(1), **pipeline)
    line = run_error_line(sandbox, path)
    assert line.startswith(f"{path}: {key}: ")
    assert value in line


def test_error_of_the_source_is_that_of_the_run(sandbox: ProcessSandbox) -> None:
    path = write_pipeline_file(sandbox.folder, STAGES, {"kind": "vidio"})
    assert run_error_line(sandbox, path).startswith(f"{path}: source.kind: source kind 'vidio': expected one of video")


def test_unwritable_output_folder(sandbox: ProcessSandbox) -> None:
    require_broker("embedded")
    path = write_pipeline_file(sandbox.folder, STAGES, counting_source_table(1))
    line = error_line(sandbox, "run", path, "--broker", "embedded", "--out", "/dev/null/out")
    assert line.startswith("/dev/null/out: ")
    assert line.endswith("Not a directory")


def test_crash_of_a_stage_at_its_start_is_status_1(sandbox: ProcessSandbox) -> None:
    require_broker("embedded")
    path = write_pipeline_file(sandbox.folder, [stage_table("bad", "FailingStartExecutor")], counting_source_table(1))
    out = sandbox.folder / "out"
    result = sandbox.run_sparse("run", path, "--broker", "embedded", "--out", out)
    assert result.returncode == 1
    line = f"sparse: stage bad ended with status 1: the file is not there (its log: {out}/logs/bad-1.log)\n"
    assert result.stderr.endswith(line)
    sandbox.assert_nothing_left()


# Models and weights ---------------------------------------------------------------------------------------------------


def test_unknown_model(sandbox: ProcessSandbox) -> None:
    path = write_pipeline_file(sandbox.folder, PARTS, model="yolov4-tiny", cuts=[3])
    line = error_line(sandbox, "stage", path, "head", "--broker", UNREACHABLE)
    assert line.startswith(f"{path}: pipeline.model: unknown model 'yolov4-tiny'")
    assert "yolov3-tiny" in line


def test_weights_that_do_not_fit(sandbox: ProcessSandbox) -> None:
    import torch
    from safetensors.torch import save_file

    from tests.support.training.factories import TinyNetwork

    weights = sandbox.folder / "tiny.safetensors"
    save_file({**TinyNetwork().state_dict(), "second.weight": torch.zeros(8, 9)}, weights)
    path = write_pipeline_file(sandbox.folder, PARTS, model=TINY_NETWORK, cuts=[2], weights=weights.name)
    line = error_line(sandbox, "stage", path, "head", "--broker", UNREACHABLE)
    assert line.startswith(f"{path}: pipeline.weights: {weights} ")
    assert "'second.weight' of shape [8, 8], the file has [8, 9]" in line


# Stages and brokers ---------------------------------------------------------------------------------------------------


def test_stage_that_the_file_does_not_have(sandbox: ProcessSandbox) -> None:
    path = write_pipeline_file(sandbox.folder, STAGES)
    line = error_line(sandbox, "stage", path, "duble", "--broker", UNREACHABLE)
    assert line.startswith(f"{path}: no stage 'duble' (did you mean 'double'?)")


def test_port_in_use(sandbox: ProcessSandbox) -> None:
    path = write_pipeline_file(sandbox.folder, STAGES, counting_source_table(1))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        line = run_error_line(sandbox, path, "--port", port)
        assert line.startswith(f"port {port} on 127.0.0.1 is taken")
        assert error_line(sandbox, "broker", "--port", port) == line


@pytest.mark.parametrize("command", ["run", "stage", "source", "status"])
def test_unreachable_broker(sandbox: ProcessSandbox, command: str) -> None:
    path = write_pipeline_file(sandbox.folder, STAGES, counting_source_table(1))
    arguments: dict[str, tuple[str | Path, ...]] = {
        "run": (path, "--out", sandbox.folder / "out"),
        "stage": (path, "double"),
        "source": (path, "--out", sandbox.folder / "out"),
        "status": (),
    }
    line = error_line(sandbox, command, *arguments[command], "--broker", UNREACHABLE)
    assert line.startswith(f"no MQTT 5 broker at {UNREACHABLE}: connection refused")
    assert "sparse broker" in line


@pytest.mark.parametrize("command", ["stage", "source", "status", "monitor"])
def test_missing_broker_address(sandbox: ProcessSandbox, command: str) -> None:
    path = write_pipeline_file(sandbox.folder, STAGES, counting_source_table(1))
    line = error_line(sandbox, command, path, *(["double"] if command == "stage" else []))
    assert line.startswith(f"{path}: no broker address for site 'local': pass --broker mqtt://HOST:PORT")


def test_broker_of_the_environment_is_shown_without_its_password(sandbox: ProcessSandbox) -> None:
    line = error_line(sandbox, "status", environment={"SPARSE_BROKER": "mqtt://me:secret@127.0.0.1:9"})
    assert line.startswith("no MQTT 5 broker at mqtt://me@127.0.0.1:9: connection refused")
