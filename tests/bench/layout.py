"""What channels-last costs or saves on this CPU, one thread: `python -m tests.bench.layout`.

Why `stages.worker.model_executor` lays a part out so: times of both layouts in turns, medians, and their ratio (below 1.0: it
saves).
"""

from __future__ import annotations

import copy
import time
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from stages.models.registry import get_model_spec

NETWORKS = ("yolov3-tiny", "torchvision:vgg11", "torchvision:resnet18", "torchvision:mobilenet_v3_small")
RUNS = 10


def measure(name: str) -> tuple[float, float]:
    """Median forward times in milliseconds, batch 1: channels first, channels last."""
    spec = get_model_spec(name)
    assert spec.input_shape is not None
    first = spec.build().eval()
    last = copy.deepcopy(first).to(memory_format=torch.channels_last)
    value = torch.rand(spec.input_shape)
    times: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode():
        for _ in range(RUNS + 2):
            for model, runs in zip((first, last), times, strict=True):
                begin_s = time.perf_counter()
                model(value)
                runs.append(1000 * (time.perf_counter() - begin_s))
    return median(times[0][2:]), median(times[1][2:])


def main() -> None:
    torch.set_num_threads(1)
    table = Table(title="forward of the whole network, batch 1, one thread", title_justify="left")
    for column in ("network", "channels first, ms", "channels last, ms", "ratio"):
        table.add_column(column, justify="right" if column != "network" else "left")
    for name in NETWORKS:
        first_ms, last_ms = measure(name)
        table.add_row(name, f"{first_ms:.1f}", f"{last_ms:.1f}", f"{last_ms / first_ms:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
