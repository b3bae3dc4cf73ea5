"""A program that sends many requests to a pipeline of the stages `double` and `add_one` and reports what it holds.

    python -m tests.soak.harness.request_load FILE BROKER COUNT VALUES NAME=PID...

sends COUNT requests of VALUES numbers each. It samples its own resources and those of the given processes at every
fortieth of the requests, and ends with one line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import psutil

from sources.client.offloader import Offloader
from tests.soak.harness.resource_usage import ResourceRecorder, count_reachable_objects, settle

# More than the window of two workers, so that some requests always wait for a slot.
CONCURRENCY = 8
# Share of the requests after which caches and buffers that are reused have been allocated.
WARM_UP_FRACTION = 0.1
SAMPLES = 40
# The number of objects of an offloader varies by the calls in progress while they are counted. Between a hundred
# requests and ten thousand a difference of three was seen; an object that is kept for every tenth request is far more.
OBJECT_TOLERANCE = 25


async def _send_requests(
    offload: Offloader, numbers: Iterator[int], values: int, on_result: Callable[[int], None]
) -> None:
    for number in numbers:
        result = await offload(np.full(values, float(number)))
        assert result.shape == (values,)
        assert result[0] == result[-1] == 2.0 * number + 1
        on_result(number)


async def _send_all(
    offload: Offloader, numbers: range, values: int, on_result: Callable[[int], None] = lambda number: None
) -> None:
    shared = iter(numbers)
    await asyncio.gather(*(_send_requests(offload, shared, values, on_result) for _ in range(CONCURRENCY)))


async def run_load(file: str, address: str, count: int, values: int, pids: dict[str, int]) -> dict[str, Any]:
    warm_up = int(WARM_UP_FRACTION * count)
    recorder = ResourceRecorder({**pids, "source": os.getpid()})

    def sample(number: int) -> None:
        if number % max(1, (count - warm_up) // SAMPLES) == 0:
            recorder.sample()

    async with Offloader(file, broker=address) as offload:
        begin_s = time.monotonic()
        await _send_all(offload, range(warm_up), values)
        early = await settle(lambda: count_reachable_objects(offload))
        await _send_all(offload, range(warm_up, count), values, sample)
        elapsed_s = time.monotonic() - begin_s
        target = early + OBJECT_TOLERANCE if values == 1 else None  # the ids of chunked messages are kept for a while
        late = await settle(lambda: count_reachable_objects(offload), target)
    others = asyncio.all_tasks() - {asyncio.current_task()}
    return {
        "elapsed_s": round(elapsed_s, 1),
        "counters": dict(offload.counters),
        "object_counts": [early, late],
        "trends": [trend.to_json() for trend in recorder.trends()],
        "leftover_tasks": [task.get_name() for task in others if task],
    }


def open_resources() -> list[Any]:
    """The number of open file descriptors of this process, and the names of its threads."""
    return [psutil.Process().num_fds(), sorted(thread.name for thread in threading.enumerate())]


def main() -> None:
    _, file, address, count, values, *processes = sys.argv
    pids = {name: int(pid) for name, _, pid in (process.partition("=") for process in processes)}
    before = open_resources()
    report = asyncio.run(run_load(file, address, int(count), int(values), pids))
    print(json.dumps({**report, "resources_before": before, "resources_after": open_resources()}), flush=True)


if __name__ == "__main__":
    main()
