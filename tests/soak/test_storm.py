"""Workers of all stages are killed and replaced again and again under load: each request is answered once."""

from __future__ import annotations

import json
import time

import pytest

from brokers.server.local_broker import LocalBroker
from tests.soak.conftest import PrintLine, sizes
from tests.soak.harness.numeric_chain import STAGE_COEFFICIENTS
from tests.soak.harness.worker_fleet import (
    ChainLoad,
    FleetWorker,
    WorkerFleet,
    format_summary,
    write_chain_pipeline_file,
)
from tests.support.brokers.foreign_client import ForeignClient
from tests.support.pipelines.processes import ProcessSandbox

WORKERS_PER_STAGE = 2
WINDOW = 12  # two requests for each worker: each that is killed has tasks
RESULTS_TOPIC = "sparse/local/results/numbers"


@pytest.mark.parametrize("rounds", sizes(3, 15))
@pytest.mark.timeout(3600)
def test_killed_workers_cost_no_request_and_duplicate_none(
    sandbox: ProcessSandbox, broker: LocalBroker, rounds: int, soak_factor: int, print_line: PrintLine
) -> None:
    path = write_chain_pipeline_file(sandbox.folder, stage_seconds=0.05, every_s=0.005, window=WINDOW)
    fleet = WorkerFleet(sandbox, path, broker.address)
    workers = {name: [fleet.start(name) for _ in range(WORKERS_PER_STAGE)] for name in STAGE_COEFFICIENTS}
    fleet.wait_until_up(worker for each in workers.values() for worker in each)
    with ForeignClient(broker.address, [(RESULTS_TOPIC, 1)]) as subscriber:
        load = ChainLoad(sandbox, path, broker.address)
        load.wait_for_more_results(10)
        begin_s = time.monotonic()
        for number in range(rounds * soak_factor):
            fleet.wait_until_up(replace_one_of_each(fleet, workers, same_ids=number % 2 == 0))
            # More than the window: no request is in flight during three kills, after which it would be PoisonRequest.
            load.wait_for_more_results(WINDOW + 1)
        storm_s = time.monotonic() - begin_s
        load.wait_for_more_results(50)
        summary = load.finish()
        subscriber.publish(RESULTS_TOPIC, b"end", qos=1)
        payloads = list(iter(lambda: subscriber.receive().payload, b"end"))
    assert sorted(json.loads(payload)["index"] for payload in payloads) == list(range(summary["requests"]))
    fleet.assert_clean_logs()
    assert summary["retries"] > 0, "no killed worker had a task: the test shows nothing"
    print_line(f"{storm_s:.0f} s of kills, {broker.kind}: {format_summary(summary, kills=fleet.kill_count)}")


def replace_one_of_each(
    fleet: WorkerFleet, workers: dict[str, list[FleetWorker]], *, same_ids: bool
) -> list[FleetWorker]:
    """Kill the oldest worker of each stage and start another, with the same or a new id; return the new workers."""
    killed = [each.pop(0) for each in workers.values()]
    fleet.kill(killed)
    replacements = [fleet.start(worker.stage, worker.worker if same_ids else "") for worker in killed]
    for worker in replacements:
        workers[worker.stage].append(worker)
    return replacements
