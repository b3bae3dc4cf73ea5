"""Two processes with the id of one worker: the second is refused while the first is alive, and takes over if not."""

from __future__ import annotations

import asyncio
import re
import signal

import pytest

from brokers.dispatch.presence import WorkerRecord
from brokers.mqtt.client import MqttTransport
from brokers.protocol.topics import StageTopics
from brokers.server.local_broker import LocalBroker
from stages.worker.duplicate_check import CONFLICT_WATCH_S
from tests.support.brokers.presence import wait_for_workers, watch_workers
from tests.support.pipelines.pipeline_files import stage_table, write_pipeline_file
from tests.support.pipelines.processes import ProcessSandbox, RunningCommand, eventually

SLOW = stage_table("slow", "SleepExecutor", settings={"seconds": 0.1})
TOPIC = StageTopics("local", "test", "slow").presence("w")
STALE = WorkerRecord(
    worker="w",
    stage="slow",
    pipeline="test",
    site="local",
    node="gone",
    pid=1,
    instance="former",
    device="cpu",
    fingerprint="",
    capacity=3,
)


def test_a_twin_of_a_worker_that_is_up_is_refused_and_the_first_goes_on(
    sandbox: ProcessSandbox, broker: LocalBroker
) -> None:
    path = write_pipeline_file(sandbox.folder, [SLOW])
    first = sandbox.start_sparse("stage", path, "slow", "--broker", broker.address, "--worker", "w")
    before = wait_for_workers(broker.address, lambda workers: TOPIC in workers)[TOPIC]

    async def meanwhile() -> tuple[int, str, list[dict[str, WorkerRecord]]]:
        ended = asyncio.Event()
        watching = asyncio.create_task(watch_workers(broker.address, lambda workers: ended.is_set()))
        twin = sandbox.start_sparse("stage", path, "slow", "--broker", broker.address, "--worker", "w")
        said = await asyncio.get_running_loop().run_in_executor(None, twin.wait)
        ended.set()
        return said.returncode, said.stderr, (await watching)[1:]

    status, err, states = asyncio.run(meanwhile())
    assert status == 2, err
    assert err.startswith(f"sparse: worker 'w' cannot join: another worker of this id (process {first.pid} on ")
    assert err.count("\n") == 1
    assert {state[TOPIC].instance for state in states} == {before.instance}  # and its record was never away
    assert {state[TOPIC].state for state in states} == {"up"}
    assert "lost" not in first.read_stderr()
    assert first.wait(signal.SIGTERM).returncode == 0
    sandbox.assert_nothing_left()


def test_a_worker_that_was_killed_comes_back_under_its_id(sandbox: ProcessSandbox, broker: LocalBroker) -> None:
    path = write_pipeline_file(sandbox.folder, [SLOW])
    first = sandbox.start_sparse("stage", path, "slow", "--broker", broker.address, "--worker", "w")
    before = wait_for_workers(broker.address, lambda workers: TOPIC in workers)[TOPIC]
    first.wait(signal.SIGKILL)
    second = sandbox.start_sparse("stage", path, "slow", "--broker", broker.address, "--worker", "w")
    after = wait_for_workers(broker.address, lambda workers: TOPIC in workers and workers[TOPIC].pid == second.pid)[
        TOPIC
    ]
    assert after.instance
    assert after.instance != before.instance
    assert second.wait(signal.SIGTERM).returncode == 0


def test_a_record_that_outlived_its_worker_keeps_nobody_out(sandbox: ProcessSandbox, broker: LocalBroker) -> None:
    """As when the broker was away while the worker died: no last will has cleared it."""

    async def leave_behind(record: bytes) -> None:
        transport = MqttTransport(broker.address)
        await transport.connect()
        await transport.publish(TOPIC, record, qos=1, retain=True)
        await transport.close()

    path = write_pipeline_file(sandbox.folder, [SLOW])
    asyncio.run(leave_behind(STALE.to_bytes()))
    try:
        heir = sandbox.start_sparse("stage", path, "slow", "--broker", broker.address, "--worker", "w")
        workers = wait_for_workers(broker.address, lambda workers: TOPIC in workers and workers[TOPIC].pid == heir.pid)
        assert workers[TOPIC].instance != STALE.instance
        assert heir.wait(signal.SIGTERM).returncode == 0
    finally:
        asyncio.run(leave_behind(b""))


def started_together(sandbox: ProcessSandbox, address: str, *marks: tuple[str, str]) -> list[RunningCommand]:
    """Workers of one stage, of each its id and the fingerprint of its model, that join at the same instant."""
    ready = sandbox.folder / "ready"
    started, there = [], [sandbox.folder / f"there-{place}" for place in range(len(marks))]
    for (worker, fingerprint), sign in zip(marks, there, strict=True):
        folder = sandbox.folder / f"of-{sign.name}"
        folder.mkdir()
        settings = {"fingerprint": fingerprint, "there": str(sign), "ready": str(ready)}
        path = write_pipeline_file(folder, [stage_table("slow", "FingerprintExecutor", settings=settings)])
        started.append(sandbox.start_sparse("stage", path, "slow", "--broker", address, "--worker", worker))
    eventually("all to be loaded", lambda: all(sign.exists() for sign in there))
    ready.touch()
    return started


@pytest.mark.parametrize(
    ("marks", "reason"),
    [
        ((("a", "one"), ("b", "two")), r"worker '[ab]' serves stage 'slow' with the model '(one|two)', this one has"),
        ((("w", "one"), ("w", "one")), r"another worker of this id \(process \d+ on "),
    ],
    ids=["of two models", "of one id"],
)
def test_of_two_that_join_at_the_same_instant_exactly_one_stays(
    sandbox: ProcessSandbox, broker: LocalBroker, marks: tuple[tuple[str, str], ...], reason: str
) -> None:
    workers = started_together(sandbox, broker.address, *marks)
    eventually("one to leave", lambda: any(worker.process.poll() is not None for worker in workers))
    (gone,) = [worker for worker in workers if worker.process.poll() is not None]
    (stays,) = [worker for worker in workers if worker is not gone]
    said = gone.wait()
    assert said.returncode == 2, said.stderr
    assert re.fullmatch(rf"sparse: worker '\w' cannot join: {reason}.*", said.stderr.splitlines()[-1]), said.stderr

    def settled(seen: dict[str, WorkerRecord]) -> bool:
        return [birth.pid for birth in seen.values() if (birth.up_s or 0) > CONFLICT_WATCH_S] == [stays.pid]

    (birth,) = wait_for_workers(broker.address, settled).values()
    assert birth.state == "up"
    assert stays.wait(signal.SIGTERM).returncode == 0
    sandbox.assert_nothing_left()
