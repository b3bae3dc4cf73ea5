"""Whether the stores of telemetry keep up with 5,000 points a second: `python -m tests.bench.stores`.

Points of a pipeline of three stages, with ids and times that differ, as a monitor would have them: 500 ten times a
second for ten seconds, into a SQLite file and into a real InfluxDB on this machine (1.6 behind nginx, as the tests have
it). Then as fast as it goes: the ratio to the needed rate is how much room there is. "CPU" is that of this process, the
store's own thread with it, in cores; InfluxDB's is its own. Also: the bytes that a waiting point takes of the disk, and
the processor time of a line.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from brokers.telemetry.schema import HopMetrics, RequestDone, TaskProcessed
from monitor.points.points import TelemetryPoint, event_to_points
from monitor.stores.base import Store
from monitor.stores.influx.http import LineEncoder
from monitor.stores.influx.store import InfluxStore
from monitor.stores.sqlite import SqliteReader, SqliteStore
from tests.support.monitor.influx_servers import InfluxServer, start_influx

NEEDED_PER_S = 5_000
WRITES_PER_S = 10
STAGES = ("head", "body", "tail")


def make_points(count: int, begin_ns: int) -> list[TelemetryPoint]:
    """Points of requests and tasks, 0.2 ms apart."""
    dice = random.Random(1)
    points: list[TelemetryPoint] = []
    while len(points) < count:
        moment_ns = begin_ns + 200_000 * len(points)
        ids: dict[str, Any] = {
            "run": "street-20260101-0000",
            "site": "local",
            "pipeline": "street",
            "request": dice.randbytes(16).hex(),
        }
        hops: list[HopMetrics] = []
        for stage in STAGES:
            figures = {
                "queue_ms": 9 * dice.random(), "decode_ms": dice.random(), "compute_ms": 30 + dice.random(),
                "encode_ms": dice.random(), "bytes_in": 173_056, "bytes_out": 86_528,
            }  # fmt: skip
            own: dict[str, Any] = {"stage": stage, "worker": f"{stage}-{dice.randrange(4)}", **figures}
            points += event_to_points(TaskProcessed(time_ns=moment_ns, **ids, **own), "node-1")
            hops.append(HopMetrics(**own))
        done = RequestDone(
            time_ns=moment_ns, **ids, source="camera", latency_ms=90 + dice.random(), bytes_out=50_000, hops=tuple(hops)
        )
        points += event_to_points(done, "node-1")
    return points[:count]


def write_at_required_rate(store: Store, points: list[TelemetryPoint], settled: Callable[[], bool]) -> dict[str, float]:
    """Write them at the needed rate; what that costs, and how late it was at worst."""
    size = NEEDED_PER_S // WRITES_PER_S
    begin_s, begin_cpu_s, late_s = time.monotonic(), time.process_time(), 0.0
    for turn, first in enumerate(range(0, len(points), size)):
        time.sleep(max(0.0, begin_s + turn / WRITES_PER_S - time.monotonic()))
        store.write(points[first : first + size])
        late_s = max(late_s, time.monotonic() - (begin_s + (turn + 1) / WRITES_PER_S))
    spent_s = time.monotonic() - begin_s
    while not settled():
        time.sleep(0.01)
    return {
        "per_s": len(points) / max(spent_s, len(points) / NEEDED_PER_S),
        "cpu": (time.process_time() - begin_cpu_s) / spent_s,
        "late_ms": 1000 * max(0.0, late_s),
        "settled_s": time.monotonic() - begin_s - spent_s,
    }


def measure_max_rate(store: Store, points: list[TelemetryPoint], settled: Callable[[], bool]) -> float:
    """Points a second, from the first write until the last is kept."""
    begin_s = time.monotonic()
    for first in range(0, len(points), 500):
        store.write(points[first : first + 500])
    while not settled():
        time.sleep(0.001)
    return len(points) / (time.monotonic() - begin_s)


@contextmanager
def open_sqlite_store(folder: Path) -> Iterator[tuple[Store, Callable[[], bool], Callable[[], int]]]:
    """A store, whether it has kept all it was given, and how many requests, tasks and hops it has."""
    path = folder / "telemetry.sqlite"
    store = SqliteStore(path)
    yield store, lambda: True, lambda: sum(len(SqliteReader(path).points(name)) for name in ("request", "hop", "task"))
    store.close()


@contextmanager
def open_influx_store(folder: Path) -> Iterator[tuple[Store, Callable[[], bool], Callable[[], int]]]:
    with start_influx(folder / "influx") as server:
        store = InfluxStore(server.target, folder / "spool")
        yield store, lambda: not store.waiting, lambda: _kept(server)
        store.close()
        assert store.dropped == 0


def _kept(server: InfluxServer) -> int:
    return sum(server.count_points(name, "request") for name in ("request", "hop", "task"))


def measure_line_costs(points: list[TelemetryPoint]) -> dict[str, float]:
    """Microseconds of processor time for a line, and the bytes of one, plain and as it waits on disk."""
    begin_s = time.process_time()
    lines = LineEncoder().encode(points)
    encode_s = time.process_time() - begin_s
    text = "\n".join(lines).encode()
    begin_s = time.process_time()
    packed = gzip.compress(text, 1)
    return {
        "encode_us": 1e6 * encode_s / len(points),
        "gzip_us": 1e6 * (time.process_time() - begin_s) / len(points),
        "plain_bytes": len(text) / len(points),
        "waiting_bytes": len(packed) / len(points),
    }


def measure(seconds: float) -> dict[str, Any]:
    count = round(NEEDED_PER_S * seconds)
    stores: dict[str, Any] = {}
    for name, opened in (("SQLite", open_sqlite_store), ("InfluxDB", open_influx_store)):
        points = make_points(count, time.time_ns() - 3_600_000_000_000)
        with tempfile.TemporaryDirectory() as folder, opened(Path(folder)) as (store, settled, kept):
            figures = write_at_required_rate(store, points, settled)
            later = [replace(point, time_ns=point.time_ns + 60_000_000_000) for point in points]
            figures["flat_out_per_s"] = measure_max_rate(store, later, settled)
            figures["ratio"] = figures["flat_out_per_s"] / NEEDED_PER_S
            assert kept() == 2 * count, f"{name} has {kept()} points of {2 * count}"
            stores[name] = figures
    return {
        "needed_per_s": NEEDED_PER_S,
        "seconds": seconds,
        "stores": stores,
        "line": measure_line_costs(points[:5000]),
    }


def print_results(found: dict[str, Any]) -> None:
    table = Table(title=f"{NEEDED_PER_S} points a second for {found['seconds']:g} s, then as fast as it goes")
    for column in ("store", "kept /s", "CPU, cores", "latest write, ms", "at its end, s", "flat out /s", "of needed"):
        table.add_column(column, justify="left" if column == "store" else "right")
    for name, each in found["stores"].items():
        table.add_row(
            name,
            f"{each['per_s']:.0f}",
            f"{each['cpu']:.3f}",
            f"{each['late_ms']:.0f}",
            f"{each['settled_s']:.2f}",
            f"{each['flat_out_per_s']:.0f}",
            f"{each['ratio']:.1f}",
        )
    Console().print(table)
    line = found["line"]
    print(f"a line: {line['encode_us']:.1f} us, and {line['gzip_us']:.1f} us of gzip")
    print(f"        {line['plain_bytes']:.0f} bytes, of which {line['waiting_bytes']:.0f} are left as it waits on disk")


def main() -> None:
    parser = argparse.ArgumentParser(description="Whether the stores of telemetry keep up.")
    parser.add_argument("--seconds", type=float, default=10.0, help="of writing at the needed rate (default 10)")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    options = parser.parse_args()
    found = measure(options.seconds)
    print_results(found)
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
