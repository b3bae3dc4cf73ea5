"""`sparse monitor` beside real workers, sources and brokers: what a scaler and Prometheus see of them."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from brokers.server.local_broker import LocalBroker, start_broker
from tests.support.brokers.ports import free_port
from tests.support.brokers.presence import wait_for_workers
from tests.support.environment.external_programs import require_dependency
from tests.support.monitor.http_client import fetch_metrics, fetch_stages, http_get
from tests.support.monitor.prometheus_series import select_series, series_value
from tests.support.pipelines.pipeline_files import counting_source_table, stage_table, write_pipeline_file
from tests.support.pipelines.processes import ProcessSandbox, RunningCommand, eventually

REPORTS_S = 10.0  # reports come every second; this is ample on a busy machine


def monitor(sandbox: ProcessSandbox, broker: LocalBroker, *words: str | Path) -> tuple[RunningCommand, int]:
    """A monitor of this broker that is connected, and its port."""
    port = free_port()
    running = sandbox.start_sparse("monitor", *words, "--broker", broker.address, "--port", str(port))
    eventually("the monitor to be connected", lambda: http_get(port, "/health")[0] == 200)
    return running, port


def test_the_wait_rises_before_the_first_task_is_done_and_falls_when_none_waits(
    sandbox: ProcessSandbox, broker: LocalBroker
) -> None:
    path = write_pipeline_file(
        sandbox.folder, [stage_table("slow", "SleepExecutor", settings={"seconds": 2.5})], counting_source_table(3)
    )
    _, port = monitor(sandbox, broker)
    sandbox.start_sparse("stage", path, "slow", "--worker", "w1", "--broker", broker.address)
    eventually("the worker", lambda: fetch_stages(port).get("test"))
    assert fetch_stages(port)["test"]["slow"] == {
        "workers": 1, "queue": 0, "queue_ms": 0.0, "busy": 0.0, "rate": 0.0, "site": "local",
    }  # fmt: skip
    source = sandbox.start_sparse("source", path, "--broker", broker.address, "--out", sandbox.folder / "out")

    def waits_unbegun() -> bool:
        series = fetch_metrics(port)
        waits = series_value(series, "sparse_worker_queue_seconds", stage="slow", worker="w1") >= 0.5
        return waits and series_value(series, "sparse_worker_done_total", stage="slow", worker="w1") == 0

    eventually("the wait of tasks that have not been begun", waits_unbegun)
    figures = eventually("a wait of a second", lambda: _waits(port, 1000))
    assert figures >= 1000
    in_flight = select_series(fetch_metrics(port), "sparse_source_in_flight", pipeline="test", site="local")
    assert len(in_flight) == 1
    assert source.wait().returncode == 0
    done = "sparse_worker_done_total"
    eventually(
        "the last task to be told of", lambda: series_value(fetch_metrics(port), done, worker="w1") == 3, REPORTS_S
    )
    eventually("the wait to be over", lambda: fetch_stages(port)["test"]["slow"]["queue_ms"] == 0, REPORTS_S)
    eventually(
        "the source to be gone", lambda: not select_series(fetch_metrics(port), "sparse_source_window"), REPORTS_S
    )


def _waits(port: int, least_ms: float) -> float:
    found: float = fetch_stages(port)["test"]["slow"]["queue_ms"]
    return found if found >= least_ms else 0.0


def test_a_killed_worker_vanishes_and_its_stage_stays(sandbox: ProcessSandbox, embedded_broker: LocalBroker) -> None:
    path = write_pipeline_file(sandbox.folder, [stage_table("head", "double"), stage_table("tail", "double")])
    workers = {
        name: sandbox.start_sparse("stage", path, "head", "--worker", name, "--broker", embedded_broker.address)
        for name in "ab"
    }
    wait_for_workers(embedded_broker.address, lambda seen: len(seen) == 2)
    _, port = monitor(sandbox, embedded_broker, path)
    eventually("both workers", lambda: fetch_stages(port)["test"]["head"]["workers"] == 2)
    assert fetch_stages(port)["test"]["tail"]["workers"] == 0  # the file has it
    workers["a"].wait(signal.SIGKILL)
    eventually("one worker to vanish", lambda: fetch_stages(port)["test"]["head"]["workers"] == 1, REPORTS_S)
    assert not select_series(fetch_metrics(port), "sparse_worker_queue", worker="a")
    assert series_value(fetch_metrics(port), "sparse_worker_queue", worker="b") == 0
    workers["b"].wait(signal.SIGKILL)
    eventually("the other to vanish", lambda: fetch_stages(port)["test"]["head"]["workers"] == 0, REPORTS_S)
    assert series_value(fetch_metrics(port), "sparse_workers", stage="head", state="up") == 0
    assert not select_series(fetch_metrics(port), "sparse_worker_queue")


def test_only_the_pipeline_of_the_file_is_watched(sandbox: ProcessSandbox, embedded_broker: LocalBroker) -> None:
    for name in ("street", "yard"):
        path = write_pipeline_file(sandbox.folder, [stage_table("head", "double")], name=name)
        sandbox.start_sparse("stage", path, "head", "--worker", "w", "--broker", embedded_broker.address)
    wait_for_workers(embedded_broker.address, lambda seen: len(seen) == 2)
    _, every = monitor(sandbox, embedded_broker)
    _, one = monitor(sandbox, embedded_broker, sandbox.folder / "yard.toml")
    eventually("all workers", lambda: sorted(fetch_stages(every)) == ["street", "yard"])
    eventually("the one worker", lambda: fetch_stages(one)["yard"]["head"]["workers"] == 1)
    assert list(fetch_stages(one)) == ["yard"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_broker_that_goes_and_comes_back_is_survived(sandbox: ProcessSandbox, number: int, status: int) -> None:
    require_dependency("iotcore")
    path = write_pipeline_file(sandbox.folder, [stage_table("head", "double")])
    with start_broker(kind="embedded") as first:
        worker = sandbox.start_sparse("stage", path, "head", "--worker", "w1", "--broker", first.address)
        wait_for_workers(first.address, lambda seen: len(seen) == 1)
        watcher, port = monitor(sandbox, first)
        eventually("the worker", lambda: fetch_stages(port).get("test"))
    eventually("the monitor to notice", lambda: http_get(port, "/health")[0] == 503, REPORTS_S)
    assert http_get(port, "/stages")[0] == 503
    assert series_value(fetch_metrics(port), "sparse_broker_connected") == 0
    with start_broker(kind="embedded", port=first.port):
        eventually("the monitor to be back", lambda: http_get(port, "/health")[0] == 200)
        eventually("the worker to be back", lambda: fetch_stages(port)["test"]["head"]["workers"] == 1)
        assert series_value(fetch_metrics(port), "sparse_worker_queue", worker="w1") == 0
        said = watcher.wait(number)
        assert said.returncode == status, said.stderr
        assert "Traceback" not in said.stderr
        worker.wait(signal.SIGTERM)
    sandbox.assert_nothing_left()


def test_a_broker_that_is_not_there_is_one_line_and_no_mistake_of_a_person(sandbox: ProcessSandbox) -> None:
    said = sandbox.start_sparse(
        "monitor", "--broker", "mqtt://me:secret@127.0.0.1:9", "--port", str(free_port())
    ).wait()
    assert (said.returncode, said.stdout) == (1, "")
    assert (
        said.stderr
        == "sparse: no MQTT 5 broker at mqtt://me@127.0.0.1:9: connection refused; start one with `sparse broker`\n"
    )


def test_a_port_that_is_taken_is_one_line(sandbox: ProcessSandbox, embedded_broker: LocalBroker) -> None:
    _, port = monitor(sandbox, embedded_broker)
    said = sandbox.start_sparse("monitor", "--broker", embedded_broker.address, "--port", str(port)).wait()
    assert (said.returncode, said.stdout) == (2, "")
    expected = f"port {port} on 127.0.0.1 is taken: stop the process that listens there, or choose another with --port"
    assert said.stderr == f"sparse: {expected}\n"
    assert http_get(port, "/health")[0] == 200
