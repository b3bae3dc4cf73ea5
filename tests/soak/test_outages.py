"""The broker is killed, or unreachable for a while, under load; and a source is killed with tasks at a worker."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from brokers.dispatch.presence import WorkerRecord
from brokers.server.local_broker import BrokerKind, LocalBroker, start_broker
from tests.pipeline.conftest import BROKER_KINDS
from tests.soak.conftest import PrintLine, sizes
from tests.soak.harness.numeric_chain import STAGE_COEFFICIENTS
from tests.soak.harness.worker_fleet import ChainLoad, WorkerFleet, format_summary, write_chain_pipeline_file
from tests.support.brokers.presence import wait_for_workers
from tests.support.environment.external_programs import require_dependency
from tests.support.pipelines.pipeline_files import counting_source_table, stage_table, write_pipeline_file
from tests.support.pipelines.processes import ProcessSandbox, RunningCommand, eventually

WORKERS_PER_STAGE = 2
CONNECTION_LOST = "lost: "  # part of the line that each client logs
DEADLINE_MS = 5000


class RestartableBroker:
    """A broker that can be killed and started again at the same address."""

    def __init__(self, kind: BrokerKind) -> None:
        self._broker = start_broker(kind=kind)

    @property
    def kind(self) -> BrokerKind:
        return self._broker.kind

    @property
    def address(self) -> str:
        return self._broker.address

    def kill(self) -> None:
        """Send SIGKILL: it disconnects no client and publishes no will."""
        os.kill(self._broker.pid, signal.SIGKILL)
        self._broker.stop()  # waits for the process and removes its files

    def start(self) -> None:
        self._broker = start_broker(kind=self._broker.kind, port=self._broker.port)

    def stop(self) -> None:
        self._broker.stop()


@pytest.fixture(name="restartable", params=BROKER_KINDS)
def _restartable(request: pytest.FixtureRequest) -> Iterator[RestartableBroker]:
    require_dependency({"embedded": "iotcore"}.get(request.param, request.param))
    broker = RestartableBroker(request.param)
    try:
        yield broker
    finally:
        broker.stop()


@pytest.mark.parametrize("outage_s", sizes(0.0, 15.0))
def test_killed_broker_costs_no_request(
    sandbox: ProcessSandbox, restartable: RestartableBroker, outage_s: float, print_line: PrintLine
) -> None:
    """Restarted at once, and only after every client has noticed."""
    path = write_chain_pipeline_file(sandbox.folder, stage_seconds=0.02, every_s=0.02, window=12)
    fleet = WorkerFleet(sandbox, path, restartable.address)
    workers = [fleet.start(name) for name in STAGE_COEFFICIENTS for _ in range(WORKERS_PER_STAGE)]
    fleet.wait_until_up(workers)
    load = ChainLoad(sandbox, path, restartable.address)
    load.wait_for_more_results(20)
    clients = [load.command, *(worker.command for worker in workers)]
    for wait_for_clients in (False, True):
        losses = {client: count_lost_connections(client) for client in clients}
        restartable.kill()
        if wait_for_clients:
            for client, count in losses.items():
                eventually("a client to notice", lambda: count_lost_connections(client) > count)  # noqa: B023 - at once
            time.sleep(outage_s)
        restartable.start()
        load.wait_for_more_results(20)
        fleet.wait_until_up(workers)
        load.wait_for_more_results(50)
    summary = load.finish()
    fleet.assert_clean_logs()
    print_line(f"2 outages, {restartable.kind}, the second of {outage_s:g} s: {format_summary(summary)}")


def count_lost_connections(client: RunningCommand) -> int:
    return client.read_stderr().count(CONNECTION_LOST)


def test_requests_of_killed_source_leave_the_queue_at_their_deadline(
    sandbox: ProcessSandbox, broker: LocalBroker
) -> None:
    """The worker is busy with one task until the end: the tasks in its queue are dropped and never computed."""
    gate_file = sandbox.folder / "gate"
    log_file = sandbox.folder / "log"
    gated = stage_table(
        "gated",
        executor="tests.soak.harness.numeric_chain:GatedExecutor",
        settings={"gate_file": str(gate_file), "log_file": str(log_file)},
        max_batch=8,
    )
    path = write_pipeline_file(
        sandbox.folder, [gated], counting_source_table(10_000, window=6, deadline_ms=DEADLINE_MS), name="gated"
    )
    worker = sandbox.start_sparse("stage", path, "gated", "--broker", broker.address, "--worker", "gated-1")
    wait_for_workers(broker.address, lambda workers: len(gated_records(workers)) == 1)
    source = sandbox.start_sparse("source", path, "--broker", broker.address, "--out", sandbox.folder / "first")
    wait_for_workers(broker.address, lambda workers: any(each.load.queue >= 3 for each in gated_records(workers)))
    source.process.kill()
    source.process.wait()
    wait_for_workers(broker.address, lambda workers: all(each.load.queue == 0 for each in gated_records(workers)))
    assert len(log_file.read_text().splitlines()) == 1, "only the task that it was busy with"
    gate_file.touch()
    folder = sandbox.folder / "second"
    folder.mkdir()
    path = write_pipeline_file(folder, [gated], counting_source_table(3), name="gated")
    result = sandbox.start_sparse("source", path, "--broker", broker.address, "--out", folder / "out", "--json").wait()
    assert result.returncode == 0, result.stderr
    assert result.json_output["results"] == 3
    assert len(set(log_file.read_text().splitlines())) == 1 + 3
    assert worker.wait(signal.SIGTERM).returncode == 0


def gated_records(workers: dict[str, WorkerRecord]) -> list[WorkerRecord]:
    return [record for record in workers.values() if record.pipeline == "gated"]
