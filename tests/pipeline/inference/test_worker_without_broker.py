"""A worker whose broker is gone, or does not let it speak: it leaves when it is told to, and it goes on meanwhile."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from pathlib import Path

import pytest

from brokers.config.pipeline_file import load_pipeline
from brokers.mqtt.connect_errors import OperationRefused
from brokers.mqtt.in_memory import MemoryBroker, MemoryTransport
from brokers.protocol.transport import Buffer, Delivery, Properties
from brokers.server.local_broker import BrokerKind, start_broker
from stages.commands.stage import make_executor
from stages.worker import stage_worker
from stages.worker.inference_worker import InferenceWorker
from tests.pipeline.conftest import BROKER_KINDS
from tests.support.brokers.broker_kinds import run_async
from tests.support.brokers.presence import wait_for_workers
from tests.support.environment.external_programs import require_dependency
from tests.support.pipelines.pipeline_files import counting_source_table, stage_table, write_pipeline_file
from tests.support.pipelines.processes import ProcessSandbox, eventually

SLOW = stage_table("slow", "SleepExecutor", settings={"seconds": 0.1})


class Strict(MemoryTransport):
    """A broker that lets a client say a little about itself, and then refuses."""

    allowed = 1

    async def publish(
        self,
        topic: str,
        payload: list[Buffer] | Buffer = b"",  # type: ignore[override]
        properties: Properties = Properties(),
        *,
        qos: int = 0,
        retain: bool = False,
    ) -> None:
        if "/up/" in topic:
            self.allowed -= 1
            if self.allowed < 0:
                raise OperationRefused("publication to", topic, "Not authorized")
        await super().publish(topic, payload, properties, qos=qos, retain=retain)


def _worker(folder: Path, transport: MemoryTransport) -> InferenceWorker:
    pipeline = load_pipeline(write_pipeline_file(folder, [SLOW]))
    table = pipeline.find_stage("slow")
    executor, device = make_executor(pipeline, table, 1)
    return InferenceWorker(transport, pipeline, table, executor, "w", device)


@pytest.mark.parametrize("kind", BROKER_KINDS)
def test_a_worker_is_told_to_leave_while_its_broker_is_gone(sandbox: ProcessSandbox, kind: BrokerKind) -> None:
    require_dependency({"embedded": "iotcore"}.get(kind, kind))
    path = write_pipeline_file(sandbox.folder, [SLOW])
    with start_broker(kind=kind) as broker:
        stranded = sandbox.start_sparse("stage", path, "slow", "--broker", broker.address, "--worker", "stranded")
        wait_for_workers(broker.address, lambda workers: len(workers) == 1)
    begin_s = time.monotonic()
    said = stranded.wait(signal.SIGTERM, timeout_s=20)
    assert said.returncode == 0, said.stderr
    assert "Traceback" not in said.stderr
    assert time.monotonic() - begin_s < 8
    sandbox.assert_nothing_left()


def test_a_worker_whose_reports_are_refused_says_so_once_and_works_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stage_worker, "REPORT_INTERVAL_S", 0.02)
    caplog.set_level(logging.WARNING)

    async def test() -> None:
        hub = MemoryBroker()
        transport = Strict(hub)
        worker = _worker(tmp_path, transport)
        await worker.start()
        running = asyncio.create_task(worker.run(), name="run")
        await asyncio.sleep(0.2)
        topic = "sparse/local/test/slow/up/w"
        assert [record.message for record in caplog.records] == [
            f"worker w could not report: {OperationRefused('publication to', topic, 'Not authorized')}"
        ]
        reports: list[Delivery] = []
        listener = MemoryTransport(hub)
        await listener.connect()
        await listener.subscribe(topic, reports.append)
        transport.allowed = 1000
        await asyncio.sleep(0.2)
        assert len(reports) > 1
        await worker.drain()
        await running
        await worker.stop()
        await listener.close()

    run_async(test())


def test_a_worker_that_may_not_say_goodbye_leaves(tmp_path: Path) -> None:
    async def test() -> None:
        worker = _worker(tmp_path, Strict(MemoryBroker()))
        await worker.start()
        running = asyncio.create_task(worker.run(), name="run")
        await worker.drain()
        await running
        await worker.stop()

    run_async(test())


def test_a_source_is_told_to_leave_while_its_broker_is_frozen(sandbox: ProcessSandbox) -> None:
    """It neither reads nor hangs up: what cannot be published is given up, in seconds."""
    path = write_pipeline_file(
        sandbox.folder, [stage_table("one", "add_one")], counting_source_table(1_000_000, every_s=0.05), name="frozen"
    )
    with start_broker() as broker:
        sandbox.start_sparse("stage", path, "one", "--broker", broker.address)
        out = sandbox.folder / "out"
        source = sandbox.start_sparse("source", path, "--broker", broker.address, "--json", "--out", out)
        eventually("a result", lambda: (out / "results.jsonl").exists() and (out / "results.jsonl").read_text())
        os.kill(broker.pid, signal.SIGSTOP)
        time.sleep(1.0)  # by now a frame is on its way that nobody will answer
        try:
            said = source.wait(signal.SIGTERM)
        finally:
            os.kill(broker.pid, signal.SIGCONT)
    assert said.returncode == 0, said.stderr
    assert "Traceback" not in said.stderr
    assert said.json_output["results"] > 0
