"""Worker processes that conflict with one that is up: the same id, or another model.

tests/unit/stages/worker/test_worker_presence_conflicts.py shows which of two workers stays.
"""

from __future__ import annotations

import asyncio
import re
import signal
from typing import Any

import pytest

from brokers.dispatch.presence import WorkerRecord
from brokers.protocol.topics import StageTopics
from brokers.server.local_broker import LocalBroker
from stages.worker.worker_presence import CONFLICT_WATCH_S
from tests.support.brokers.presence import WorkerRecords, wait_for_workers, watch_workers
from tests.support.pipelines.pipeline_files import stage_table, write_pipeline_file
from tests.support.pipelines.processes import CommandResult, ProcessSandbox, eventually

STAGE = stage_table("head", "double")
TOPIC = StageTopics("local", "test", "head").presence("w")
NETWORK: dict[str, Any] = {"model": "tests.support.training.factories:tiny_network", "cuts": [2]}


def test_second_worker_of_an_id_is_refused(sandbox: ProcessSandbox, broker: LocalBroker) -> None:
    path = write_pipeline_file(sandbox.folder, [STAGE])
    command = ("stage", path, "head", "--broker", broker.address, "--worker", "w")
    first = sandbox.start_sparse(*command)
    before = wait_for_workers(broker.address, lambda workers: TOPIC in workers)[TOPIC]

    async def run_second() -> tuple[CommandResult, list[WorkerRecords]]:
        has_exited = asyncio.Event()
        watching = asyncio.create_task(watch_workers(broker.address, lambda workers: has_exited.is_set()))
        result = await asyncio.to_thread(sandbox.run_sparse, *command)
        has_exited.set()
        return result, (await watching)[1:]

    second, states = asyncio.run(run_second())
    assert second.returncode == 2, second.stderr
    assert second.stderr.startswith(
        f"sparse: worker 'w' cannot join: another worker of this id (process {first.pid} on "
    )
    assert second.stderr.count("\n") == 1
    assert {(state[TOPIC].instance, state[TOPIC].state) for state in states} == {(before.instance, "up")}
    assert first.wait(signal.SIGTERM).returncode == 0
    sandbox.assert_nothing_left()


def test_killed_worker_returns_under_its_id(sandbox: ProcessSandbox, broker: LocalBroker) -> None:
    path = write_pipeline_file(sandbox.folder, [STAGE])
    command = ("stage", path, "head", "--broker", broker.address, "--worker", "w")
    first = sandbox.start_sparse(*command)
    before = wait_for_workers(broker.address, lambda workers: TOPIC in workers)[TOPIC]
    first.wait(signal.SIGKILL)
    second = sandbox.start_sparse(*command)
    after = wait_for_workers(broker.address, lambda workers: TOPIC in workers and workers[TOPIC].pid == second.pid)
    assert after[TOPIC].instance not in ("", before.instance)
    assert second.wait(signal.SIGTERM).returncode == 0


def test_worker_with_another_model_is_refused(sandbox: ProcessSandbox, embedded_broker: LocalBroker) -> None:
    stages = [{"name": "head"}, {"name": "tail"}]
    path = write_pipeline_file(sandbox.folder, stages, **NETWORK)
    (sandbox.folder / "other").mkdir()
    other_path = write_pipeline_file(sandbox.folder / "other", stages, seed=1, **NETWORK)
    broker = ("--broker", embedded_broker.address)
    for name in ("first", "second"):
        sandbox.start_sparse("stage", path, "head", *broker, "--worker", name)
    wait_for_workers(embedded_broker.address, lambda workers: len(workers) == 2)
    result = sandbox.run_sparse("stage", other_path, "head", *broker, "--worker", "other")
    assert result.returncode == 2
    line = r"sparse: worker 'other' cannot join: worker '(first|second)' serves stage 'head' with the model .*\n"
    assert re.fullmatch(line, result.stderr), result.stderr
    wait_for_workers(embedded_broker.address, lambda workers: len(workers) == 2)


@pytest.mark.parametrize(
    ("workers", "reason"),
    [
        ((("a", "one"), ("b", "two")), r"worker '[ab]' serves stage 'head' with the model '(one|two)', this one has"),
        ((("w", "one"), ("w", "one")), r"another worker of this id \(process \d+ on "),
    ],
    ids=["two-models", "one-id"],
)
def test_one_of_two_that_join_at_once_stays(
    sandbox: ProcessSandbox, embedded_broker: LocalBroker, workers: tuple[tuple[str, str], ...], reason: str
) -> None:
    """`workers`: the id of each worker and the fingerprint of its model."""
    ready_file = sandbox.folder / "ready"
    started_files = [sandbox.folder / f"started-{index}" for index in range(len(workers))]
    commands = []
    for (worker, fingerprint), started_file in zip(workers, started_files, strict=True):
        folder = sandbox.folder / f"of-{started_file.name}"
        folder.mkdir()
        files = {"started_file": str(started_file), "ready_file": str(ready_file)}
        stage = stage_table("head", "FingerprintExecutor", settings={"fingerprint": fingerprint, **files})
        path = write_pipeline_file(folder, [stage], name="joined")
        broker = ("--broker", embedded_broker.address)
        commands.append(sandbox.start_sparse("stage", path, "head", *broker, "--worker", worker))
    eventually("all models to be loaded", lambda: all(file.exists() for file in started_files))
    ready_file.touch()
    eventually("one worker to leave", lambda: any(command.has_exited for command in commands))
    (refused,) = [command for command in commands if command.has_exited]
    (staying,) = [command for command in commands if command is not refused]
    result = refused.wait()
    assert result.returncode == 2, result.stderr
    last_line = result.stderr.splitlines()[-1]
    assert re.fullmatch(rf"sparse: worker '\w' cannot join: {reason}.*", last_line), result.stderr

    def is_settled(records: dict[str, WorkerRecord]) -> bool:
        joined = [record for record in records.values() if record.pipeline == "joined"]
        return [record.pid for record in joined if (record.up_s or 0) > CONFLICT_WATCH_S] == [staying.pid]

    wait_for_workers(embedded_broker.address, is_settled)
    assert staying.wait(signal.SIGTERM).returncode == 0
    sandbox.assert_nothing_left()
