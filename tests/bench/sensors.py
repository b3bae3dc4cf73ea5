"""Cost of sampling: the processor time that the sensors of `sparse monitor` need at two samples a second.

    python -m tests.bench.sensors

Processor time of this process, user and system, for each second that passes; 0.01 is 1 % of one core. Each sensor that
this machine has alone, and all together, without and with 20 processes of a run. The first sample, which detects the
hardware, is left out and has its own column. The aim is far below 0.02.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from monitor.sensors.all import Sampler, default_sensors
from monitor.sensors.base import Sensor
from tests.bench.harness.output import make_parser, print_json, print_table

SAMPLES_PER_S = 2.0
PROCESS_COUNT = 20
COLUMNS = {
    "sensors": ("sensors", ""),
    "cpu s/s": ("cpu_s_per_s", ".4f"),
    "points a sample": ("points", ".1f"),
    "first sample, ms": ("first_ms", ".0f"),
}


@contextmanager
def start_processes(count: int) -> Iterator[list[int]]:
    """The ids of idle processes."""
    command = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    children = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(count)]
    try:
        yield [child.pid for child in children]
    finally:
        for child in children:
            child.communicate()


def measure_cost(name: str, make: Callable[[], Sensor | Sampler], seconds: float) -> dict[str, Any]:
    """Processor seconds a second, the points of a sample, and the milliseconds of the first sample."""
    begin_s = time.process_time()
    sensor = make()
    sensor.sample(time.time_ns(), time.monotonic())
    first_s = time.process_time() - begin_s
    points = 0
    count = max(1, round(seconds * SAMPLES_PER_S))
    begin_s = time.process_time()
    due_s = time.monotonic()
    for _ in range(count):
        due_s += 1 / SAMPLES_PER_S
        time.sleep(max(0.0, due_s - time.monotonic()))
        points += len(sensor.sample(time.time_ns(), time.monotonic()))
    cpu_s = time.process_time() - begin_s
    sensor.close()
    return {
        "sensors": name,
        "cpu_s_per_s": cpu_s / count * SAMPLES_PER_S,
        "points": points / count,
        "first_ms": 1000 * first_s,
    }


def _default_sensor(index: int) -> Sensor:
    return default_sensors()[index]


def _sampler_of(pids: list[int]) -> Sampler:
    sampler = Sampler("bench", "bench")
    for number, pid in enumerate(pids):
        sampler.processes.on_start("stage", f"w{number}", pid, "bench")
    return sampler


def measure(seconds: float) -> list[dict[str, Any]]:
    """Measure each sensor for a quarter of the time, and all together for all of it."""
    rows = [
        measure_cost(type(sensor).__name__, partial(_default_sensor, index), seconds / 4)
        for index, sensor in enumerate(default_sensors())
    ]
    for count in (0, PROCESS_COUNT):
        with start_processes(count) as pids:
            rows.append(measure_cost(f"all, {count} processes", partial(_sampler_of, pids), seconds))
    return rows


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="of the rows with all sensors (default 20)")
    options = parser.parse_args()
    rows = measure(options.seconds)
    print_table(f"Cost of sampling, {SAMPLES_PER_S:g} samples a second", COLUMNS, rows)
    print_json(options, {"samples_per_s": SAMPLES_PER_S, "rows": rows})


if __name__ == "__main__":
    main()
