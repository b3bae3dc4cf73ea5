"""`sparse status`: who is up, who only seems to be, and how the work of each source fares."""

from __future__ import annotations

import re
import signal
from typing import Any

from brokers.dispatch.presence import Birth
from brokers.server.local_broker import LocalBroker
from tests.support.brokers.presence import await_workers
from tests.support.pipelines.pipeline_files import counter, pipeline_file, stage
from tests.support.pipelines.processes import Machine, eventually


def status(box: Machine, broker: LocalBroker) -> dict[str, Any]:
    said = box.sparse("status", "--broker", broker.address, "--json").end()
    assert said.status == 0, said.err
    return said.answer


def listed(box: Machine, broker: LocalBroker) -> dict[tuple[str, str], dict[str, Any]]:
    return {(worker["pipeline"], worker["worker"]): worker for worker in status(box, broker)["workers"]}


def done_by(broker: LocalBroker, worker: str, least: int) -> int:
    """How many tasks a worker has done, as soon as they are so many."""
    done = 0

    def enough(seen: dict[str, Birth]) -> bool:
        nonlocal done
        done = max((birth.load.done for birth in seen.values() if birth.worker == worker), default=-1)
        return done >= least

    await_workers(broker.address, enough)
    return done


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


def test_the_age_of_each_worker_and_the_stages_that_have_none_are_told(box: Machine, embedded: LocalBroker) -> None:
    path = pipeline_file(box.folder, [stage("head", "double"), stage("tail", "double")])
    box.sparse("stage", path, "head", "--worker", "head-1", "--broker", embedded.address)
    await_workers(embedded.address, lambda seen: any((birth.up_s or 0) >= 1 for birth in seen.values()))
    said = box.sparse("status", path, "--broker", embedded.address).end()
    assert said.status == 0, said.err
    head, tail = [line.split() for line in said.out.splitlines() if line.split()[:2] == ["local", "test"]]
    assert head[2:4] == ["head", "head-1"]
    assert head[head.index("up") + 2] == "s"
    assert int(head[head.index("up") + 1]) >= 1
    assert tail[2:] == ["tail", "none", "up"]
    assert "no source is up" in said.out


def test_what_a_source_sent_again_is_told_with_its_reason_until_it_ends(box: Machine, embedded: LocalBroker) -> None:
    path = pipeline_file(box.folder, [stage("slow", "Slow", settings={"seconds": 0.2})], counter(10_000))
    workers = {
        name: box.sparse("stage", path, "slow", "--worker", name, "--broker", embedded.address)
        for name in ("one", "two")
    }
    source = box.sparse("source", path, "--broker", embedded.address, "--out", box.folder / "out")
    await_workers(embedded.address, lambda seen: len(seen) == 2 and all(birth.load.done for birth in seen.values()))
    # The source has more in flight than the other takes: while that goes on, this one has something in hand.
    workers["one"].process.send_signal(signal.SIGSTOP)
    done = done_by(embedded, "two", 0)
    done_by(embedded, "two", done + 8)
    workers["one"].end(signal.SIGKILL)

    def retried() -> list[dict[str, Any]]:
        return [each for each in status(box, embedded)["sources"] if each["load"]["retries"]]

    (found,) = eventually("the source to tell of its retries", retried)
    load = found["load"]
    assert (found["pipeline"], found["state"], found["lost"], found["pid"]) == ("test", "up", False, source.pid)
    assert load["retries"]["WorkerLost"] >= 1
    assert load["results"] <= load["requests"]
    assert load["latency_ms"]["p50"] >= 200
    assert (load["failed"], load["dropped"]) == ({}, {})
    said = box.sparse("status", "--broker", embedded.address).end()
    (row,) = [line for line in said.out.splitlines() if found["source"] in line]
    assert re.search(r" WorkerLost \d+\b", row)

    source.process.send_signal(signal.SIGSTOP)
    (frozen,) = status(box, embedded)["sources"]
    assert frozen["lost"]
    source.end(signal.SIGKILL)
    eventually("the broker to notice that the source is dead", lambda: not status(box, embedded)["sources"])
