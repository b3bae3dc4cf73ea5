"""What sampling a node costs at two samples a second: `python -m tests.bench.sensors`.

Processor time of this process, user and system, for a second that passes, sleeps between samples included: 0.01 is 1 %
of one core. The same sensors as `sparse monitor` has on this machine, which the table names, each alone and all
together, without and with 20 processes that said that they began. The first sample, which looks for what is there, is
not counted; what it took stands beside. The aim is far below 0.02.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from rich.console import Console
from rich.table import Table

from monitor.sensors.all import NodeSensors, default_sensors
from monitor.sensors.base import Sensor
from monitor.sensors.processes import ProcessSensor

SAMPLES_PER_S = 2.0
PROCESS_COUNT = 20


@contextmanager
def start_processes(count: int) -> Iterator[ProcessSensor]:
    """So many processes that sleep, as a monitor would know them."""
    command = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    children = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(count)]
    found = ProcessSensor()
    for number, child in enumerate(children):
        found.on_start("stage", f"w{number}", child.pid, "bench")
    try:
        yield found
    finally:
        for child in children:
            child.communicate()


def measure_cost(make: Callable[[], Sensor | NodeSensors], seconds: float) -> dict[str, float]:
    """Processor seconds a second, the points of a sample, and the milliseconds of the first one."""
    begin_s = time.process_time()
    sensor = make()
    sensor.sample(time.time_ns(), time.monotonic())
    first_s = time.process_time() - begin_s
    points = 0
    count = max(1, round(seconds * SAMPLES_PER_S))
    begin_s, due_s = time.process_time(), time.monotonic()
    for _ in range(count):
        due_s += 1 / SAMPLES_PER_S
        time.sleep(max(0.0, due_s - time.monotonic()))
        points += len(sensor.sample(time.time_ns(), time.monotonic()))
    spent_s = time.process_time() - begin_s
    sensor.close()
    return {"cpu_s_per_s": spent_s / count * SAMPLES_PER_S, "points": points / count, "first_ms": 1000 * first_s}


def _one(place: int) -> Sensor:
    return default_sensors()[place]


def measure(seconds: float) -> dict[str, dict[str, float]]:
    """Each sensor for a fourth of the time, all of them for all of it."""
    found = {}
    for place, sensor in enumerate(default_sensors()):
        found[type(sensor).__name__] = measure_cost(partial(_one, place), seconds / 4)
    with start_processes(0) as processes:
        found["all"] = measure_cost(lambda: NodeSensors("bench", "bench", processes), seconds)
    with start_processes(PROCESS_COUNT) as processes:
        found[f"all, {PROCESS_COUNT} own processes"] = measure_cost(
            lambda: NodeSensors("bench", "bench", processes), seconds
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each line that has all sensors (default 20)")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    options = parser.parse_args()
    found = measure(options.seconds)
    table = Table(title=f"cost of sampling, {SAMPLES_PER_S:g} a second", title_justify="left")
    for column in ("sensors", "cpu s / s", "points of a sample", "first sample, ms"):
        table.add_column(column, justify="left" if column == "sensors" else "right")
    for name, row in found.items():
        table.add_row(name, f"{row['cpu_s_per_s']:.4f}", f"{row['points']:.1f}", f"{row['first_ms']:.0f}")
    Console().print(table)
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
