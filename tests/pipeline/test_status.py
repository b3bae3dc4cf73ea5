"""`sparse status`: who is up, and who only seems to be."""

from __future__ import annotations

import signal
from typing import Any

from brokers.site import LocalBroker
from tests.support.pipelines import pipeline_file, stage
from tests.support.presence import await_workers
from tests.support.processes import Machine


def listed(box: Machine, broker: LocalBroker) -> dict[tuple[str, str], dict[str, Any]]:
    said = box.sparse("status", "--broker", broker.address, "--json").end()
    assert said.status == 0, said.err
    return {(worker["pipeline"], worker["worker"]): worker for worker in said.answer["workers"]}


def test_a_worker_that_is_frozen_is_lost_and_its_namesake_is_not(box: Machine, embedded: LocalBroker) -> None:
    workers = {}
    for name in ("street", "yard"):
        path = pipeline_file(box.folder, [stage("head", "double")], name=name)
        workers[name] = box.sparse("stage", path, "head", "--worker", "head-1", "--broker", embedded.address)
    await_workers(embedded.address, lambda seen: len(seen) == 2)
    found = listed(box, embedded)
    assert {key: worker["lost"] for key, worker in found.items()} == {
        ("street", "head-1"): False,
        ("yard", "head-1"): False,
    }
    workers["yard"].process.send_signal(signal.SIGSTOP)
    found = listed(box, embedded)
    assert [found[name, "head-1"]["lost"] for name in workers] == [False, True]
    said = box.sparse("status", "--broker", embedded.address).end()
    (row,) = [line for line in said.out.splitlines() if " yard " in line]
    assert " lost " in row
