"""Memory layout of networks on a CPU: forward times channels first and channels last.

    python -m tests.bench.layout

One thread, batch 1, both layouts in turns, medians. `stages.loading.part_loader` uses channels last because of ratios
below 1.0.
"""

from __future__ import annotations

import copy
import time
from statistics import median
from typing import Any

import torch

from stages.models.registry import get_model_spec
from tests.bench.harness.output import make_parser, print_json, print_table

NETWORKS = ("yolov3-tiny", "torchvision:vgg11", "torchvision:resnet18", "torchvision:mobilenet_v3_small")
WARM_UP = 2
COLUMNS = {
    "network": ("network", ""),
    "channels first, ms": ("channels_first_ms", ".1f"),
    "channels last, ms": ("channels_last_ms", ".1f"),
    "ratio": ("ratio", ".2f"),
}


def measure(name: str, runs: int) -> dict[str, Any]:
    spec = get_model_spec(name)
    assert spec.input_shape is not None
    channels_first = spec.build().eval()
    channels_last = copy.deepcopy(channels_first).to(memory_format=torch.channels_last)
    inputs = torch.rand(spec.input_shape)
    times_ms: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode():
        for _ in range(WARM_UP + runs):
            for model, times in zip((channels_first, channels_last), times_ms, strict=True):
                begin_s = time.perf_counter()
                model(inputs)
                times.append(1000 * (time.perf_counter() - begin_s))
    first_ms, last_ms = (median(times[WARM_UP:]) for times in times_ms)
    return {"network": name, "channels_first_ms": first_ms, "channels_last_ms": last_ms, "ratio": last_ms / first_ms}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--runs", type=int, default=10, help="of each layout (default 10)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(name, options.runs) for name in NETWORKS]
    print_table("Forward pass of whole networks, batch 1, one thread", COLUMNS, rows)
    print_json(options, {"rows": rows})


if __name__ == "__main__":
    main()
