"""How near a pipeline comes to its bound: `python -m tests.bench.throughput`.

VGG-11 at 224x224, batch 1, in two stages with one thread each, through Mosquitto (or the embedded broker). The bound is
what the slower stage computes alone, in this process, with nothing else running, measured before and after; the unsplit
network is measured the same way. Ratios within one run are what counts: absolute figures change with the machine and
its neighbours.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from brokers.server.local_broker import BrokerKind, start_broker
from brokers.server.mosquitto_conf import find_mosquitto as find_mosquitto
from monitor.launch.child_process import ChildProcess, terminate_all
from sources.client.offloader import Offloader
from sources.conversion import to_content
from stages.models.registry import get_model_spec
from stages.partition.part_loader import load_part

MODEL = "torchvision:vgg11"
WARM_UP = 6
SOLO_RUNS = 12
PIPELINE_TEMPLATE = """
[pipeline]
name = "bench"
model = "{model}"
cuts = [{cut}]
[[stage]]
name = "first"
threads = 1
[[stage]]
name = "second"
threads = 1
[source]
window = {window}
"""


def solo_forward_ms(cuts: list[int]) -> list[float]:
    """The median time of each part's forward, alone, in milliseconds."""
    spec = get_model_spec(MODEL)
    values = {spec.input_name: torch.rand(1, 3, 224, 224)}
    times = []
    for index in range(len(cuts) + 1):
        part = load_part(spec, cuts, index, None, 0, "cpu").to(memory_format=torch.channels_last)  # as a worker does
        values = {part.input_names[0]: next(iter(values.values()))}
        runs = []
        with torch.inference_mode():
            for _ in range(SOLO_RUNS):
                begin_s = time.perf_counter()
                given = part(values)
                runs.append(1000 * (time.perf_counter() - begin_s))
        times.append(median(runs[2:]))
        values = given
    return times


async def measure_pipelined(file: Path, address: str, requests: int) -> tuple[float, dict[str, float]]:
    """Results a second, and the stages' own compute times, with the window full throughout."""
    pictures = [torch.rand(1, 3, 224, 224) for _ in range(4)]
    computed: dict[str, list[float]] = {}
    async with Offloader(file, broker=address) as offload:
        await asyncio.gather(*(offload(pictures[0]) for _ in range(WARM_UP)))
        begin_s = time.perf_counter()
        answers = await asyncio.gather(*(offload.request(to_content(pictures[index % 4])) for index in range(requests)))
        elapsed_s = time.perf_counter() - begin_s
    for answer in answers:
        for hop in answer.result.hops:
            computed.setdefault(hop.stage, []).append(hop.compute_ms)
    return requests / elapsed_s, {stage: median(times) for stage, times in computed.items()}


def measure(cut: int, kind: BrokerKind, requests: int, window: int) -> dict[str, Any]:
    """All rates of one cut, in results a second."""
    torch.set_num_threads(1)
    before = solo_forward_ms([cut])
    whole_ms = solo_forward_ms([])[0]
    with tempfile.TemporaryDirectory() as folder, start_broker(kind=kind) as broker:
        file = Path(folder) / "bench.toml"
        file.write_text(PIPELINE_TEMPLATE.format(model=MODEL, cut=cut, window=window))
        stages = [
            ChildProcess(name, ("stage", str(file), name, "--broker", broker.address), Path(folder) / f"{name}.log")
            for name in ("first", "second")
        ]
        try:
            for stage in stages:
                stage.start()
            rate, computed = asyncio.run(measure_pipelined(file, broker.address, requests))
        finally:
            terminate_all(stages)
    after = solo_forward_ms([cut])
    slowest_ms = max((before[part] + after[part]) / 2 for part in range(2))
    return {
        "cut": cut,
        "broker": kind,
        "unsplit_per_s": 1000 / whole_ms,
        "bound_per_s": 1000 / slowest_ms,
        "pipelined_per_s": rate,
        "of_bound": rate * slowest_ms / 1000,
        "of_unsplit": rate * whole_ms / 1000,
        "compute_ms": computed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--window", type=int, default=4)
    parser.add_argument("--cut", type=int, action="append", help="after so many layers; may be given twice (11 and 6)")
    parser.add_argument(
        "--broker", choices=["mosquitto", "embedded"], default="mosquitto" if find_mosquitto() else "embedded"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = [measure(cut, options.broker, options.requests, options.window) for cut in options.cut or [11, 6]]
    if options.json:
        print(json.dumps(rows))
        return
    table = Table(
        title=f"VGG-11 at 224x224, batch 1, two stages of one thread, window {options.window}, {options.broker}"
    )
    for column in ("cut after", "unsplit /s", "bound /s", "pipelined /s", "of the bound", "of unsplit"):
        table.add_column(column, justify="right")
    for row in rows:
        rates = (
            f"{row[key]:.2f}" for key in ("unsplit_per_s", "bound_per_s", "pipelined_per_s", "of_bound", "of_unsplit")
        )
        table.add_row(str(row["cut"]), *rates)
    Console().print(table)


if __name__ == "__main__":
    main()
