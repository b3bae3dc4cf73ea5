"""Workers and sources whose broker is down or frozen exit when they are asked to."""

from __future__ import annotations

import os
import signal

from brokers.server.local_broker import start_broker
from tests.support.brokers.presence import wait_for_workers
from tests.support.environment.external_programs import require_broker
from tests.support.pipelines.pipeline_files import counting_source_table, stage_table, write_pipeline_file
from tests.support.pipelines.processes import ProcessSandbox, eventually


def test_worker_stops_while_its_broker_is_down(sandbox: ProcessSandbox) -> None:
    require_broker("embedded")
    path = write_pipeline_file(sandbox.folder, [stage_table("one", "add_one")])
    with start_broker(kind="embedded") as broker:
        worker = sandbox.start_sparse("stage", path, "one", "--broker", broker.address)
        wait_for_workers(broker.address, lambda workers: len(workers) == 1)
    result = worker.wait(signal.SIGTERM)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    sandbox.assert_nothing_left()


def test_source_stops_while_its_broker_is_frozen(sandbox: ProcessSandbox) -> None:
    """A frozen broker neither reads nor disconnects: the source abandons what it cannot publish."""
    source = counting_source_table(1_000_000, every_s=0.01)
    path = write_pipeline_file(sandbox.folder, [stage_table("one", "add_one")], source)
    with start_broker() as broker:
        sandbox.start_sparse("stage", path, "one", "--broker", broker.address)
        out = sandbox.folder / "out"
        command = sandbox.start_sparse("source", path, "--broker", broker.address, "--json", "--out", out)
        results = out / "results.jsonl"
        eventually("a result", lambda: results.exists() and results.read_text())
        os.kill(broker.pid, signal.SIGSTOP)
        try:
            result = command.wait(signal.SIGTERM)
        finally:
            os.kill(broker.pid, signal.SIGCONT)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert result.json_output["results"] > 0
