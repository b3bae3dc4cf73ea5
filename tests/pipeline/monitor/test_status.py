"""`sparse status`: who is up, who only seems to be, and how the work of each source fares."""

from __future__ import annotations

import re
import signal
from typing import Any

from brokers.dispatch.presence import WorkerRecord
from brokers.server.local_broker import LocalBroker
from tests.support.brokers.presence import wait_for_workers
from tests.support.pipelines.pipeline_files import counting_source_table, stage_table, write_pipeline_file
from tests.support.pipelines.processes import ProcessSandbox, eventually


def status(sandbox: ProcessSandbox, broker: LocalBroker) -> dict[str, Any]:
    said = sandbox.start_sparse("status", "--broker", broker.address, "--json").wait()
    assert said.returncode == 0, said.stderr
    return said.json_output


def listed(sandbox: ProcessSandbox, broker: LocalBroker) -> dict[tuple[str, str], dict[str, Any]]:
    return {(worker["pipeline"], worker["worker"]): worker for worker in status(sandbox, broker)["workers"]}


def done_by(broker: LocalBroker, worker: str, least: int) -> int:
    """How many tasks a worker has done, as soon as they are so many."""
    done = 0

    def enough(seen: dict[str, WorkerRecord]) -> bool:
        nonlocal done
        done = max((birth.load.done for birth in seen.values() if birth.worker == worker), default=-1)
        return done >= least

    wait_for_workers(broker.address, enough)
    return done


def test_a_worker_that_is_frozen_is_lost_and_its_namesake_is_not(
    sandbox: ProcessSandbox, embedded_broker: LocalBroker
) -> None:
    workers = {}
    for name in ("street", "yard"):
        path = write_pipeline_file(sandbox.folder, [stage_table("head", "double")], name=name)
        workers[name] = sandbox.start_sparse(
            "stage", path, "head", "--worker", "head-1", "--broker", embedded_broker.address
        )
    wait_for_workers(embedded_broker.address, lambda seen: len(seen) == 2)
    found = listed(sandbox, embedded_broker)
    assert {key: worker["lost"] for key, worker in found.items()} == {
        ("street", "head-1"): False,
        ("yard", "head-1"): False,
    }
    workers["yard"].process.send_signal(signal.SIGSTOP)
    found = listed(sandbox, embedded_broker)
    assert [found[name, "head-1"]["lost"] for name in workers] == [False, True]
    said = sandbox.start_sparse("status", "--broker", embedded_broker.address).wait()
    (row,) = [line for line in said.stdout.splitlines() if " yard " in line]
    assert " lost " in row


def test_the_age_of_each_worker_and_the_stages_that_have_none_are_told(
    sandbox: ProcessSandbox, embedded_broker: LocalBroker
) -> None:
    path = write_pipeline_file(sandbox.folder, [stage_table("head", "double"), stage_table("tail", "double")])
    sandbox.start_sparse("stage", path, "head", "--worker", "head-1", "--broker", embedded_broker.address)
    wait_for_workers(embedded_broker.address, lambda seen: any((birth.up_s or 0) >= 1 for birth in seen.values()))
    said = sandbox.start_sparse("status", path, "--broker", embedded_broker.address).wait()
    assert said.returncode == 0, said.stderr
    head, tail = [line.split() for line in said.stdout.splitlines() if line.split()[:2] == ["local", "test"]]
    assert head[2:4] == ["head", "head-1"]
    assert head[head.index("up") + 2] == "s"
    assert int(head[head.index("up") + 1]) >= 1
    assert tail[2:] == ["tail", "none", "up"]
    assert "no source is up" in said.stdout


def test_what_a_source_sent_again_is_told_with_its_reason_until_it_ends(
    sandbox: ProcessSandbox, embedded_broker: LocalBroker
) -> None:
    path = write_pipeline_file(
        sandbox.folder, [stage_table("slow", "SleepExecutor", settings={"seconds": 0.2})], counting_source_table(10_000)
    )
    workers = {
        name: sandbox.start_sparse("stage", path, "slow", "--worker", name, "--broker", embedded_broker.address)
        for name in ("one", "two")
    }
    source = sandbox.start_sparse("source", path, "--broker", embedded_broker.address, "--out", sandbox.folder / "out")
    wait_for_workers(
        embedded_broker.address, lambda seen: len(seen) == 2 and all(birth.load.done for birth in seen.values())
    )
    # The source has more in flight than the other takes: while that goes on, this one has something in hand.
    workers["one"].process.send_signal(signal.SIGSTOP)
    done = done_by(embedded_broker, "two", 0)
    done_by(embedded_broker, "two", done + 8)
    workers["one"].wait(signal.SIGKILL)

    def retried() -> list[dict[str, Any]]:
        return [each for each in status(sandbox, embedded_broker)["sources"] if each["load"]["retries"]]

    (found,) = eventually("the source to tell of its retries", retried)
    load = found["load"]
    assert (found["pipeline"], found["state"], found["lost"], found["pid"]) == ("test", "up", False, source.pid)
    assert load["retries"]["WorkerLost"] >= 1
    assert load["results"] <= load["requests"]
    assert load["latency_ms"]["p50"] >= 200
    assert (load["failed"], load["dropped"]) == ({}, {})
    said = sandbox.start_sparse("status", "--broker", embedded_broker.address).wait()
    (row,) = [line for line in said.stdout.splitlines() if found["source"] in line]
    assert re.search(r" WorkerLost \d+\b", row)

    source.process.send_signal(signal.SIGSTOP)
    (frozen,) = status(sandbox, embedded_broker)["sources"]
    assert frozen["lost"]
    source.wait(signal.SIGKILL)
    eventually("the broker to notice that the source is dead", lambda: not status(sandbox, embedded_broker)["sources"])
