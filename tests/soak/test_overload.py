"""Live sources far faster than their pipeline: drops are counted, results stay in order, and memory is bounded.

How old results are is measured by tests/bench/freshness.py.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from typing import Any

import pytest

from brokers.server.local_broker import LocalBroker, start_broker
from tests.soak.conftest import PrintLine, sizes
from tests.soak.harness.camera import IngressCamera, jpeg_frame
from tests.soak.harness.numeric_chain import STAGE_COEFFICIENTS, expected_result
from tests.soak.harness.resource_usage import MIB, ResourceRecorder
from tests.soak.harness.worker_fleet import WorkerFleet, write_chain_pipeline_file
from tests.support.brokers.presence import wait_for_workers
from tests.support.pipelines.pipeline_files import write_pipeline_file
from tests.support.pipelines.processes import ProcessSandbox, eventually

# Of a few gigabytes of dropped samples; allocators keep some memory.
GROWTH_LIMIT_BYTES = 32 * MIB
# Frames of a burst: fewer than the 1000 that a broker queues for one reader, so the broker drops none.
BURST_SIZE = 200


@pytest.mark.parametrize("result_count", sizes(40, 800))
@pytest.mark.timeout(3600)
def test_live_source_counts_dropped_samples(
    sandbox: ProcessSandbox, broker: LocalBroker, result_count: int, soak_factor: int, print_line: PrintLine
) -> None:
    path = write_chain_pipeline_file(sandbox.folder, stage_seconds=0.05, every_s=0.002, live=True)
    fleet = WorkerFleet(sandbox, path, broker.address)
    workers = [fleet.start(name) for name in STAGE_COEFFICIENTS]
    fleet.wait_until_up(workers)
    source = sandbox.start_sparse("source", path, "--broker", broker.address, "--json", "--out", sandbox.folder)
    recorder = ResourceRecorder({"source": source.pid, **{each.stage: each.command.pid for each in workers}})
    results_file = sandbox.folder / "results.jsonl"
    results_file.touch()
    for count in range(result_count // 20, result_count * soak_factor + 1, result_count // 20):
        eventually(f"{count} results", lambda: results_file.read_text().count("\n") >= count)  # noqa: B023 - at once
        recorder.sample()
    stop_file = sandbox.folder / "stop"
    stop_file.touch()
    summary = source.wait().json_output
    rows = [json.loads(line) for line in results_file.read_text().splitlines()]
    assert summary["results"] == summary["requests"] == len(rows)
    assert summary["results"] + summary["dropped"] == int(stop_file.read_text())
    assert [row for row in rows if row["values"] != expected_result(row["index"])] == []
    check_results_and_drops(rows)
    for trend in recorder.trends():
        print_line(str(trend))
        trend.assert_bounded(GROWTH_LIMIT_BYTES)


@pytest.mark.parametrize("burst_count", sizes(10, 80))
@pytest.mark.timeout(3600)
def test_dropped_frames_at_the_ingress_are_counted(
    sandbox: ProcessSandbox, require_mosquitto: None, burst_count: int, soak_factor: int, print_line: PrintLine
) -> None:
    stage = {
        "name": "size",
        "executor": "tests.soak.harness.camera:FrameSizeExecutor",
        "settings": {"seconds": 0.05},
    }
    path = write_pipeline_file(sandbox.folder, [stage])
    frame = jpeg_frame()
    with start_broker(kind="mosquitto") as broker:
        options = ("--broker", broker.address)
        worker = sandbox.start_sparse("stage", path, "size", *options)
        wait_for_workers(broker.address, lambda workers: len(workers) == 1)
        source = sandbox.start_sparse("source", path, *options, "--json", "--out", sandbox.folder, "--no-pictures")
        with IngressCamera(broker.port, "probe") as probe:
            eventually("the ingress gateway", lambda: probe.is_answered(frame))
        recorder = ResourceRecorder({"broker": broker.pid, "source": source.pid, "worker": worker.pid})
        with IngressCamera(broker.port, "camera") as camera:
            for burst in range(1, burst_count * soak_factor + 1):
                camera.publish_frames(frame, BURST_SIZE)
                eventually("the last result of a burst", lambda: camera.last_index == burst * BURST_SIZE - 1)  # noqa: B023 - at once
                recorder.sample()
        summary = source.wait(signal.SIGINT).json_output
    # All frames of the camera, and those of the probe that were published after the gateway had subscribed.
    counted = summary["requests"] + summary["dropped"]
    assert 0 < counted - len(camera.publish_times_s) <= len(probe.publish_times_s)
    check_results_and_drops(camera.results)
    for trend in recorder.trends():
        print_line(str(trend))
        trend.assert_bounded(GROWTH_LIMIT_BYTES)


def check_results_and_drops(rows: Sequence[dict[str, Any]]) -> None:
    """Assert that each sample has one result, and that the count of drops of each covers the gaps before it."""
    assert not [row for row in rows if "error" in row]
    indexes = [row["index"] for row in rows]
    assert len(indexes) == len(set(indexes))
    # Results are published as they are ready: the first two may change places.
    for earlier_results, row in enumerate(sorted(rows, key=lambda row: int(row["index"]))):
        assert row["dropped"] >= row["index"] - earlier_results, row
    assert rows[-1]["dropped"] > 0, "the source was not faster than the pipeline: the test shows nothing"
