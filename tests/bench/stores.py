"""Stores of telemetry: whether SQLite and InfluxDB sustain 5000 points a second.

    python -m tests.bench.stores

Points of a pipeline of three stages, as a monitor makes them: 500 ten times a second for ten seconds, into a SQLite
file and into an InfluxDB on this machine (1.6 behind nginx, as the tests have it); then as fast as possible.

* written/s: the rate that was reached;
* cores: processor time of this process, with the thread of the store; InfluxDB's own is not counted;
* max delay: the longest that a batch was written after its time;
* drain: until the store had everything, after the last write;
* max/s: the rate as fast as possible, and its ratio to the required rate.

Also the processor time and the bytes of one line of InfluxDB's protocol, plain and in the compressed spool.
"""

from __future__ import annotations

import gzip
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from brokers.telemetry.schema import HopMetrics, RequestDone, TaskProcessed
from monitor.points.points import TelemetryPoint, event_to_points
from monitor.stores.batch_writer import Sink
from monitor.stores.influx.http import LineEncoder
from monitor.stores.influx.store import InfluxStore
from monitor.stores.sqlite import SqliteReader, SqliteStore
from tests.bench.harness.output import make_parser, print_json, print_table
from tests.support.monitor.influx_servers import start_influx

REQUIRED_PER_S = 5_000
WRITES_PER_S = 10
BATCH = REQUIRED_PER_S // WRITES_PER_S
STAGES = ("head", "body", "tail")
MEASUREMENTS = ("request", "hop", "task")
COLUMNS = {
    "store": ("store", ""),
    "written/s": ("per_s", ".0f"),
    "cores": ("cpu_cores", ".3f"),
    "max delay, ms": ("max_delay_ms", ".0f"),
    "drain, s": ("drain_s", ".2f"),
    "max/s": ("max_per_s", ".0f"),
    "of required": ("of_required", ".1f"),
}


def make_points(count: int, begin_ns: int) -> list[TelemetryPoint]:
    """Points of requests and tasks, 0.2 ms apart."""
    rng = random.Random(1)
    points: list[TelemetryPoint] = []
    while len(points) < count:
        time_ns = begin_ns + 200_000 * len(points)
        ids: dict[str, Any] = {
            "run": "street-20260101-0000",
            "site": "local",
            "pipeline": "street",
            "request": rng.randbytes(16).hex(),
        }
        hops: list[HopMetrics] = []
        for stage in STAGES:
            hop: dict[str, Any] = {
                "stage": stage,
                "worker": f"{stage}-{rng.randrange(4)}",
                "queue_ms": 9 * rng.random(),
                "decode_ms": rng.random(),
                "compute_ms": 30 + rng.random(),
                "encode_ms": rng.random(),
                "bytes_in": 173_056,
                "bytes_out": 86_528,
            }
            points += event_to_points(TaskProcessed(time_ns=time_ns, **ids, **hop), "node-1")
            hops.append(HopMetrics(**hop))
        done = RequestDone(
            time_ns=time_ns, **ids, source="camera", latency_ms=90 + rng.random(), bytes_out=50_000, hops=tuple(hops)
        )
        points += event_to_points(done, "node-1")
    return points[:count]


@dataclass(frozen=True, slots=True)
class OpenStore:
    """A store, whether it has written all points that it was given, and how many points it has."""

    store: Sink[TelemetryPoint]
    is_drained: Callable[[], bool]
    count: Callable[[], int]


@contextmanager
def open_sqlite_store(folder: Path) -> Iterator[OpenStore]:
    path = folder / "telemetry.sqlite"
    store = SqliteStore(path)
    yield OpenStore(store, lambda: True, lambda: sum(len(SqliteReader(path).points(name)) for name in MEASUREMENTS))
    store.close()


