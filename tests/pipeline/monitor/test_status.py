"""`sparse status`: workers and sources that are up or lost, and the retries of each source."""

from __future__ import annotations

import re
import signal
from typing import Any

from brokers.server.local_broker import LocalBroker
from tests.support.brokers.presence import WorkerRecords, wait_for_workers
from tests.support.pipelines.pipeline_files import counting_source_table, stage_table, write_pipeline_file
from tests.support.pipelines.processes import ProcessSandbox, eventually


def read_status(sandbox: ProcessSandbox, broker: LocalBroker) -> dict[str, Any]:
    result = sandbox.run_sparse("status", "--broker", broker.address, "--json")
    assert result.returncode == 0, result.stderr
    return result.json_output


def lost_workers(sandbox: ProcessSandbox, broker: LocalBroker) -> dict[tuple[str, str], bool]:
    """Whether each worker is lost, by pipeline and id."""
    workers = read_status(sandbox, broker)["workers"]
    return {(worker["pipeline"], worker["worker"]): worker["lost"] for worker in workers}


def test_frozen_worker_is_lost(sandbox: ProcessSandbox, embedded_broker: LocalBroker) -> None:
    """A worker of the same id in another pipeline is not."""
    workers = {}
    for name in ("street", "yard"):
        path = write_pipeline_file(sandbox.folder, [stage_table("head", "double")], name=name)
        options = ("--worker", "head-1", "--broker", embedded_broker.address)
        workers[name] = sandbox.start_sparse("stage", path, "head", *options)
    wait_for_workers(embedded_broker.address, lambda records: len(records) == 2)
    expected = {("street", "head-1"): False, ("yard", "head-1"): False}
    assert lost_workers(sandbox, embedded_broker) == expected
    workers["yard"].process.send_signal(signal.SIGSTOP)
    expected["yard", "head-1"] = True
    eventually("a lost worker", lambda: lost_workers(sandbox, embedded_broker) == expected)
    result = sandbox.run_sparse("status", "--broker", embedded_broker.address)
    (row,) = [line for line in result.stdout.splitlines() if " yard " in line]
    assert " lost " in row


def test_age_of_workers_and_stages_without_any_are_listed(
    sandbox: ProcessSandbox, embedded_broker: LocalBroker
) -> None:
    path = write_pipeline_file(sandbox.folder, [stage_table("head", "double"), stage_table("tail", "double")])
    sandbox.start_sparse("stage", path, "head", "--worker", "head-1", "--broker", embedded_broker.address)
    wait_for_workers(
        embedded_broker.address, lambda records: any((record.up_s or 0) >= 1 for record in records.values())
    )
    result = sandbox.run_sparse("status", path, "--broker", embedded_broker.address)
    assert result.returncode == 0, result.stderr
    head, tail = [line.split() for line in result.stdout.splitlines() if line.split()[:2] == ["local", "test"]]
    assert head[2:4] == ["head", "head-1"]
    assert head[head.index("up") + 2] == "s"
    assert int(head[head.index("up") + 1]) >= 1
    assert tail[2:] == ["tail", "none", "up"]
    assert "no source is up" in result.stdout


def test_retries_of_a_source_are_listed_until_it_exits(sandbox: ProcessSandbox, embedded_broker: LocalBroker) -> None:
    stages = [stage_table("slow", "SleepExecutor", settings={"seconds": 0.2})]
    path = write_pipeline_file(sandbox.folder, stages, counting_source_table(10_000))
    broker = ("--broker", embedded_broker.address)
    workers = {name: sandbox.start_sparse("stage", path, "slow", "--worker", name, *broker) for name in ("one", "two")}
    source = sandbox.start_sparse("source", path, *broker, "--out", sandbox.folder / "out")

    def tasks_done(records: WorkerRecords) -> dict[str, int]:
        return {record.worker: record.load.done for record in records.values()}

    records = wait_for_workers(
        embedded_broker.address, lambda records: len(records) == 2 and all(tasks_done(records).values())
    )
    # The source has more requests in flight than the second worker accepts: the first one has tasks when it is killed.
    workers["one"].process.send_signal(signal.SIGSTOP)
    count = tasks_done(records)["two"] + 8
    wait_for_workers(embedded_broker.address, lambda records: tasks_done(records).get("two", 0) >= count)
    workers["one"].wait(signal.SIGKILL)

    def sources_with_retries() -> list[dict[str, Any]]:
        return [each for each in read_status(sandbox, embedded_broker)["sources"] if each["load"]["retries"]]

    (record,) = eventually("retries of the source", sources_with_retries)
    load = record["load"]
    assert (record["pipeline"], record["state"], record["lost"], record["pid"]) == ("test", "up", False, source.pid)
    assert load["retries"]["WorkerLost"] >= 1
    assert load["results"] <= load["requests"]
    assert load["latency_ms"]["p50"] >= 200
    assert (load["failed"], load["dropped"]) == ({}, {})
    result = sandbox.run_sparse("status", *broker)
    (row,) = [line for line in result.stdout.splitlines() if record["source"] in line]
    assert re.search(r" WorkerLost \d+\b", row)
    source.wait(signal.SIGKILL)
    eventually("the record to be cleared", lambda: not read_status(sandbox, embedded_broker)["sources"])
