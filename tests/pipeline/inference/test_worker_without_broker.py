"""Workers and sources whose broker is gone or frozen end when they are asked to."""

from __future__ import annotations

import os
import signal
import time

import pytest

from brokers.server.local_broker import BrokerKind, start_broker
from tests.pipeline.conftest import BROKER_KINDS
from tests.support.brokers.presence import wait_for_workers
from tests.support.environment.external_programs import require_dependency
from tests.support.pipelines.pipeline_files import counting_source_table, stage_table, write_pipeline_file
from tests.support.pipelines.processes import ProcessSandbox, eventually

SLOW = stage_table("slow", "SleepExecutor", settings={"seconds": 0.1})


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
