"""Many requests: no process keeps memory, file descriptors, threads or table entries of finished ones."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from brokers.server.local_broker import start_broker
from tests.soak.conftest import PrintLine, sizes
from tests.soak.harness.request_load import OBJECT_TOLERANCE
from tests.soak.harness.resource_usage import MIB, ResourceTrend, sample_resources
from tests.support.brokers.presence import wait_for_workers
from tests.support.monitor.fake_monitor import FakeMonitor, monitor_socket_path
from tests.support.pipelines.pipeline_files import stage_table, write_pipeline_file
from tests.support.pipelines.processes import ProcessSandbox, eventually, process_sandbox

STAGES = [stage_table("double", "double"), stage_table("add", "add_one")]
LOAD_TIMEOUT_S = 3000.0


@dataclass(frozen=True)
class Load:
    """Requests of `values` numbers of 8 bytes each, and the permitted growth of each process."""

    count: int
    values: int
    growth_limit_bytes: int


# Short loads show objects, descriptors and threads that are kept of each request; the memory of a process has not
# settled after so few. In the slow ones 100 bytes kept of each request are 2.4 MiB, and one large message in fifty is
# 40 MiB: allocators keep some buffers of that size for the next message.
SMALL = sizes(Load(1_500, 1, 32 * MIB), Load(30_000, 1, 2 * MIB))
LARGE = sizes(Load(40, 1 << 19, 128 * MIB), Load(600, 1 << 19, 32 * MIB))


@dataclass(frozen=True)
class ServedPipeline:
    """Two stages, one worker process each, at a broker."""

    sandbox: ProcessSandbox
    path: Path
    address: str
    pids: dict[str, int]
    environment: dict[str, str]

    def open_resources(self) -> dict[str, tuple[int, int]]:
        """File descriptors and threads of each process."""
        samples = {name: sample_resources(psutil.Process(pid)) for name, pid in self.pids.items()}
        return {name: (sample.file_descriptors, sample.threads) for name, sample in samples.items()}


@pytest.fixture(scope="module", name="pipeline")
def _pipeline(require_mosquitto: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedPipeline]:
    with (
        process_sandbox(tmp_path_factory.mktemp("endurance")) as sandbox,
        monitor_socket_path() as socket,
        FakeMonitor(socket),
        start_broker(kind="mosquitto") as broker,
    ):
        path = write_pipeline_file(sandbox.folder, STAGES)
        # Without a monitor the telemetry clients keep thousands of events for one that may start later.
        environment = {"SPARSE_MONITOR": str(socket)}
        pids = {"broker": broker.pid}
        for stage in STAGES:
            options = ("--broker", broker.address)
            worker = sandbox.start_sparse("stage", path, stage["name"], *options, environment=environment)
            pids[stage["name"]] = worker.pid
        wait_for_workers(broker.address, lambda workers: len(workers) == len(STAGES))
        yield ServedPipeline(sandbox, path, broker.address, pids, environment)


@pytest.mark.parametrize("load", SMALL)
@pytest.mark.timeout(3600)
def test_small_requests_leave_nothing_behind(
    pipeline: ServedPipeline, load: Load, soak_factor: int, print_line: PrintLine
) -> None:
    object_counts = run_load(pipeline, load, soak_factor, print_line)
    assert object_counts[1] - object_counts[0] <= OBJECT_TOLERANCE, object_counts


@pytest.mark.parametrize("load", LARGE)
@pytest.mark.timeout(3600)
def test_large_requests_leave_nothing_behind(
    pipeline: ServedPipeline, load: Load, soak_factor: int, print_line: PrintLine
) -> None:
    run_load(pipeline, load, soak_factor, print_line)


def run_load(pipeline: ServedPipeline, load: Load, soak_factor: int, print_line: PrintLine) -> list[int]:
    """Send the requests and assert that all processes stay within their bounds; return the object counts."""
    before = pipeline.open_resources()
    count = load.count * soak_factor
    module = "tests.soak.harness.request_load"
    pids = [f"{name}={pid}" for name, pid in pipeline.pids.items()]
    arguments = (str(pipeline.path), pipeline.address, str(count), str(load.values), *pids)
    client = pipeline.sandbox.start(sys.executable, "-m", module, *arguments, environment=pipeline.environment)
    result = client.wait(timeout_s=LOAD_TIMEOUT_S)
    assert result.returncode == 0, result.stderr
    report = result.json_output
    rate = count / report["elapsed_s"]
    print_line(f"{count} requests of {8 * load.values} bytes through two stages: {rate:.0f}/s")
    assert report["counters"]["results"] == report["counters"]["requests"] == count
    assert report["leftover_tasks"] == []
    assert report["resources_after"] == report["resources_before"]
    for trend in map(ResourceTrend.from_json, report["trends"]):
        print_line(str(trend))
        trend.assert_bounded(load.growth_limit_bytes)
    eventually("the end of the client's connections", lambda: pipeline.open_resources() == before)
    return list(report["object_counts"])
