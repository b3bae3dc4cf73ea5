"""Workers of three stages are killed again and again under load: each request is answered once, and rightly."""

from __future__ import annotations

import json
import time

from brokers.server.local_broker import LocalBroker
from tests.soak.conftest import PrintLine
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

WORKERS = 2  # of each stage
WINDOW = 12  # two requests for each worker: each that is killed has work in hand
KILL_EVERY_S = 3.0
LONG_ROUNDS = 20  # a minute of it
SHORT_ROUNDS = 3


def test_workers_that_are_killed_all_the_time_cost_no_request_and_double_none(
    sandbox: ProcessSandbox, broker: LocalBroker, is_long_run: bool, print_line: PrintLine
) -> None:
    path = write_chain_pipeline_file(sandbox.folder, stage_seconds=0.05, every_s=0.005, window=WINDOW)
    fleet = WorkerFleet(sandbox, path, broker.address)
    standing = {name: [fleet.start(name) for _ in range(WORKERS)] for name in STAGE_COEFFICIENTS}
    fleet.wait_until_up(member for members in standing.values() for member in members)
    with ForeignClient(broker.address, [("sparse/local/results/numbers", 1)]) as subscriber:
        load = ChainLoad(sandbox, path, broker.address)
        load.wait_for_more_results(10)
        begin_s = time.monotonic()
        for number in range(LONG_ROUNDS if is_long_run else SHORT_ROUNDS):
            if is_long_run:
                time.sleep(max(0.0, begin_s + number * KILL_EVERY_S - time.monotonic()))
            fleet.wait_until_up(replace_one_of_each(fleet, standing, same_ids=number % 2 == 0))
            # All that was in flight is answered: no request is so unlucky three times that it is taken for poison.
            load.wait_for_more_results(WINDOW + 1)
        storm_s = time.monotonic() - begin_s
        load.wait_for_more_results(50)
        summary = load.finish()
        heard = [json.loads(subscriber.receive().payload)["index"] for _ in range(summary["requests"])]
        assert sorted(heard) == list(range(summary["requests"]))
        assert subscriber.is_silent()
    fleet.assert_clean_logs()
    assert summary["retries"] > 0, "nobody had anything in hand: this was no test"
    print_line(f"storm of {storm_s:.0f} s, {broker.kind}: {format_summary(summary, kills=fleet.kill_count)}")


def replace_one_of_each(
    fleet: WorkerFleet, standing: dict[str, list[FleetWorker]], *, same_ids: bool
) -> list[FleetWorker]:
    """Kill the oldest worker of each stage and start another, under its id or a new one; the new ones."""
    doomed = [members.pop(0) for members in standing.values()]
    fleet.kill(doomed)
    replaced = [fleet.start(member.stage, member.worker if same_ids else "") for member in doomed]
    for member in replaced:
        standing[member.stage].append(member)
    return replaced
