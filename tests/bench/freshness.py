"""Freshness: how old the results of live sources are when the source is much faster than the pipeline.

    python -m tests.bench.freshness

A source that produces ten samples in the time that a stage needs for one; the stages sleep. The age of a result is the
time from the creation of its sample (at the ingress: its publication by the camera) to its arrival. The service time is
the time that one sample needs in all stages of an empty pipeline. An age of 2 service times is the least that keeps a
pipeline of one stage busy: one sample waits while the one before it is computed.

* source, 1 stage and 3 stages: `sparse source` with a live source;
* ingress, 1 stage: a camera that publishes JPEGs of 50 kB to the ingress by MQTT.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from brokers.server.local_broker import LocalBroker, start_broker
from brokers.telemetry.percentiles import percentiles
from monitor.launch.child_process import ChildProcess
from tests.bench.harness.output import add_broker_option, make_parser, print_json, print_table
from tests.bench.harness.processes import running, wait_until
from tests.soak.harness.camera import IngressCamera, jpeg_frame
from tests.support.brokers.presence import wait_for_workers
from tests.support.pipelines.pipeline_files import counting_source_table, stage_table, write_pipeline_file

SAMPLES_PER_TASK = 10
# Share of the results at the start that are left out: they meet an empty pipeline.
WARM_UP_FRACTION = 0.1
COLUMNS = {
    "input": ("input", ""),
    "results": ("results", ""),
    "dropped": ("dropped", ""),
    "service time, ms": ("service_ms", ".0f"),
    "age p50, ms": ("p50_ms", ".0f"),
    "age p99, ms": ("p99_ms", ".0f"),
    "p50 / service": ("p50_of_service", ".2f"),
    "p99 / service": ("p99_of_service", ".2f"),
    "of max rate": ("of_max_rate", ".2f"),
}


def make_row(input_name: str, rows: Sequence[dict[str, Any]], ages_ms: Sequence[float]) -> dict[str, Any]:
    """`rows` are the results as they were published; `ages_ms` belong to them."""
    warm_up = int(WARM_UP_FRACTION * len(rows))
    service_ms = median(
        sum(stage["decode_ms"] + stage["compute_ms"] + stage["encode_ms"] for stage in row["time"]["stages"])
        for row in rows
    )
    age_ms = percentiles(ages_ms[warm_up:], (50, 99))
    produced = rows[-1]["index"] - rows[warm_up]["index"]
    return {
        "input": input_name,
        "results": len(rows),
        "dropped": rows[-1]["dropped"],
        "service_ms": service_ms,
        "p50_ms": age_ms["p50"],
        "p99_ms": age_ms["p99"],
        "p50_of_service": age_ms["p50"] / service_ms,
        "p99_of_service": age_ms["p99"] / service_ms,
        "of_max_rate": (len(rows) - 1 - warm_up) * SAMPLES_PER_TASK / produced,
    }


def start_worker(folder: Path, file: Path, address: str, name: str) -> ChildProcess:
    return ChildProcess(name, ("stage", str(file), name, "--broker", address), folder / f"{name}.log")


def start_source(file: Path, folder: Path, address: str) -> subprocess.Popen[bytes]:
    arguments = ("source", str(file), "--broker", address, "--out", str(folder / "out"), "--no-pictures")
    with (folder / "source.log").open("wb") as log:
        return subprocess.Popen([sys.executable, "-m", "brokers.cli", *arguments], stdout=log, stderr=log)


def measure_source(broker: LocalBroker, folder: Path, stages: int, stage_s: float, seconds: float) -> dict[str, Any]:
    every_s = stage_s / SAMPLES_PER_TASK
    names = [f"stage-{number}" for number in range(stages)]
    tables = [stage_table(name, "SleepExecutor", settings={"seconds": stage_s}) for name in names]
    source = counting_source_table(round(seconds / every_s), every_s=every_s, live=True)
    file = write_pipeline_file(folder, tables, source, name=f"chain-{stages}")
    with running(*(start_worker(folder, file, broker.address, name) for name in names)):
        wait_for_workers(broker.address, lambda workers: len(workers) == stages)
        process = start_source(file, folder, broker.address)
        if process.wait() != 0:
            raise RuntimeError(f"the source failed: {(folder / 'source.log').read_text()}")
    rows = [json.loads(line) for line in (folder / "out" / "results.jsonl").read_text().splitlines()]
    name = f"source, {stages} stage" + ("s" if stages > 1 else "")
    return make_row(name, rows, [row["age_ms"] for row in rows])


def measure_ingress(broker: LocalBroker, folder: Path, stage_s: float, seconds: float) -> dict[str, Any]:
    every_s = stage_s / SAMPLES_PER_TASK
    table = {
        "name": "size",
        "executor": "tests.soak.harness.camera:FrameSizeExecutor",
        "settings": {"seconds": stage_s},
    }
    file = write_pipeline_file(folder, [table], name="frames")
    frame = jpeg_frame()
    with running(start_worker(folder, file, broker.address, "size")):
        wait_for_workers(broker.address, lambda workers: len(workers) == 1)
        process = start_source(file, folder, broker.address)
        try:
            with IngressCamera(broker.port, "probe") as probe:
                wait_until(lambda: probe.is_answered(frame), "the ingress gateway")
            with IngressCamera(broker.port, "camera") as camera:
                camera.publish_frames(frame, round(seconds / every_s), every_s)
                last_index = len(camera.publish_times_s) - 1
                wait_until(lambda: camera.last_index == last_index, "the last result")
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()
    return make_row("ingress, 1 stage", camera.results, camera.latencies_ms())


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="measured for each input (default 20)")
    parser.add_argument("--stage-ms", type=float, default=100.0, help="sleep of a stage (default 100)")
    add_broker_option(parser)
    options = parser.parse_args()
    stage_s = options.stage_ms / 1000
    rows = []
    for stages in (1, 3):
        with tempfile.TemporaryDirectory() as folder, start_broker(kind=options.broker) as broker:
            rows.append(measure_source(broker, Path(folder), stages, stage_s, options.seconds))
    with tempfile.TemporaryDirectory() as folder, start_broker(kind=options.broker) as broker:
        rows.append(measure_ingress(broker, Path(folder), stage_s, options.seconds))
    title = f"Live sources, {SAMPLES_PER_TASK} samples in {options.stage_ms:g} ms of one stage, {options.broker}"
    print_table(title, COLUMNS, rows)
    print_json(options, {"broker": options.broker, "stage_ms": options.stage_ms, "rows": rows})


if __name__ == "__main__":
    main()
