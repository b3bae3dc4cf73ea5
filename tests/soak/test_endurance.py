"""A great many requests: no process grows, and no descriptor, thread or entry in a table is left over."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from brokers.server.local_broker import LocalBroker, start_broker
from tests.soak.conftest import PrintLine
from tests.soak.harness.request_load import CONCURRENCY, WARM_UP_FRACTION
from tests.soak.harness.resource_usage import MIB, ResourceTrend, ResourceWatcher, sample_resources
from tests.support.brokers.presence import wait_for_workers
from tests.support.monitor.fake_monitor import FakeMonitor, monitor_socket_path
from tests.support.pipelines.pipeline_files import stage_table, write_pipeline_file
from tests.support.pipelines.processes import PROCESS_TIMEOUT_S, ProcessSandbox, eventually, process_sandbox

TWO = [stage_table("double", "double"), stage_table("add", "add_one")]
# Between a hundred requests and ten thousand the number of objects that an offloader holds has been seen to differ by
# three, for what was just being done as they were counted. One object for every tenth request is far more.
UNSTEADY_OBJECTS = 25


@dataclass(frozen=True)
class Load:
    """So many requests of so many numbers, of 8 bytes, and by how much a process may then have grown."""

    count: int
    values: int
    limit_bytes: int
    limit_s: float
    every_s: float


# 100 bytes a request would be 8 MiB between the first tenth after the warm-up and the last. Seen: 0.02.
SMALL = Load(100_000, 1, 2 * MIB, 1800, 0.25)
# 4 MiB a request. An allocator keeps some buffers of this size for the next message, now one more, now one less; one
# message in a hundred that is kept would be 68 MiB.
LARGE = Load(2_000, 1 << 19, 32 * MIB, 1800, 0.25)
# What takes seconds shows what is kept of each request as objects, descriptors and threads. Of memory it shows only
# what is gross, since a process has not settled after so few.
FEW_SMALL = Load(1_500, 1, 32 * MIB, PROCESS_TIMEOUT_S, 0.02)
FEW_LARGE = Load(30, 1 << 19, 128 * MIB, PROCESS_TIMEOUT_S, 0.02)


@dataclass(frozen=True)
class Served:
    """Two stages, a process each, at a broker."""

    sandbox: ProcessSandbox
    path: Path
    broker: LocalBroker
    processes: dict[str, int]
    told: dict[str, str]  # the environment of who tells events: without a monitor thousands are kept for one to come


@pytest.fixture(scope="module", name="served")
def _served(mosquitto: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with (
        process_sandbox(tmp_path_factory.mktemp("served")) as sandbox,
        monitor_socket_path() as socket,
        FakeMonitor(socket),
        start_broker(kind="mosquitto") as broker,
    ):
        path, told = write_pipeline_file(sandbox.folder, TWO), {"SPARSE_MONITOR": str(socket)}
        workers = {
            each["name"]: sandbox.start_sparse(
                "stage", path, each["name"], "--broker", broker.address, environment=told
            ).pid
            for each in TWO
        }
        wait_for_workers(broker.address, lambda found: len(found) == len(TWO))
        yield Served(sandbox, path, broker, {"broker": broker.pid, **workers}, told)


@pytest.mark.timeout(2 * SMALL.limit_s)
def test_many_small_requests_leave_nothing_behind(served: Served, is_long_run: bool, print_line: PrintLine) -> None:
    endure(served, SMALL if is_long_run else FEW_SMALL, print_line if is_long_run else None)


@pytest.mark.timeout(2 * LARGE.limit_s)
def test_many_large_requests_leave_nothing_behind(served: Served, is_long_run: bool, print_line: PrintLine) -> None:
    endure(served, LARGE if is_long_run else FEW_LARGE, print_line if is_long_run else None)


def endure(served: Served, load: Load, print_line: PrintLine | None) -> None:
    """Ask, and assert that nothing has grown in any process meanwhile, nor is left afterwards."""
    before = looks(served)
    words = ("tests.soak.harness.request_load", served.path, served.broker.address, str(load.count), str(load.values))
    asker = served.sandbox.start(sys.executable, "-m", *words, environment=served.told)
    eventually("the first answers", lambda: "begun" in asker.read_stdout() or asker.process.poll() is not None)
    with ResourceWatcher({**served.processes, "source": asker.pid}, load.every_s) as watch:
        eventually(
            "all answers", lambda: "asked" in asker.read_stdout() or asker.process.poll() is not None, load.limit_s
        )
    said = asker.wait()
    assert said.returncode == 0, said.stderr
    trends = watch.trends(WARM_UP_FRACTION)
    if print_line:
        rate = load.count / said.json_output["elapsed_s"]
        print_line(f"{load.count} requests of {8 * load.values} bytes through two stages: {rate:.0f} a second")
        for trend in trends:
            print_line(str(trend))
    check(said.json_output, load)
    check_trends(trends, load.limit_bytes)
    eventually("the source to be gone from the others' descriptors and threads", lambda: looks(served) == before)


def check(told: dict[str, Any], load: Load) -> None:
    """What the source itself says."""
    assert told["counters"]["results"] == told["counters"]["requests"] == load.count + CONCURRENCY
    assert told["tasks"] == []
    assert told["after"] == told["before"]
    early, late = told["objects"]
    if load.values == 1:  # whole messages; of those in chunks the last thousand are remembered
        assert late - early <= UNSTEADY_OBJECTS, told["objects"]


def check_trends(trends: Sequence[ResourceTrend], limit_bytes: int) -> None:
    for trend in trends:
        assert trend.growth_bytes <= limit_bytes, str(trend)
        assert trend.file_descriptors[-1] <= trend.file_descriptors[0], str(trend)
        assert trend.threads[-1] <= trend.threads[0], str(trend)


def looks(served: Served) -> dict[str, tuple[int, int]]:
    """Descriptors and threads of each process."""
    found = {name: sample_resources(psutil.Process(pid)) for name, pid in served.processes.items()}
    return {name: (each.file_descriptors, each.threads) for name, each in found.items()}
