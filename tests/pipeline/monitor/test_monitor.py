"""`sparse monitor` with real workers, sources and brokers: its pages for autoscalers and Prometheus, and its errors."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from brokers.server.local_broker import LocalBroker, start_broker
from tests.support.brokers.ports import free_port
from tests.support.brokers.presence import wait_for_workers
from tests.support.environment.external_programs import require_broker
from tests.support.monitor.http_client import fetch_metrics, fetch_stages, http_get
from tests.support.monitor.prometheus_series import select_series, series_value
from tests.support.pipelines.pipeline_files import counting_source_table, stage_table, write_pipeline_file
from tests.support.pipelines.processes import ProcessSandbox, RunningCommand, eventually


def start_monitor(sandbox: ProcessSandbox, broker: LocalBroker, *options: str | Path) -> tuple[RunningCommand, int]:
    """Start a monitor and wait until it is connected to the broker; returns its port, too."""
    port = free_port()
    monitor = sandbox.start_sparse("monitor", *options, "--broker", broker.address, "--port", str(port))
    eventually("the monitor to be connected", lambda: http_get(port, "/health")[0] == 200)
    return monitor, port


def test_queueing_time_rises_before_the_first_task_is_done(
    sandbox: ProcessSandbox, embedded_broker: LocalBroker
) -> None:
    started, gate = sandbox.folder / "started", sandbox.folder / "gate"
    settings = {"started_file": str(started), "gate_file": str(gate)}
    stages = [stage_table("slow", "GateExecutor", settings=settings)]
    path = write_pipeline_file(sandbox.folder, stages, counting_source_table(3))
    _, port = start_monitor(sandbox, embedded_broker)
    sandbox.start_sparse("stage", path, "slow", "--worker", "w1", "--broker", embedded_broker.address)
    eventually("the worker", lambda: fetch_stages(port).get("test"))
    idle = {"workers": 1, "queue": 0, "queue_ms": 0.0, "busy": 0.0, "rate": 0.0, "site": "local"}
    assert fetch_stages(port)["test"]["slow"] == idle
    out = sandbox.folder / "out"
    source = sandbox.start_sparse("source", path, "--broker", embedded_broker.address, "--out", out)

    def tasks_done() -> float:
        return series_value(fetch_metrics(port), "sparse_worker_done_total", stage="slow", worker="w1")

    eventually("a queueing time of 1 s", lambda: fetch_stages(port)["test"]["slow"]["queue_ms"] >= 1000)
    series = fetch_metrics(port)
    assert series_value(series, "sparse_worker_queue_seconds", stage="slow", worker="w1") >= 0.5
    assert tasks_done() == 0
    assert len(select_series(series, "sparse_source_in_flight", pipeline="test", site="local")) == 1
    gate.touch()
    assert source.wait().returncode == 0
    eventually("the report of the last task", lambda: tasks_done() == 3)
    eventually("an empty queue", lambda: fetch_stages(port)["test"]["slow"]["queue_ms"] == 0)
    eventually("the source to be removed", lambda: not select_series(fetch_metrics(port), "sparse_source_window"))


def test_killed_worker_is_removed_and_its_stage_stays(sandbox: ProcessSandbox, embedded_broker: LocalBroker) -> None:
    path = write_pipeline_file(sandbox.folder, [stage_table("head", "double"), stage_table("tail", "double")])
    broker = ("--broker", embedded_broker.address)
    workers = {name: sandbox.start_sparse("stage", path, "head", "--worker", name, *broker) for name in "ab"}
    wait_for_workers(embedded_broker.address, lambda records: len(records) == 2)
    _, port = start_monitor(sandbox, embedded_broker, path)
    eventually("both workers", lambda: fetch_stages(port)["test"]["head"]["workers"] == 2)
    assert fetch_stages(port)["test"]["tail"]["workers"] == 0  # known from the file
    workers["a"].wait(signal.SIGKILL)
    eventually("one worker", lambda: fetch_stages(port)["test"]["head"]["workers"] == 1)
    assert not select_series(fetch_metrics(port), "sparse_worker_queue", worker="a")
    assert series_value(fetch_metrics(port), "sparse_worker_queue", worker="b") == 0
    workers["b"].wait(signal.SIGKILL)
    eventually("no worker", lambda: fetch_stages(port)["test"]["head"]["workers"] == 0)
    assert series_value(fetch_metrics(port), "sparse_workers", stage="head", state="up") == 0
    assert not select_series(fetch_metrics(port), "sparse_worker_queue")


def test_monitor_of_a_file_watches_its_pipeline_only(sandbox: ProcessSandbox, embedded_broker: LocalBroker) -> None:
    for name in ("street", "yard"):
        path = write_pipeline_file(sandbox.folder, [stage_table("head", "double")], name=name)
        sandbox.start_sparse("stage", path, "head", "--worker", "w", "--broker", embedded_broker.address)
    wait_for_workers(embedded_broker.address, lambda records: len(records) == 2)
    _, all_port = start_monitor(sandbox, embedded_broker)
    _, yard_port = start_monitor(sandbox, embedded_broker, sandbox.folder / "yard.toml")
    eventually("all workers", lambda: sorted(fetch_stages(all_port)) == ["street", "yard"])
    eventually("the worker", lambda: fetch_stages(yard_port)["yard"]["head"]["workers"] == 1)
    assert list(fetch_stages(yard_port)) == ["yard"]


def test_monitor_reconnects_to_a_restarted_broker(sandbox: ProcessSandbox) -> None:
    require_broker("embedded")
    path = write_pipeline_file(sandbox.folder, [stage_table("head", "double")])
    with start_broker(kind="embedded") as first:
        worker = sandbox.start_sparse("stage", path, "head", "--worker", "w1", "--broker", first.address)
        wait_for_workers(first.address, lambda records: len(records) == 1)
        monitor, port = start_monitor(sandbox, first)
        eventually("the worker", lambda: fetch_stages(port).get("test"))
    eventually("the disconnection", lambda: http_get(port, "/health")[0] == 503)
    assert http_get(port, "/stages")[0] == 503
    assert series_value(fetch_metrics(port), "sparse_broker_connected") == 0
    with start_broker(kind="embedded", port=first.port):
        eventually("the monitor", lambda: http_get(port, "/health")[0] == 200)
        eventually("the worker", lambda: fetch_stages(port)["test"]["head"]["workers"] == 1)
        assert series_value(fetch_metrics(port), "sparse_worker_queue", worker="w1") == 0
        result = monitor.wait(signal.SIGTERM)
        assert result.returncode == 0, result.stderr
        assert "Traceback" not in result.stderr
        worker.wait(signal.SIGTERM)
    sandbox.assert_nothing_left()


@pytest.mark.parametrize(
    ("arguments", "status", "line"),
    [
        (("--broker", "mqtt://me:secret@127.0.0.1:9"), 1, "no MQTT 5 broker at mqtt://me@127.0.0.1:9: "),
        (("--broker", "http://127.0.0.1"), 2, "broker address 'http://127.0.0.1'"),
        (("--port", "0"), 2, "monitor: Invalid value for '--port'"),
        (("--host", "192.0.2.1"), 2, "cannot listen at 192.0.2.1, port "),
        (("--every", "0"), 2, "monitor: Invalid value for '--every'"),
        (("--store", "pyproject.toml"), 2, "telemetry in pyproject.toml: "),
        (("--socket", "/dev/null/events"), 2, "/dev/null/events: cannot receive events there: "),
        (("--traces", "nowhere"), 2, "--traces 'nowhere': expected the address of a collector"),
        (("no.toml",), 2, "no.toml: no such file"),
    ],
    ids=lambda value: value[0].strip("-") if isinstance(value, tuple) else "",
)
def test_bad_argument_is_one_line(sandbox: ProcessSandbox, arguments: tuple[str, ...], status: int, line: str) -> None:
    default_port = () if "--port" in arguments else ("--port", str(free_port()))
    result = sandbox.run_sparse("monitor", *default_port, *arguments)
    assert (result.returncode, result.stderr.count("\n"), result.stdout) == (status, 1, ""), result.stderr
    assert result.stderr.startswith(f"sparse: {line}")
    sandbox.assert_nothing_left()


def test_port_in_use_is_one_line(sandbox: ProcessSandbox, embedded_broker: LocalBroker) -> None:
    _, port = start_monitor(sandbox, embedded_broker)
    result = sandbox.run_sparse("monitor", "--broker", embedded_broker.address, "--port", str(port))
    assert (result.returncode, result.stderr.count("\n"), result.stdout) == (2, 1, "")
    assert result.stderr.startswith(f"sparse: port {port} on 127.0.0.1 is taken")
    assert http_get(port, "/health")[0] == 200
