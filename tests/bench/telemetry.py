"""Cost of telemetry: the throughput of a pipeline with and without a monitor.

    python -m tests.bench.telemetry

The pipeline of `tests.bench.throughput` (VGG-11 at 224x224, two stages of one thread), twice on one broker: the
processes of one send events to a `sparse monitor` that writes a SQLite file and samples the node; those of the other
find no monitor. Both are up throughout and are measured in turns, so that other load on the machine affects both.
"ratio" is that of the median rates; "monitor, cores" is the processor time of the monitor over its rounds.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from brokers.server.local_broker import BrokerKind, start_broker
from brokers.telemetry.client import SOCKET_VARIABLE
from monitor.launch.child_process import ChildProcess
from monitor.stores.sqlite import TELEMETRY_FILE
from tests.bench.harness.output import add_broker_option, make_parser, print_json, print_table
from tests.bench.harness.processes import process_cpu_s, running, start_stages, wait_until
from tests.bench.throughput import STAGES, measure_pipelined, write_bench_pipeline
from tests.support.monitor.telemetry_file import read_points

COLUMNS = {
    "with telemetry/s": ("with_per_s", ".2f"),
    "without/s": ("without_per_s", ".2f"),
    "ratio": ("ratio", ".3f"),
    "monitor, cores": ("monitor_cores", ".4f"),
}


@dataclass(slots=True)
class PipelineVariant:
    """One of the two pipelines, and the rates of its rounds."""

    file: Path
    address: str
    socket: Path
    rates_per_s: list[float] = field(default_factory=list)

    def run_round(self, requests: int) -> float:
        """Measure one more round; return its seconds. The client in this process sends events as the stages do."""
        os.environ[SOCKET_VARIABLE] = str(self.socket)
        self.rates_per_s.append(asyncio.run(measure_pipelined(self.file, self.address, requests))[0])
        return requests / self.rates_per_s[-1]


def measure(kind: BrokerKind, cut: int, requests: int, window: int, rounds: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as name, start_broker(kind=kind) as broker:
        folder = Path(name)
        variants = [
            PipelineVariant(write_bench_pipeline(folder, cut, window, each), broker.address, folder / each)
            for each in ("with", "without")
        ]
        socket = variants[0].socket
        store = folder / TELEMETRY_FILE
        options = ("--broker", broker.address, "--socket", str(socket), "--store", str(store))
        monitor = ChildProcess("monitor", ("monitor", *options), folder / "monitor.log")
        with running(monitor):
            wait_until(socket.exists, "the socket of the monitor")
            stages = [
                start_stages(
                    variant.file,
                    broker.address,
                    folder,
                    dict.fromkeys(STAGES, ()),
                    **{SOCKET_VARIABLE: str(variant.socket)},
                )
                for variant in variants
            ]
            with stages[0], stages[1]:
                monitor_cores = _run_rounds(variants, monitor.process.pid, requests, rounds)
        stored = len(read_points(store, "request"))
    with_per_s, without_per_s = (median(variant.rates_per_s) for variant in variants)
    return {
        "with_per_s": with_per_s,
        "without_per_s": without_per_s,
        "ratio": with_per_s / without_per_s,
        "rounds": rounds,
        "requests": requests,
        "stored_requests": stored,
        "monitor_cores": monitor_cores,
    }


def _run_rounds(variants: list[PipelineVariant], monitor_pid: int, requests: int, rounds: int) -> float:
    """Run all rounds in turns after a warm-up; return the cores that the monitor used in the rounds with telemetry."""
    for variant in variants:
        variant.run_round(requests)
        variant.rates_per_s.clear()
    cpu_s = elapsed_s = 0.0
    for number in range(rounds):
        for variant in variants if number % 2 else variants[::-1]:
            begin_cpu_s = process_cpu_s(monitor_pid)
            round_s = variant.run_round(requests)
            if variant is variants[0]:
                cpu_s += process_cpu_s(monitor_pid) - begin_cpu_s
                elapsed_s += round_s
    return cpu_s / elapsed_s


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--requests", type=int, default=60, help="of a round (default 60)")
    parser.add_argument("--rounds", type=int, default=7, help="of each pipeline (default 7)")
    parser.add_argument("--window", type=int, default=4, help="requests in flight (default 4)")
    parser.add_argument("--cut", type=int, default=11, help="after this layer (default 11)")
    add_broker_option(parser)
    options = parser.parse_args()
    row = measure(options.broker, options.cut, options.requests, options.window, options.rounds)
    title = f"VGG-11, two stages, {options.rounds} rounds of {options.requests} requests in turns, {options.broker}"
    print_table(title, COLUMNS, [row])
    print_json(options, {"broker": options.broker, **row})


if __name__ == "__main__":
    main()
