"""Mistakes on the command line and in files: exit status 2, and one line with what, where, and what was expected."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from brokers.server.local_broker import LocalBroker
from tests.support.environment.external_programs import require_dependency
from tests.support.pipelines.pipeline_files import counting_source_table, stage_table, write_pipeline_file
from tests.support.pipelines.processes import ProcessSandbox, process_sandbox

NUMBERS = [stage_table("double", "double")]
PARTS = [{"name": "head"}, {"name": "tail"}]
TINY = "tests.support.training.factories:tiny_network"
# What a run says every other second while its stages have not answered: on a busy machine one may take that long.
WAITS = re.compile(r"^ *\d+\.\d s  starting  .*\n", re.MULTILINE)


def one_line(sandbox: ProcessSandbox, *words: str | Path) -> str:
    """What `sparse` says of a mistake; nothing else is said, and nothing is left."""
    said = sandbox.start_sparse(*words).wait()
    assert said.returncode == 2, said.stderr
    assert said.stdout == ""
    told = WAITS.sub("", said.stderr)
    assert told.startswith("sparse: ")
    assert told.count("\n") == 1, said.stderr
    assert "Traceback" not in said.stderr
    sandbox.wait_until_nothing_left()
    return told.removeprefix("sparse: ").rstrip("\n")


def run(sandbox: ProcessSandbox, path: Path, *words: str) -> str:
    """What `sparse run` says of this file, started with the broker that needs no installation."""
    require_dependency("iotcore")
    return one_line(sandbox, "run", path, "--broker", "embedded", "--json", "--out", sandbox.folder / "out", *words)


# The pipeline file ------------------------------------------------------------------------------------------------


def test_a_file_that_is_not_there(sandbox: ProcessSandbox) -> None:
    assert run(sandbox, sandbox.folder / "no.toml") == f"{sandbox.folder}/no.toml: no such file"


def test_a_folder_for_a_file(sandbox: ProcessSandbox) -> None:
    assert run(sandbox, sandbox.folder) == f"{sandbox.folder}: Is a directory"


def test_a_file_that_is_no_toml(sandbox: ProcessSandbox) -> None:
    path = sandbox.folder / "bad.toml"
    path.write_text("[pipeline\nname = 1")
    assert run(sandbox, path).startswith(f"{path}: not TOML: Expected ']' at the end of a table declaration (at line 1")


def test_a_file_that_is_no_text(sandbox: ProcessSandbox) -> None:
    path = sandbox.folder / "bad.toml"
    path.write_bytes(b"\xff\xfe\x00")
    assert run(sandbox, path) == f"{path}: not text: expected TOML in UTF-8"


# tests/unit/brokers/config/test_pipeline_file.py has them all; of each sort one, to see that it comes through.
CASES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "an unknown key": (
        lambda folder: write_pipeline_file(folder, [stage_table("double", "double", max_bach=4)]),
        "max_bach: unknown key (did you mean 'max_batch'?): expected one of name, workers, site, device,",
    ),
    "a value that cannot be": (
        lambda folder: write_pipeline_file(folder, [stage_table("double", "double", workers="two")]),
        "got 'two'",
    ),
    "tables that do not fit together": (
        lambda folder: write_pipeline_file(folder, PARTS, model=TINY, cuts=[1, 2, 3]),
        "pipeline.cuts: 3 cuts make 4 parts: expected as many stages without an executor, got 2",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_the_file_says(sandbox: ProcessSandbox, case: str) -> None:
    make, expected = CASES[case]
    path = make(sandbox.folder)
    said = run(sandbox, path)
    assert said.startswith(str(path))
    assert expected in said


# What it names ----------------------------------------------------------------------------------------------------


def test_an_executor_that_is_not_there(sandbox: ProcessSandbox) -> None:
    path = write_pipeline_file(
        sandbox.folder, [*NUMBERS, {"name": "mine", "executor": "my_stages:smooth"}], counting_source_table(1)
    )
    searched = f"searched in {sandbox.folder} and the installed packages"
    expected = f"executor 'my_stages:smooth': No module named 'my_stages' ({searched})"
    assert run(sandbox, path) == f"{path}: stage.executor: {expected}"


def test_an_executor_of_another_name(sandbox: ProcessSandbox) -> None:
    path = write_pipeline_file(sandbox.folder, [stage_table("double", "dubble")], counting_source_table(1))
    module = "tests.support.pipelines.example_code"
    expected = f"executor '{module}:dubble': module {module} has no dubble"
    assert run(sandbox, path) == f"{path}: stage.executor: {expected}"


def test_settings_that_an_executor_does_not_take(sandbox: ProcessSandbox) -> None:
    path = write_pipeline_file(
        sandbox.folder, [stage_table("slow", "SleepExecutor", settings={"second": 1})], counting_source_table(1)
    )
    said = run(sandbox, path)
    executor = "tests.support.pipelines.example_code:SleepExecutor"
    expected = f"executor '{executor}': its settings do not match its constructor: "
    assert said.startswith(f"{path}: stage.executor: {expected}")
    assert "'second'" in said


def test_a_source_that_is_not_there(sandbox: ProcessSandbox) -> None:
    path = write_pipeline_file(sandbox.folder, NUMBERS, {"kind": "video", "path": "no.mp4"})
    expected = f"{sandbox.folder}/no.mp4: no such file; expected a video file"
    assert run(sandbox, path) == f"{path}: source.path: {expected}"


def test_a_kind_of_source_that_there_is_not(sandbox: ProcessSandbox) -> None:
    path = write_pipeline_file(sandbox.folder, NUMBERS, {"kind": "vidio"})
    known = "video, images, camera, digits, cifar10, ingress, or a class as"
    assert run(sandbox, path).startswith(f"{path}: source.kind: source kind 'vidio': expected one of {known}")


def test_a_camera_that_is_not_there(sandbox: ProcessSandbox) -> None:
    path = write_pipeline_file(sandbox.folder, NUMBERS, {"kind": "camera", "device": "/dev/no-camera"})
    assert run(sandbox, path) == f"{path}: source.device: camera /dev/no-camera: No such file or directory"


def test_a_folder_that_cannot_be_made(sandbox: ProcessSandbox) -> None:
    require_dependency("iotcore")
    path = write_pipeline_file(sandbox.folder, NUMBERS, counting_source_table(1))
    said = one_line(sandbox, "run", path, "--broker", "embedded", "--out", "/dev/null/out")
    assert said == "/dev/null/out: the results cannot be written: Not a directory"


# Networks ---------------------------------------------------------------------------------------------------------


def stage_says(sandbox: ProcessSandbox, broker: LocalBroker, path: Path, name: str = "head") -> str:
    return one_line(sandbox, "stage", path, name, "--broker", broker.address)


def test_a_cut_that_does_not_exist_is_said_by_the_run(sandbox: ProcessSandbox) -> None:
    path = write_pipeline_file(sandbox.folder, PARTS, counting_source_table(1), model=TINY, cuts=[9])
    said = run(sandbox, path)
    expected = "cut 9 does not exist: the network has 5 layers and cuts 1 to 4; the nearest, 4, is"
    assert said.startswith(f"{path}: pipeline.cuts: {expected}")


def test_a_model_that_is_not_known(sandbox: ProcessSandbox, embedded_broker: LocalBroker) -> None:
    path = write_pipeline_file(sandbox.folder, PARTS, model="yolov4-tiny", cuts=[3])
    said = stage_says(sandbox, embedded_broker, path)
    assert said.startswith(f"{path}: pipeline.model: unknown model 'yolov4-tiny': did you mean ")
    assert "yolov3-tiny" in said
    assert "torchvision:NAME" in said


def test_weights_that_do_not_fit(sandbox: ProcessSandbox, embedded_broker: LocalBroker) -> None:
    import torch
    from safetensors.torch import save_file

    from tests.support.training.factories import TinyNetwork

    state = TinyNetwork().state_dict()
    save_file({**state, "second.weight": torch.zeros(8, 9)}, sandbox.folder / "tiny.safetensors")
    path = write_pipeline_file(sandbox.folder, PARTS, model=TINY, cuts=[2], weights="tiny.safetensors")
    problem = "does not fit the network: expected 'second.weight' of shape [8, 8], the file has [8, 9]"
    expected = f"{path}: pipeline.weights: {sandbox.folder}/tiny.safetensors {problem}"
    assert stage_says(sandbox, embedded_broker, path) == expected


def test_weights_that_are_none(sandbox: ProcessSandbox, embedded_broker: LocalBroker) -> None:
    (sandbox.folder / "tiny.safetensors").write_bytes(b"\xff" * 100)
    path = write_pipeline_file(sandbox.folder, PARTS, model=TINY, cuts=[2], weights="tiny.safetensors")
    expected = f"{path}: pipeline.weights: {sandbox.folder}/tiny.safetensors is not a safetensors file: "
    assert stage_says(sandbox, embedded_broker, path).startswith(expected)


def test_weights_whose_checksum_fails(tmp_path: Path, embedded_broker: LocalBroker) -> None:
    """The file in the cache is broken, and there is no way to fetch another: its address is out of reach."""
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "yolov3.weights").write_bytes(b"broken")
    environment = {"SPARSE_CACHE": str(cache), "https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
    with process_sandbox(tmp_path, environment) as sandbox:
        path = write_pipeline_file(tmp_path, PARTS, model="yolov3", cuts=[9], weights="yolov3")
        said = sandbox.start_sparse("stage", path, "head", "--broker", embedded_broker.address).wait()
    assert said.returncode == 2
    told = said.stderr.splitlines()[-1]
    assert "yolov3.weights" in told
    assert "the file there has another SHA-256" in told
    assert "Traceback" not in said.stderr


def test_a_network_that_cannot_be_cut(sandbox: ProcessSandbox, embedded_broker: LocalBroker) -> None:
    path = write_pipeline_file(
        sandbox.folder, PARTS, model="tests.support.training.factories:data_dependent_network", cuts=[1]
    )
    said = stage_says(sandbox, embedded_broker, path)
    assert "torch.fx cannot trace" in said
    assert "nn.Sequential" in said


# Brokers ----------------------------------------------------------------------------------------------------------


def test_a_port_that_is_taken(sandbox: ProcessSandbox) -> None:
    path = write_pipeline_file(sandbox.folder, NUMBERS, counting_source_table(1))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        expected = (
            f"port {port} on 127.0.0.1 is taken: stop the process that listens there, or choose another with --port"
        )
        assert run(sandbox, path, "--port", str(port)) == expected
        assert one_line(sandbox, "broker", "--port", str(port)) == expected


@pytest.mark.parametrize("command", ["run", "stage", "source", "status"])
def test_a_broker_that_is_out_of_reach(sandbox: ProcessSandbox, command: str) -> None:
    path = write_pipeline_file(sandbox.folder, NUMBERS, counting_source_table(1))
    words: dict[str, tuple[Any, ...]] = {
        "run": ("run", path, "--out", sandbox.folder / "out"),
        "stage": ("stage", path, "double"),
        "source": ("source", path, "--out", sandbox.folder / "out"),
        "status": ("status",),
    }
    said = one_line(sandbox, *words[command], "--broker", "mqtt://127.0.0.1:9")
    assert said.startswith("no MQTT 5 broker at mqtt://127.0.0.1:9: connection refused")
    assert "sparse broker" in said


@pytest.mark.parametrize("command", ["stage", "source", "status", "monitor"])
def test_a_broker_that_nobody_has_named(sandbox: ProcessSandbox, command: str) -> None:
    path = write_pipeline_file(sandbox.folder, NUMBERS, counting_source_table(1))
    said = one_line(sandbox, command, path, *(["double"] if command == "stage" else []))
    assert said.startswith(f"{path}: no broker address for site 'local': pass --broker mqtt://HOST:PORT")


def test_status_without_a_file_asks_the_broker_of_the_environment(tmp_path: Path) -> None:
    with process_sandbox(tmp_path, {"SPARSE_BROKER": "mqtt://me:secret@127.0.0.1:9"}) as sandbox:
        assert one_line(sandbox, "status").startswith("no MQTT 5 broker at mqtt://me@127.0.0.1:9: connection refused")


def test_a_stage_that_the_file_does_not_have(sandbox: ProcessSandbox) -> None:
    path = write_pipeline_file(sandbox.folder, NUMBERS)
    said = one_line(sandbox, "stage", path, "duble", "--broker", "mqtt://127.0.0.1:9")
    assert said == f"{path}: no stage 'duble' (did you mean 'double'?): expected one of double"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--port", "0"), "Input should be greater than or equal to 1"),
        (("--port", "9100x"), "Input should be a valid integer"),
        (("--host", "192.0.2.1"), "cannot listen at 192.0.2.1, port 9100: cannot assign requested address"),
        (("--host", "a..b"), "cannot listen at a..b, port 9100: no such host"),
        (("--broker", "http://127.0.0.1"), "http://127.0.0.1"),
        (("no.toml",), "no.toml: no such file"),
    ],
)
def test_a_monitor_that_cannot_be_as_it_is_told(sandbox: ProcessSandbox, words: tuple[str, ...], expected: str) -> None:
    assert expected in one_line(sandbox, "monitor", "--broker", "mqtt://127.0.0.1:9", *words)


def test_a_number_of_threads_that_cannot_be(sandbox: ProcessSandbox) -> None:
    path = write_pipeline_file(sandbox.folder, NUMBERS)
    assert "Input should be greater than or equal to 1" in one_line(sandbox, "stage", path, "double", "--threads=-3")


def test_a_stage_that_dies_as_it_starts_is_no_mistake_of_the_file(sandbox: ProcessSandbox) -> None:
    """The run fails (status 1), and the line says where to read on."""
    require_dependency("iotcore")
    path = write_pipeline_file(sandbox.folder, [stage_table("bad", "FailingStartExecutor")], counting_source_table(1))
    out = sandbox.folder / "out"
    said = sandbox.start_sparse("run", path, "--broker", "embedded", "--out", out).wait()
    assert said.returncode == 1
    expected = f"sparse: stage bad ended with status 1: the file is not there (its log: {out}/logs/bad-1.log)\n"
    assert said.stderr == expected
    sandbox.assert_nothing_left()
