"""A pipeline at a tenth of the speed of its camera: results are fresh, drops are counted, and no process grows."""

from __future__ import annotations

import json
import signal
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from brokers.server.local_broker import BrokerKind, LocalBroker, start_broker
from tests.soak.conftest import PrintLine
from tests.soak.harness.camera import IngressCamera, jpeg_frame
from tests.soak.harness.resource_usage import MIB, ResourceTrend, ResourceWatcher
from tests.support.brokers.presence import wait_for_workers
from tests.support.environment.external_programs import require_dependency
from tests.support.pipelines.pipeline_files import counting_source_table, stage_table, write_pipeline_file
from tests.support.pipelines.processes import ProcessSandbox, RunningCommand, eventually

# Samples for each that the pipeline has time for.
SPEED = 10
# The promise: so many service times old, at most, is a result. The service time is what one sample takes in all stages
# of a pipeline that does nothing else.
SERVICE_TIMES = 3
# The first share of the time, in which programs settle.
WARM_UP = 0.15
# Ten frames too many a service time, of 50 kB, would be 25 MB in the minute; a process that does nothing has been seen
# to differ by 1 MiB.
LIMIT_BYTES = 6 * MIB
SHORT_LIMIT_BYTES = 32 * MIB


@dataclass(frozen=True)
class Form:
    """How long a stage sleeps over a sample, for how long all this goes on, and which percentile must be fresh."""

    stage_s: float
    seconds: float
    percentile: int
    limit_bytes: int

    @property
    def every_s(self) -> float:
        return self.stage_s / SPEED

    @property
    def count(self) -> int:
        return round(self.seconds / self.every_s)


LONG = Form(0.1, 60.0, 99, LIMIT_BYTES)
# Of few results the 99th percentile is the worst, and on a machine that does other things that is its affair, not ours.
SHORT = Form(0.15, 5.0, 50, SHORT_LIMIT_BYTES)


@pytest.mark.timeout(900)
def test_a_live_source_ten_times_too_fast_shows_fresh_results_and_counts_what_it_drops(
    sandbox: ProcessSandbox, mosquitto: None, is_long_run: bool, print_line: PrintLine
) -> None:
    source_starves(sandbox, "mosquitto", 1, LONG if is_long_run else SHORT, print_line if is_long_run else None)


@pytest.mark.timeout(900)
def test_a_chain_of_stages_shows_results_as_fresh(
    sandbox: ProcessSandbox, is_long_run: bool, print_line: PrintLine
) -> None:
    form = LONG if is_long_run else Form(0.1, 4.0, 50, SHORT_LIMIT_BYTES)
    source_starves(sandbox, "embedded", 3, form, print_line if is_long_run else None)


@pytest.mark.timeout(900)
def test_a_camera_at_the_ingress_ten_times_too_fast_sees_fresh_results_of_its_frames(
    sandbox: ProcessSandbox, mosquitto: None, is_long_run: bool, print_line: PrintLine
) -> None:
    form = LONG if is_long_run else SHORT
    table = {
        "name": "glance",
        "executor": "tests.soak.harness.camera:FrameSizeExecutor",
        "settings": {"seconds": form.stage_s},
    }
    path = write_pipeline_file(sandbox.folder, [table])
    with pipeline(sandbox, path, ["glance"], "mosquitto") as (broker, workers):
        source = sandbox.start_sparse(
            "source", path, "--broker", broker.address, "--json", "--out", sandbox.folder, "--no-pictures"
        )
        with IngressCamera(broker.port, "probe") as probe:
            eventually("the gateway", lambda: probe.publish(jpeg_frame()).results)
        with IngressCamera(broker.port, "camera") as camera:
            with ResourceWatcher({"broker": broker.pid, "source": source.pid, **workers}, form.every_s) as watch:
                camera.publish_frames(jpeg_frame(), form.every_s, form.count)
            last = len(camera.publish_times_s) - 1
            eventually("the last result", lambda: camera.results and camera.results[-1][1]["index"] == last)
        said = source.wait(signal.SIGINT)
    rows = [result for _, result in camera.results]
    taken = said.json_output["requests"] + said.json_output["dropped"]
    # All of the camera's frames; of the probe's those that came once the gateway was there.
    assert 0 < taken - len(camera.publish_times_s) <= len(probe.publish_times_s)
    check_rows(rows)
    check_ages(camera.latencies_ms(), rows, form, print_line if is_long_run else None)
    check_memory(watch.trends(WARM_UP), form.limit_bytes, print_line if is_long_run else None)


