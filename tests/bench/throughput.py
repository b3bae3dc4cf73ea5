"""Pipelined throughput: how close a pipeline comes to the upper bound that its slowest stage sets.

    python -m tests.bench.throughput

VGG-11 at 224x224, batch 1, cut into two stages of one thread, through a broker. Results per second of

* unsplit: the whole network, alone in this process;
* bound: the slower of the two stages, alone in this process, measured before and after the pipeline;
* pipelined: both stages as workers, with a full window of requests throughout.

Compare ratios of one run: absolute rates change with the machine and its other load.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from brokers.server.local_broker import BrokerKind, start_broker
from sources import Offloader
from sources.conversion import to_content
from stages.loading.part_loader import load_part
from stages.models.registry import get_model_spec
from tests.bench.harness.output import add_broker_option, make_parser, print_json, print_table
from tests.bench.harness.processes import start_stages

MODEL = "torchvision:vgg11"
INPUT_SHAPE = (1, 3, 224, 224)
CUTS = (11, 6)
STAGES = ("first", "second")
WARM_UP = 6
SOLO_RUNS = 12
PIPELINE_TEMPLATE = """
[pipeline]
name = "{name}"
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
COLUMNS = {
    "cut after layer": ("cut", ""),
    "unsplit/s": ("unsplit_per_s", ".2f"),
    "bound/s": ("bound_per_s", ".2f"),
    "pipelined/s": ("pipelined_per_s", ".2f"),
    "of the bound": ("of_bound", ".2f"),
    "of unsplit": ("of_unsplit", ".2f"),
}


def write_bench_pipeline(folder: Path, cut: int, window: int, name: str = "bench") -> Path:
    file = folder / f"{name}.toml"
    file.write_text(PIPELINE_TEMPLATE.format(name=name, model=MODEL, cut=cut, window=window))
    return file


def solo_forward_ms(cuts: Sequence[int]) -> list[float]:
    """The median forward time of each part in milliseconds, alone and in the layout that workers use."""
    spec = get_model_spec(MODEL)
    values = {spec.input_name: torch.rand(INPUT_SHAPE)}
    times_ms = []
    for index in range(len(cuts) + 1):
        part = load_part(spec, cuts, index, None, 0, "cpu")
        inputs = {part.input_names[0]: next(iter(values.values()))}
        runs_ms = []
        with torch.inference_mode():
            for _ in range(SOLO_RUNS):
                begin_s = time.perf_counter()
                values = part(inputs)
                runs_ms.append(1000 * (time.perf_counter() - begin_s))
        times_ms.append(median(runs_ms[2:]))
    return times_ms


async def measure_pipelined(file: Path, address: str, requests: int) -> tuple[float, dict[str, float]]:
    """Results per second with a full window, and the median compute time of each stage in milliseconds."""
    images = [torch.rand(INPUT_SHAPE) for _ in range(4)]
    compute_ms: dict[str, list[float]] = {}
    async with Offloader(file, broker=address) as offload:
        await asyncio.gather(*(offload(images[0]) for _ in range(WARM_UP)))
        begin_s = time.perf_counter()
        finished = await asyncio.gather(*(offload.request(to_content(images[i % 4])) for i in range(requests)))
        elapsed_s = time.perf_counter() - begin_s
    for request in finished:
        for hop in request.result.hops:
            compute_ms.setdefault(hop.stage, []).append(hop.compute_ms)
    return requests / elapsed_s, {stage: median(times) for stage, times in compute_ms.items()}


def measure(cut: int, kind: BrokerKind, requests: int, window: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    before_ms = solo_forward_ms([cut])
    unsplit_ms = solo_forward_ms([])[0]
    with tempfile.TemporaryDirectory() as name, start_broker(kind=kind) as broker:
        folder = Path(name)
        file = write_bench_pipeline(folder, cut, window)
        with start_stages(file, broker.address, folder, dict.fromkeys(STAGES, ())):
            rate, compute_ms = asyncio.run(measure_pipelined(file, broker.address, requests))
    after_ms = solo_forward_ms([cut])
    slowest_ms = max((before + after) / 2 for before, after in zip(before_ms, after_ms, strict=True))
    return {
        "cut": cut,
        "unsplit_per_s": 1000 / unsplit_ms,
        "bound_per_s": 1000 / slowest_ms,
        "pipelined_per_s": rate,
        "of_bound": rate * slowest_ms / 1000,
        "of_unsplit": rate * unsplit_ms / 1000,
        "compute_ms": compute_ms,
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--requests", type=int, default=100, help="for each cut (default 100)")
    parser.add_argument("--window", type=int, default=4, help="requests in flight (default 4)")
    parser.add_argument("--cut", type=int, action="append", help="after this layer; may be repeated (default 11 and 6)")
    add_broker_option(parser)
    options = parser.parse_args()
    rows = [measure(cut, options.broker, options.requests, options.window) for cut in options.cut or CUTS]
    title = f"VGG-11 at 224x224, batch 1, two stages of one thread, window {options.window}, {options.broker}"
    print_table(title, COLUMNS, rows)
    print_json(options, {"broker": options.broker, "window": options.window, "rows": rows})


if __name__ == "__main__":
    main()