@contextmanager
def open_influx_store(folder: Path) -> Iterator[OpenStore]:
    with start_influx(folder / "influx") as server:
        store = InfluxStore(server.target, folder / "spool")
        yield OpenStore(
            store,
            lambda: not store.waiting,
            lambda: sum(server.count_points(name, "request") for name in MEASUREMENTS),
        )
        store.close()
        assert store.dropped == 0


def write_at_required_rate(opened: OpenStore, points: list[TelemetryPoint]) -> dict[str, float]:
    max_delay_s = 0.0
    begin_s = time.monotonic()
    begin_cpu_s = time.process_time()
    for number, first in enumerate(range(0, len(points), BATCH)):
        time.sleep(max(0.0, begin_s + number / WRITES_PER_S - time.monotonic()))
        opened.store.write(points[first : first + BATCH])
        max_delay_s = max(max_delay_s, time.monotonic() - (begin_s + (number + 1) / WRITES_PER_S))
    write_s = time.monotonic() - begin_s
    while not opened.is_drained():
        time.sleep(0.01)
    return {
        "per_s": len(points) / max(write_s, len(points) / REQUIRED_PER_S),
        "cpu_cores": (time.process_time() - begin_cpu_s) / write_s,
        "max_delay_ms": 1000 * max_delay_s,
        "drain_s": time.monotonic() - begin_s - write_s,
    }


def measure_max_rate(opened: OpenStore, points: list[TelemetryPoint]) -> float:
    """Points a second, from the first write until the store has all."""
    begin_s = time.monotonic()
    for first in range(0, len(points), BATCH):
        opened.store.write(points[first : first + BATCH])
    while not opened.is_drained():
        time.sleep(0.001)
    return len(points) / (time.monotonic() - begin_s)


def measure_line_costs(points: list[TelemetryPoint]) -> dict[str, float]:
    """Microseconds of processor time for one line, and its bytes, plain and in the compressed spool."""
    begin_s = time.process_time()
    lines = LineEncoder().encode(points)
    encode_s = time.process_time() - begin_s
    text = "\n".join(lines).encode()
    begin_s = time.process_time()
    compressed = gzip.compress(text, 1)
    return {
        "encode_us": 1e6 * encode_s / len(points),
        "gzip_us": 1e6 * (time.process_time() - begin_s) / len(points),
        "plain_bytes": len(text) / len(points),
        "spooled_bytes": len(compressed) / len(points),
    }


def measure(seconds: float) -> dict[str, Any]:
    count = round(REQUIRED_PER_S * seconds)
    rows = []
    for name, open_store in (("SQLite", open_sqlite_store), ("InfluxDB", open_influx_store)):
        points = make_points(count, time.time_ns() - 3_600_000_000_000)
        later = [replace(point, time_ns=point.time_ns + 60_000_000_000) for point in points]
        with tempfile.TemporaryDirectory() as folder, open_store(Path(folder)) as opened:
            row: dict[str, Any] = {"store": name, **write_at_required_rate(opened, points)}
            row["max_per_s"] = measure_max_rate(opened, later)
            row["of_required"] = row["max_per_s"] / REQUIRED_PER_S
            assert opened.count() == 2 * count, f"{name} has {opened.count()} points of {2 * count}"
        rows.append(row)
    return {
        "required_per_s": REQUIRED_PER_S,
        "seconds": seconds,
        "rows": rows,
        "line": measure_line_costs(points[:5000]),
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="of writing at the required rate (default 10)")
    options = parser.parse_args()
    result = measure(options.seconds)
    title = f"{REQUIRED_PER_S} points a second for {options.seconds:g} s, then as fast as possible"
    print_table(title, COLUMNS, result["rows"])
    line = result["line"]
    print(f"one line: {line['encode_us']:.1f} us to encode, {line['gzip_us']:.1f} us to compress")
    print(f"          {line['plain_bytes']:.0f} bytes, {line['spooled_bytes']:.0f} in the spool")
    print_json(options, result)


if __name__ == "__main__":
    main()
