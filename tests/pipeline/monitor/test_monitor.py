"""`sparse monitor` beside real workers, sources and brokers: what a scaler and Prometheus see of them."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from brokers.server.local_broker import LocalBroker, start_broker
from tests.support.brokers.ports import free_port
from tests.support.brokers.presence import await_workers
from tests.support.environment.external_programs import need
from tests.support.monitor.http_client import ask, series_at, stages_at
from tests.support.monitor.prometheus_text import labelled, value_of
from tests.support.pipelines.pipeline_files import counter, pipeline_file, stage
from tests.support.pipelines.processes import Machine, Running, eventually

REPORTS_S = 10.0  # reports come every second; this is ample on a busy machine


def monitor(box: Machine, broker: LocalBroker, *words: str | Path) -> tuple[Running, int]:
    """A monitor of this broker that is connected, and its port."""
    port = free_port()
    running = box.sparse("monitor", *words, "--broker", broker.address, "--port", str(port))
    eventually("the monitor to be connected", lambda: ask(port, "/health")[0] == 200)
    return running, port


def test_the_wait_rises_before_the_first_task_is_done_and_falls_when_none_waits(
    box: Machine, broker: LocalBroker
) -> None:
    path = pipeline_file(box.folder, [stage("slow", "Slow", settings={"seconds": 2.5})], counter(3))
    _, port = monitor(box, broker)
    box.sparse("stage", path, "slow", "--worker", "w1", "--broker", broker.address)
    eventually("the worker", lambda: stages_at(port).get("test"))
    assert stages_at(port)["test"]["slow"] == {
        "workers": 1, "queue": 0, "queue_ms": 0.0, "busy": 0.0, "rate": 0.0, "site": "local",
    }  # fmt: skip
    source = box.sparse("source", path, "--broker", broker.address, "--out", box.folder / "out")

    def waits_unbegun() -> bool:
        series = series_at(port)
        waits = value_of(series, "sparse_worker_queue_seconds", stage="slow", worker="w1") >= 0.5
        return waits and value_of(series, "sparse_worker_done_total", stage="slow", worker="w1") == 0

    eventually("the wait of tasks that have not been begun", waits_unbegun)
    figures = eventually("a wait of a second", lambda: _waits(port, 1000))
    assert figures >= 1000
    in_flight = labelled(series_at(port), "sparse_source_in_flight", pipeline="test", site="local")
    assert len(in_flight) == 1
    assert source.end().status == 0
    done = "sparse_worker_done_total"
    eventually("the last task to be told of", lambda: value_of(series_at(port), done, worker="w1") == 3, REPORTS_S)
    eventually("the wait to be over", lambda: stages_at(port)["test"]["slow"]["queue_ms"] == 0, REPORTS_S)
    eventually("the source to be gone", lambda: not labelled(series_at(port), "sparse_source_window"), REPORTS_S)


def _waits(port: int, least_ms: float) -> float:
    found: float = stages_at(port)["test"]["slow"]["queue_ms"]
    return found if found >= least_ms else 0.0


def test_a_killed_worker_vanishes_and_its_stage_stays(box: Machine, embedded: LocalBroker) -> None:
    path = pipeline_file(box.folder, [stage("head", "double"), stage("tail", "double")])
    workers = {name: box.sparse("stage", path, "head", "--worker", name, "--broker", embedded.address) for name in "ab"}
    await_workers(embedded.address, lambda seen: len(seen) == 2)
    _, port = monitor(box, embedded, path)
    eventually("both workers", lambda: stages_at(port)["test"]["head"]["workers"] == 2)
    assert stages_at(port)["test"]["tail"]["workers"] == 0  # the file has it
    workers["a"].end(signal.SIGKILL)
    eventually("one worker to vanish", lambda: stages_at(port)["test"]["head"]["workers"] == 1, REPORTS_S)
    assert not labelled(series_at(port), "sparse_worker_queue", worker="a")
    assert value_of(series_at(port), "sparse_worker_queue", worker="b") == 0
    workers["b"].end(signal.SIGKILL)
    eventually("the other to vanish", lambda: stages_at(port)["test"]["head"]["workers"] == 0, REPORTS_S)
    assert value_of(series_at(port), "sparse_workers", stage="head", state="up") == 0
    assert not labelled(series_at(port), "sparse_worker_queue")


def test_only_the_pipeline_of_the_file_is_watched(box: Machine, embedded: LocalBroker) -> None:
    for name in ("street", "yard"):
        path = pipeline_file(box.folder, [stage("head", "double")], name=name)
        box.sparse("stage", path, "head", "--worker", "w", "--broker", embedded.address)
    await_workers(embedded.address, lambda seen: len(seen) == 2)
    _, every = monitor(box, embedded)
    _, one = monitor(box, embedded, box.folder / "yard.toml")
    eventually("all workers", lambda: sorted(stages_at(every)) == ["street", "yard"])
    eventually("the one worker", lambda: stages_at(one)["yard"]["head"]["workers"] == 1)
    assert list(stages_at(one)) == ["yard"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_broker_that_goes_and_comes_back_is_survived(box: Machine, number: int, status: int) -> None:
    need("iotcore")
    path = pipeline_file(box.folder, [stage("head", "double")])
    with start_broker(kind="embedded") as first:
        worker = box.sparse("stage", path, "head", "--worker", "w1", "--broker", first.address)
        await_workers(first.address, lambda seen: len(seen) == 1)
        watcher, port = monitor(box, first)
        eventually("the worker", lambda: stages_at(port).get("test"))
    eventually("the monitor to notice", lambda: ask(port, "/health")[0] == 503, REPORTS_S)
    assert ask(port, "/stages")[0] == 503
    assert value_of(series_at(port), "sparse_broker_connected") == 0
    with start_broker(kind="embedded", port=first.port):
        eventually("the monitor to be back", lambda: ask(port, "/health")[0] == 200)
        eventually("the worker to be back", lambda: stages_at(port)["test"]["head"]["workers"] == 1)
        assert value_of(series_at(port), "sparse_worker_queue", worker="w1") == 0
        said = watcher.end(number)
        assert said.status == status, said.err
        assert "Traceback" not in said.err
        worker.end(signal.SIGTERM)
    box.nothing_is_left()


def test_a_broker_that_is_not_there_is_one_line_and_no_mistake_of_a_person(box: Machine) -> None:
    said = box.sparse("monitor", "--broker", "mqtt://me:secret@127.0.0.1:9", "--port", str(free_port())).end()
    assert (said.status, said.out) == (1, "")
    assert (
        said.err
        == "sparse: no MQTT 5 broker at mqtt://me@127.0.0.1:9: connection refused; start one with `sparse broker`\n"
    )


def test_a_port_that_is_taken_is_one_line(box: Machine, embedded: LocalBroker) -> None:
    _, port = monitor(box, embedded)
    said = box.sparse("monitor", "--broker", embedded.address, "--port", str(port)).end()
    assert (said.status, said.out) == (2, "")
    expected = f"port {port} on 127.0.0.1 is taken: stop what listens there, or choose another with --port"
    assert said.err == f"sparse: {expected}\n"
    assert ask(port, "/health")[0] == 200
