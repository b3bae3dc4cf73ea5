"""What telemetry costs a pipeline: `python -m tests.bench.telemetry`.

The pipeline of `tests.bench.throughput` (VGG-11 at 224x224, two stages of one thread), its stages and its source told
to tell a real monitor with a SQLite file, and told of a monitor that is not there. Both are up throughout, each with
its own stages on one broker; rounds alternate, so that a machine that others use as well is slow for both. "ratio" is
that of the medians; the monitor's processor time is what its own sensors say, over its rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from brokers.server.local_broker import BrokerKind, start_broker
from brokers.server.mosquitto_conf import find_mosquitto as find_mosquitto
from brokers.telemetry.client import SOCKET_VARIABLE
from monitor.launch.child_process import ChildProcess, terminate_all
from monitor.stores.sqlite import TELEMETRY_FILE as STORE
from tests.bench.events import process_cpu_s, wait_for_socket
from tests.bench.throughput import MODEL, PIPELINE_TEMPLATE, measure_pipelined
from tests.support.monitor.telemetry_file import read_points


@dataclass(slots=True)
class PipelineVariant:
    """One of the two pipelines, and what its rounds gave."""

    name: str
    file: Path
    address: str
    socket: Path
    stages: list[ChildProcess]
    rates_per_s: list[float] = field(default_factory=list)  # results a second

    def run_round(self, requests: int) -> None:
        """One more round; the client in this process tells as the stages do."""
        os.environ[SOCKET_VARIABLE] = str(self.socket)
        self.rates_per_s.append(asyncio.run(measure_pipelined(self.file, self.address, requests))[0])


@contextmanager
def start_variant(name: str, folder: Path, address: str, cut: int, window: int) -> Iterator[PipelineVariant]:
    """A pipeline of its own name, whose stages tell who listens at `folder/NAME`, if anybody does."""
    file, socket = folder / f"{name}.toml", folder / name
    text = PIPELINE_TEMPLATE.format(model=MODEL, cut=cut, window=window).replace('name = "bench"', f'name = "{name}"')
    file.write_text(text)
    stages = [
        ChildProcess(
            stage,
            ("stage", str(file), stage, "--broker", address),
            folder / f"{name}-{stage}.log",
            environment={SOCKET_VARIABLE: str(socket)},
        )
        for stage in ("first", "second")
    ]
    try:
        for stage in stages:
            stage.start()
        yield PipelineVariant(name, file, address, socket, stages)
    finally:
        terminate_all(stages)


def measure(kind: BrokerKind, cut: int, requests: int, window: int, rounds: int) -> dict[str, float]:
    """Medians of the rounds of both sides, and what the monitor took for its own."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as name, start_broker(kind=kind) as broker:
        folder = Path(name)
        words = (
            "monitor",
            "--broker",
            broker.address,
            "--socket",
            str(folder / "with"),
            "--store",
            str(folder / STORE),
        )
        monitor = ChildProcess("monitor", words, folder / "monitor.log")
        try:
            monitor.start()
            wait_for_socket(folder / "with")
            with (
                start_variant("with", folder, broker.address, cut, window) as told,
                start_variant("without", folder, broker.address, cut, window) as untold,
            ):
                for each in (told, untold):  # the stages load, and the machine warms up
                    each.run_round(requests)
                    each.rates_per_s.clear()
                used_s, took_s = _rounds((told, untold), monitor.process.pid, requests, rounds)
        finally:
            terminate_all([monitor])
        kept = len(read_points(folder / STORE, "request"))
    return {
        "with_per_s": median(told.rates_per_s),
        "without_per_s": median(untold.rates_per_s),
        "ratio": median(told.rates_per_s) / median(untold.rates_per_s),
        "rounds": rounds,
        "requests": requests,
        "kept": kept,
        "monitor_cores": used_s / took_s,
    }


def _rounds(sides: Sequence[PipelineVariant], pid: int, requests: int, rounds: int) -> tuple[float, float]:
    """All rounds, in turns; the monitor's processor time in those that told it, and how long these took."""
    used_s = took_s = 0.0
    for number in range(rounds):
        for each in sides if number % 2 else sides[::-1]:
            before_s = process_cpu_s(pid)
            each.run_round(requests)
            if each is sides[0]:
                used_s += process_cpu_s(pid) - before_s
                took_s += requests / each.rates_per_s[-1]
    return used_s, took_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=60, help="of a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--window", type=int, default=4)
    parser.add_argument("--cut", type=int, default=11)
    parser.add_argument(
        "--broker", choices=["mosquitto", "embedded"], default="mosquitto" if find_mosquitto() else "embedded"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    row = measure(options.broker, options.cut, options.requests, options.window, options.rounds)
    if options.json:
        print(json.dumps(row))
        return
    table = Table(title=f"VGG-11, two stages, {options.rounds} rounds of {options.requests} in turns, {options.broker}")
    for column in ("with telemetry /s", "without /s", "ratio", "monitor, cores"):
        table.add_column(column, justify="right")
    table.add_row(
        *(f"{row[key]:.2f}" for key in ("with_per_s", "without_per_s")),
        f"{row['ratio']:.3f}",
        f"{row['monitor_cores']:.4f}",
    )
    Console().print(table)


if __name__ == "__main__":
    main()
