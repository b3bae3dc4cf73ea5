"""However a run is ended, no process is left and no file is half-written."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import av
import psutil
import pytest
from PIL import Image

from brokers.server.local_broker import LocalBroker
from tests.support.brokers.ports import free_port
from tests.support.environment.clips import write_video
from tests.support.environment.external_programs import require_dependency
from tests.support.pipelines.pipeline_files import counting_source_table, stage_table, write_pipeline_file
from tests.support.pipelines.processes import CommandResult, ProcessSandbox, RunningCommand, eventually

# What a terminal does at a Ctrl-C, what `kill -INT` or `timeout -s INT` does, and what a service manager does.
WAYS = {
    "to the process group": lambda run: os.killpg(run.pid, signal.SIGINT),
    "to the parent only": lambda run: os.kill(run.pid, signal.SIGINT),
    "by SIGTERM": lambda run: os.kill(run.pid, signal.SIGTERM),
}


@pytest.fixture(autouse=True)
def _embedded_broker_is_there() -> None:
    require_dependency("iotcore")


def endless(sandbox: ProcessSandbox, *words: str, seconds: float = 0.02) -> tuple[RunningCommand, Path]:
    """A run that does not end by itself, and its folder."""
    stages = [stage_table("first", "double"), stage_table("slow", "SleepExecutor", settings={"seconds": seconds})]
    path = write_pipeline_file(sandbox.folder, stages, counting_source_table(1_000_000))
    out = sandbox.folder / "out"
    return sandbox.start_sparse("run", path, "--broker", "embedded", "--json", "--out", out, *words), out


def some_results(out: Path, count: int = 5) -> None:
    results = out / "results.jsonl"
    eventually("some results", lambda: results.exists() and results.read_text().count("\n") >= count)


def no_file_is_half_written(out: Path) -> None:
    names = [str(path.relative_to(out)) for path in out.rglob("*")]
    assert [name for name in names if name.endswith(".part") or name.startswith(".") or "/." in name] == []
    for line in (out / "results.jsonl").read_text().splitlines(keepends=True):
        assert line.endswith("\n")
        json.loads(line)


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_is_stopped_ends_in_good_order(sandbox: ProcessSandbox, way: str) -> None:
    run, out = endless(sandbox)
    some_results(out)
    WAYS[way](run)
    said = run.wait()
    assert said.returncode == (0 if way == "by SIGTERM" else 130), said.stderr
    assert said.stdout.count("\n") == 1
    kept = json.loads((out / "summary.json").read_text())
    files = {**kept["files"], "telemetry": "telemetry.sqlite"}
    assert said.json_output == {**kept, "broker": "embedded", "files": files}
    lines = (out / "results.jsonl").read_text().splitlines()
    assert said.json_output["results"] == said.json_output["requests"] == len(lines)
    assert [json.loads(line)["index"] for line in lines] == list(range(len(lines)))
    assert said.json_output["lost"] == 0
    assert "Traceback" not in said.stderr
    sandbox.assert_nothing_left()
    no_file_is_half_written(out)


def test_a_second_ctrl_c_waits_for_nothing(sandbox: ProcessSandbox) -> None:
    run, out = endless(sandbox, seconds=60)
    eventually("the source", lambda: sandbox.find_process("source"))
    eventually("its file", (out / "results.jsonl").exists)
    os.killpg(run.pid, signal.SIGINT)
    with pytest.raises(TimeoutError):  # it waits for the stage, which sleeps
        _wait(run, 2.0)
    os.killpg(run.pid, signal.SIGINT)
    said = run.wait(timeout_s=20)
    assert said.returncode == 130, said.stderr
    assert said.stdout == ""
    assert "Traceback" not in said.stderr
    sandbox.assert_nothing_left()


@pytest.mark.parametrize("moment", ["the broker", "the first stage", "the second stage", "the source"])
def test_a_ctrl_c_while_it_starts_leaves_nothing(sandbox: ProcessSandbox, moment: str) -> None:
    run, _ = endless(sandbox)
    words = {"the broker": ("broker-guard",), "the first stage": ("first",), "the second stage": ("slow",)}
    eventually(moment, lambda: sandbox.find_process(*words.get(moment, ("source",))))
    os.killpg(run.pid, signal.SIGINT)
    said = run.wait()
    assert said.returncode == 130, said.stderr
    assert "Traceback" not in said.stderr
    sandbox.wait_until_nothing_left()  # a broker that was just starting is ended by its guard


def test_a_run_that_is_killed_takes_its_processes_with_it(sandbox: ProcessSandbox) -> None:
    run, out = endless(sandbox)
    some_results(out)
    assert len(sandbox.live_processes()) >= 5  # itself, the broker and its guard, two stages, the source
    run.process.kill()
    run.process.wait()
    sandbox.wait_until_nothing_left()


def test_a_source_that_does_not_mind_being_closed_is_left_behind(sandbox: ProcessSandbox) -> None:
    source = {"kind": "tests.support.pipelines.example_code:BlockingSource", "name": "deaf"}
    path = write_pipeline_file(sandbox.folder, [stage_table("first", "double")], source)
    out = sandbox.folder / "out"
    run = sandbox.start_sparse("run", path, "--broker", "embedded", "--json", "--out", out)
    some_results(out, 1)
    said = run.wait(signal.SIGINT)
    assert said.returncode == 130, said.stderr
    assert said.json_output["results"] == 1
    sandbox.assert_nothing_left()


@pytest.mark.parametrize("command", ["stage", "source"])
def test_a_process_in_the_foreground_ends_at_a_ctrl_c(sandbox: ProcessSandbox, command: str) -> None:
    broker = sandbox.start_sparse("broker", "--kind", "embedded", "--port", str(free_port()))
    eventually("the broker", lambda: "listens on" in broker.read_stderr())
    address = broker.read_stderr().split("listens on ")[1].split(";")[0]
    path = write_pipeline_file(sandbox.folder, [stage_table("first", "double")], counting_source_table(3))
    words = ("stage", path, "first") if command == "stage" else ("source", path, "--out", sandbox.folder / "out")
    one = sandbox.start_sparse(*words, "--broker", address)
    eventually("its connection", lambda: psutil.Process(one.pid).net_connections(kind="tcp"))
    said = one.wait(signal.SIGINT) if command == "stage" else _twice(one)
    assert said.returncode == 130, said.stderr
    assert "Traceback" not in said.stderr
    assert broker.wait(signal.SIGINT).returncode == 130
    sandbox.wait_until_nothing_left()


def test_a_service_that_is_told_to_end_has_done_what_it_should(
    sandbox: ProcessSandbox, embedded_broker: LocalBroker
) -> None:
    """SIGTERM is how containers and service managers end what runs for ever: no failure."""
    broker = sandbox.start_sparse("broker", "--kind", "embedded", "--port", str(free_port()))
    path = write_pipeline_file(sandbox.folder, [stage_table("first", "double")], counting_source_table(3))
    worker = sandbox.start_sparse("-v", "stage", path, "first", "--broker", embedded_broker.address)
    eventually("the broker", lambda: "listens on" in broker.read_stderr())
    eventually("the stage", lambda: "serves stage" in worker.read_stderr())
    assert broker.wait(signal.SIGTERM).returncode == 0
    path = write_pipeline_file(sandbox.folder, [stage_table("first", "double")], name="door")
    gateway = sandbox.start_sparse(
        "-v", "source", path, "--broker", embedded_broker.address, "--out", sandbox.folder / "out"
    )
    eventually("the gateway", lambda: "publish pictures or readings" in gateway.read_stderr())
    assert worker.wait(signal.SIGTERM).returncode == 0
    assert gateway.wait(signal.SIGTERM).returncode == 0
    sandbox.wait_until_nothing_left()


def test_a_broker_that_dies_says_so(sandbox: ProcessSandbox) -> None:
    port = free_port()
    broker = sandbox.start_sparse("broker", "--kind", "embedded", "--port", str(port))
    eventually("the broker", lambda: "listens on" in broker.read_stderr())
    for process in eventually("its process", lambda: _listening(sandbox, port)):
        process.kill()
    said = broker.wait()
    assert said.returncode == 1
    assert said.stderr.splitlines()[-1].startswith(
        f"sparse: the embedded broker at mqtt://127.0.0.1:{port} ended by itself: "
    )
    sandbox.wait_until_nothing_left()


def _listening(sandbox: ProcessSandbox, port: int) -> list[psutil.Process]:
    """The broker itself, and not its guard: who listens at this port."""
    return [
        process
        for process in sandbox.live_processes()
        if any(line.status == psutil.CONN_LISTEN and line.laddr.port == port for line in process.net_connections("tcp"))
    ]


def _twice(run: RunningCommand) -> CommandResult:
    """A source without a stage waits for one, until it is asked twice."""
    run.process.send_signal(signal.SIGINT)
    with pytest.raises(TimeoutError):
        _wait(run, 1.0)
    return run.wait(signal.SIGINT)


def _wait(run: RunningCommand, timeout_s: float) -> None:
    try:
        psutil.Process(run.pid).wait(timeout_s)
    except psutil.TimeoutExpired:
        raise TimeoutError from None


def test_the_pictures_of_a_run_that_is_stopped_are_whole(sandbox: ProcessSandbox) -> None:
    video = write_video(sandbox.folder / "long.mp4", 200)
    path = write_pipeline_file(
        sandbox.folder, [stage_table("bytes", "ByteCountExecutor")], {"kind": "video", "path": str(video), "loop": True}
    )
    out = sandbox.folder / "out"
    run = sandbox.start_sparse("run", path, "--broker", "embedded", "--json", "--out", out)
    some_results(out, 30)
    said = run.wait(signal.SIGINT)
    assert said.returncode == 130, said.stderr
    sandbox.assert_nothing_left()
    no_file_is_half_written(out)
    files = said.json_output["files"]
    with av.open(str(out / files["clip"])) as clip:
        assert sum(1 for _ in clip.decode(video=0)) > 0
    for name in (files["sheet"], *files["frames"]):
        with Image.open(out / name) as picture:
            picture.load()
