"""The broker is killed, or away, under load; a source is killed with its requests on a worker: what is left of it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from brokers.dispatch.presence import WorkerRecord
from brokers.server.local_broker import BrokerKind, LocalBroker, start_broker
from tests.pipeline.conftest import BROKER_KINDS
from tests.soak.conftest import PrintLine
from tests.soak.harness.numeric_chain import STAGE_COEFFICIENTS
from tests.soak.harness.worker_fleet import ChainLoad, WorkerFleet, format_summary, write_chain_pipeline_file
from tests.support.brokers.presence import wait_for_workers
from tests.support.environment.external_programs import require_dependency
from tests.support.pipelines.pipeline_files import counting_source_table, stage_table, write_pipeline_file
from tests.support.pipelines.processes import ProcessSandbox

WORKERS = 2  # of each stage
LONG_AWAY_S = 20.0
SHORT_AWAY_S = 3.0
DEADLINE_MS = 5000


class Mortal:
    """A broker that is killed, and started again at its old address."""

    def __init__(self, kind: BrokerKind) -> None:
        self._broker = start_broker(kind=kind)

    @property
    def kind(self) -> BrokerKind:
        return self._broker.kind

    @property
    def address(self) -> str:
        return self._broker.address

    def kill(self) -> None:
        """SIGKILL: it says goodbye to nobody and publishes no will."""
        os.kill(self._broker.pid, signal.SIGKILL)
        self._broker.stop()  # waits for the process, whose end is on its way, and clears up

    def start(self) -> None:
        self._broker = start_broker(kind=self._broker.kind, port=self._broker.port)

    def stop(self) -> None:
        self._broker.stop()


@pytest.fixture(name="mortal", params=BROKER_KINDS)
def _mortal(request: pytest.FixtureRequest) -> Iterator[Mortal]:
    require_dependency({"embedded": "iotcore"}.get(request.param, request.param))
    found = Mortal(request.param)
    try:
        yield found
    finally:
        found.stop()


def test_a_broker_that_is_killed_and_one_that_is_away_cost_no_request(
    sandbox: ProcessSandbox, mortal: Mortal, is_long_run: bool, print_line: PrintLine
) -> None:
    path = write_chain_pipeline_file(sandbox.folder, stage_seconds=0.02, every_s=0.02, window=12)
    fleet = WorkerFleet(sandbox, path, mortal.address)
    members = [fleet.start(name) for name in STAGE_COEFFICIENTS for _ in range(WORKERS)]
    fleet.wait_until_up(members)
    load = ChainLoad(sandbox, path, mortal.address)
    load.wait_for_more_results(20)
    waits_s = []
    for away_s in (0.0, LONG_AWAY_S if is_long_run else SHORT_AWAY_S):
        mortal.kill()
        time.sleep(away_s)  # the fault itself: nobody waits for anything
        mortal.start()
        back_s = time.monotonic()
        load.wait_for_more_results(20)
        waits_s.append(time.monotonic() - back_s)
        fleet.wait_until_up(members)
        load.wait_for_more_results(50)
    summary = load.finish()
    fleet.assert_clean_logs()
    waits = ", ".join(f"{wait_s:.1f}" for wait_s in waits_s)
    print_line(
        f"outages of 0 and {away_s:.0f} s, {mortal.kind}: {format_summary(summary)}; 20 results {waits} s after its return"
    )


def test_the_requests_of_a_source_that_is_killed_are_gone_from_its_worker_when_their_deadline_is(
    sandbox: ProcessSandbox, broker: LocalBroker
) -> None:
    """The worker is kept busy by one task all the while: those that wait behind it go by themselves, not computed."""
    gate, diary = sandbox.folder / "gate", sandbox.folder / "diary"
    settings = {"gate": str(gate), "diary": str(diary)}
    gated = stage_table(
        "gated", executor="tests.soak.harness.numeric_chain:GatedExecutor", settings=settings, max_batch=8
    )
    dying = write_pipeline_file(
        sandbox.folder, [gated], counting_source_table(10_000, window=6, deadline_ms=DEADLINE_MS), name="gated"
    )
    worker = sandbox.start_sparse("stage", dying, "gated", "--broker", broker.address, "--worker", "gated-1")
    wait_for_workers(broker.address, lambda workers: len(_ours(workers)) == 1)
    source = sandbox.start_sparse("source", dying, "--broker", broker.address, "--out", sandbox.folder / "first")
    wait_for_workers(broker.address, lambda workers: any(birth.load.queue >= 3 for birth in _ours(workers)))
    source.process.kill()
    source.process.wait()
    wait_for_workers(broker.address, lambda workers: all(birth.load.queue == 0 for birth in _ours(workers)))
    assert written(diary) == 1, "the one that it has in hand"
    gate.touch()
    living = sandbox.folder / "living"
    living.mkdir()
    again = write_pipeline_file(living, [gated], counting_source_table(3), name="gated")
    said = sandbox.start_sparse("source", again, "--broker", broker.address, "--out", living / "out", "--json").wait()
    assert said.returncode == 0, said.stderr
    assert said.json_output["results"] == 3
    assert written(diary) == 4
    assert worker.wait(signal.SIGTERM).returncode == 0


def _ours(workers: dict[str, WorkerRecord]) -> list[WorkerRecord]:
    return [birth for birth in workers.values() if birth.pipeline == "gated"]


def written(diary: Path) -> int:
    """How many tasks the worker has begun to compute."""
    return diary.read_text().count("\n")
