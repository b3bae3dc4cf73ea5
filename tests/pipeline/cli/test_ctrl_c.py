"""Commands that are interrupted, stopped or killed: no process and no partial file is left."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import av
import psutil
import pytest
from PIL import Image

from brokers.server.local_broker import LocalBroker
from tests.support.brokers.ports import free_port
from tests.support.environment.clips import write_video
from tests.support.environment.external_programs import require_broker
from tests.support.pipelines.pipeline_files import counting_source_table, stage_table, write_pipeline_file
from tests.support.pipelines.processes import ProcessSandbox, RunningCommand, eventually

STAGES = [stage_table("first", "double")]


@pytest.fixture(autouse=True)
def _require_embedded_broker() -> None:
    require_broker("embedded")


def start_endless_run(sandbox: ProcessSandbox, seconds: float = 0.02) -> RunningCommand:
    """`sparse run`, with its output in the folder `out`; its second stage sleeps for some seconds per task."""
    stages = [*STAGES, stage_table("slow", "SleepExecutor", settings={"seconds": seconds})]
    path = write_pipeline_file(sandbox.folder, stages, counting_source_table(1_000_000))
    return sandbox.start_sparse("run", path, "--broker", "embedded", "--json", "--out", sandbox.folder / "out")


def wait_for_results(folder: Path, count: int = 5) -> None:
    results = folder / "results.jsonl"
    eventually("some results", lambda: results.exists() and results.read_text().count("\n") >= count)


def start_broker_command(sandbox: ProcessSandbox, port: int) -> RunningCommand:
    broker = sandbox.start_sparse("broker", "--kind", "embedded", "--port", str(port))
    eventually("the broker", lambda: "listens on" in broker.read_stderr())
    return broker


def interrupt_twice(command: RunningCommand) -> None:
    """Press Ctrl-C twice; the second signal is sent once the first is no longer pending, or they would be one."""

    def is_delivered() -> bool:
        status = Path(f"/proc/{command.pid}/status").read_text()
        pending = re.findall(r"^(?:Sig|Shd)Pnd:\t(\w+)$", status, re.MULTILINE)
        return not any(int(mask, 16) & 1 << signal.SIGINT - 1 for mask in pending)

    os.killpg(command.pid, signal.SIGINT)
    eventually("the first signal to be delivered", is_delivered)
    os.killpg(command.pid, signal.SIGINT)


def assert_no_partial_file(folder: Path) -> None:
    names = [str(path.relative_to(folder)) for path in folder.rglob("*")]
    assert [name for name in names if name.endswith(".part") or name.startswith(".") or "/." in name] == []
    for line in (folder / "results.jsonl").read_text().splitlines(keepends=True):
        assert line.endswith("\n")
        json.loads(line)


# A terminal signals the whole process group; `kill -INT` and service managers signal one process.
@pytest.mark.parametrize(
    ("send", "number", "status"),
    [(os.killpg, signal.SIGINT, 130), (os.kill, signal.SIGINT, 130), (os.kill, signal.SIGTERM, 0)],
    ids=["SIGINT-to-the-group", "SIGINT", "SIGTERM"],
)
def test_stopped_run_finishes_its_requests(
    sandbox: ProcessSandbox, send: Callable[[int, int], None], number: int, status: int
) -> None:
    run, out = start_endless_run(sandbox), sandbox.folder / "out"
    wait_for_results(out)
    send(run.pid, number)
    result = run.wait()
    assert result.returncode == status, result.stderr
    assert result.stdout.count("\n") == 1
    written = json.loads((out / "summary.json").read_text())
    files = {**written["files"], "telemetry": "telemetry.sqlite"}
    assert result.json_output == {**written, "broker": "embedded", "files": files}
    lines = (out / "results.jsonl").read_text().splitlines()
    assert result.json_output["results"] == result.json_output["requests"] == len(lines)
    assert [json.loads(line)["index"] for line in lines] == list(range(len(lines)))
    assert result.json_output["lost"] == 0
    assert "Traceback" not in result.stderr
    sandbox.assert_nothing_left()
    assert_no_partial_file(out)


def test_second_ctrl_c_ends_the_run_at_once(sandbox: ProcessSandbox) -> None:
    run, out = start_endless_run(sandbox, seconds=600), sandbox.folder / "out"
    eventually("the source", (out / "results.jsonl").exists)
    interrupt_twice(run)
    result = run.wait()
    assert result.returncode == 130, result.stderr
    assert result.stdout == ""
    assert "did not exit" not in result.stderr
    assert "Traceback" not in result.stderr
    sandbox.assert_nothing_left()


@pytest.mark.parametrize("argument", ["broker-guard", "slow", "source"])
def test_ctrl_c_during_the_start_leaves_nothing(sandbox: ProcessSandbox, argument: str) -> None:
    """It comes as soon as a process with this argument is started."""
    run = start_endless_run(sandbox)
    eventually(argument, lambda: sandbox.find_process(argument))
    os.killpg(run.pid, signal.SIGINT)
    result = run.wait()
    assert result.returncode == 130, result.stderr
    assert "Traceback" not in result.stderr
    sandbox.wait_until_nothing_left()


def test_processes_of_a_killed_run_exit(sandbox: ProcessSandbox) -> None:
    run = start_endless_run(sandbox)
    wait_for_results(sandbox.folder / "out")
    assert len(sandbox.live_processes()) >= 5  # the run, the broker and its guard, two stages, the source
    run.wait(signal.SIGKILL)
    sandbox.wait_until_nothing_left()


def test_source_that_ignores_close_is_abandoned(sandbox: ProcessSandbox) -> None:
    source = {"kind": "tests.support.pipelines.example_code:BlockingSource", "name": "blocking"}
    path = write_pipeline_file(sandbox.folder, STAGES, source)
    out = sandbox.folder / "out"
    run = sandbox.start_sparse("run", path, "--broker", "embedded", "--json", "--out", out)
    wait_for_results(out, 1)
    result = run.wait(signal.SIGINT)
    assert result.returncode == 130, result.stderr
    assert result.json_output["results"] == 1
    sandbox.assert_nothing_left()


def test_services_exit_at_a_signal(sandbox: ProcessSandbox, embedded_broker: LocalBroker) -> None:
    """SIGTERM, with which service managers stop endless sources, is no failure."""
    broker_option = ("--broker", embedded_broker.address)
    path = write_pipeline_file(sandbox.folder, STAGES, name="door")
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 0)):
        broker = start_broker_command(sandbox, free_port())
        worker = sandbox.start_sparse("stage", path, "first", *broker_option)
        out = sandbox.folder / f"out-{status}"
        gateway = sandbox.start_sparse("-v", "source", path, *broker_option, "--out", out)
        eventually("the worker", lambda worker=worker: "serves stage" in worker.read_stderr())  # type: ignore[misc]
        eventually("the gateway", lambda gateway=gateway: "publish pictures" in gateway.read_stderr())  # type: ignore[misc]
        for command in (gateway, worker, broker):
            result = command.wait(number)
            assert result.returncode == status, result.stderr
            assert "Traceback" not in result.stderr
    sandbox.wait_until_nothing_left()


def test_source_without_workers_exits_at_the_second_ctrl_c(
    sandbox: ProcessSandbox, embedded_broker: LocalBroker
) -> None:
    path = write_pipeline_file(sandbox.folder, STAGES, counting_source_table(3), name="unserved")
    out = sandbox.folder / "out"
    source = sandbox.start_sparse("source", path, "--broker", embedded_broker.address, "--out", out)
    eventually("the source", (out / "results.jsonl").exists)
    interrupt_twice(source)
    result = source.wait()
    assert result.returncode == 130, result.stderr
    assert "Traceback" not in result.stderr


def test_crash_of_the_broker_is_reported(sandbox: ProcessSandbox) -> None:
    port = free_port()
    command = start_broker_command(sandbox, port)
    for process in eventually("the broker process", lambda: find_listeners(sandbox, port)):
        process.kill()
    result = command.wait()
    assert result.returncode == 1
    line = f"sparse: the embedded broker at mqtt://127.0.0.1:{port} ended by itself: "
    assert result.stderr.splitlines()[-1].startswith(line)
    sandbox.wait_until_nothing_left()


def find_listeners(sandbox: ProcessSandbox, port: int) -> list[psutil.Process]:
    """The processes that listen at a port: the broker, but not its guard."""
    return [
        process
        for process in sandbox.live_processes()
        if any(
            connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
            for connection in process.net_connections("tcp")
        )
    ]


def test_pictures_of_a_stopped_run_are_complete(sandbox: ProcessSandbox) -> None:
    video = write_video(sandbox.folder / "long.mp4", 200)
    source = {"kind": "video", "path": str(video), "loop": True}
    path = write_pipeline_file(sandbox.folder, [stage_table("bytes", "ByteCountExecutor")], source)
    out = sandbox.folder / "out"
    run = sandbox.start_sparse("run", path, "--broker", "embedded", "--json", "--out", out)
    wait_for_results(out, 30)
    result = run.wait(signal.SIGINT)
    assert result.returncode == 130, result.stderr
    sandbox.assert_nothing_left()
    assert_no_partial_file(out)
    files = result.json_output["files"]
    with av.open(str(out / files["clip"])) as clip:
        assert sum(1 for _ in clip.decode(video=0)) > 0
    for name in (files["sheet"], *files["frames"]):
        with Image.open(out / name) as image:
            image.load()