def source_starves(
    sandbox: ProcessSandbox, kind: BrokerKind, stages: int, form: Form, print_line: PrintLine | None
) -> None:
    """A live source in front of a chain of equal stages."""
    tables = [
        stage_table(f"stage-{number}", "SleepExecutor", settings={"seconds": form.stage_s}) for number in range(stages)
    ]
    path = write_pipeline_file(
        sandbox.folder, tables, counting_source_table(form.count, every_s=form.every_s, live=True)
    )
    with pipeline(sandbox, path, [table["name"] for table in tables], kind) as (broker, workers):
        source = sandbox.start_sparse("source", path, "--broker", broker.address, "--json", "--out", sandbox.folder)
        results = sandbox.folder / "results.jsonl"
        eventually("the first result", lambda: results.exists() and results.stat().st_size)
        processes = {"source": source.pid, **workers}
        if kind == "mosquitto":  # the embedded one keeps a log in memory, which a minute does not fill
            processes["broker"] = broker.pid
        with ResourceWatcher(processes, form.every_s) as watch:
            said = source.wait(timeout_s=10 * form.seconds)
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    told = said.json_output
    assert told["results"] == told["requests"] == len(rows)
    assert told["results"] + told["dropped"] == form.count
    check_rows(rows)
    check_ages([row["age_ms"] for row in rows], rows, form, print_line)
    check_memory(watch.trends(WARM_UP), form.limit_bytes, print_line)
    if print_line:
        print_line(f"{told['throughput_per_s']} results a second of {1 / form.stage_s:g}, {told['dropped']} dropped")


@contextmanager
def pipeline(
    sandbox: ProcessSandbox, path: Path, names: Sequence[str], kind: BrokerKind
) -> Iterator[tuple[LocalBroker, dict[str, int]]]:
    """A broker, and a worker of each stage: its process id by the name of its stage."""
    require_dependency({"embedded": "iotcore"}.get(kind, kind))
    with start_broker(kind=kind) as broker:
        workers: dict[str, RunningCommand] = {
            name: sandbox.start_sparse("stage", path, name, "--broker", broker.address) for name in names
        }
        wait_for_workers(broker.address, lambda found: len(found) == len(names))
        yield broker, {name: worker.pid for name, worker in workers.items()}


def check_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Each result is of a newer sample than the one before; it counts at least those between the two as dropped."""
    assert not [row for row in rows if "error" in row]
    indexes = [row["index"] for row in rows]
    assert indexes == sorted(set(indexes))
    for taken, row in enumerate(rows):
        assert row["dropped"] >= row["index"] - taken, row
    assert rows[-1]["dropped"] >= len(rows), "the source was not much faster than the pipeline"


def check_ages(
    ages_ms: Sequence[float], rows: Sequence[dict[str, Any]], form: Form, print_line: PrintLine | None
) -> None:
    """The ages without those of the first results, which find an empty pipeline, in service times as measured."""
    service_ms = statistics.median(
        sum(each["decode_ms"] + each["compute_ms"] + each["encode_ms"] for each in row["time"]["stages"])
        for row in rows
    )
    ordered = sorted(ages_ms)
    found = {percent: ordered[round((len(ordered) - 1) * percent / 100)] for percent in (50, 99, 100)}
    if print_line:
        ages = ", ".join(f"p{percent} {age_ms:.0f} ms" for percent, age_ms in found.items())
        print_line(f"{len(ordered)} results, service time {service_ms:.0f} ms, age {ages}")
    assert found[form.percentile] < SERVICE_TIMES * service_ms, (service_ms, found)


def check_memory(trends: Sequence[ResourceTrend], limit_bytes: int, print_line: PrintLine | None) -> None:
    for trend in trends:
        if print_line:
            print_line(str(trend))
        assert trend.growth_bytes <= limit_bytes, str(trend)
        assert trend.file_descriptors[-1] <= trend.file_descriptors[0], str(trend)
        assert trend.threads[-1] <= trend.threads[0], str(trend)
