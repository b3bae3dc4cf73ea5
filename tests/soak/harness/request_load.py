"""A program that asks a pipeline of two stages, `double` and `add_one`, for is_long_run, and says what it holds afterwards.

    python -m tests.soak.harness.request_load FILE BROKER COUNT VALUES

asks COUNT times for VALUES numbers. It says "begun" when it begins, "asked" when all answers are in, and ends with one
line of JSON.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil

from sources.client.offloader import Offloader
from tests.soak.harness.resource_usage import count_reachable_objects

# More than there is room for in flight, so that some wait for their turn at all times.
CONCURRENCY = 8
# The share of the requests after which everything has been used, and what is kept for use again is there.
WARM_UP_FRACTION = 0.1
# Until the monitor has been told of all that happened: ten times what that takes.
TELEMETRY_FLUSH_S = 0.5


async def _ask(offload: Offloader, numbers: Iterator[int], values: int) -> None:
    for number in numbers:
        answer = await offload(np.full(values, float(number)))
        assert answer.shape == (values,)
        assert answer[0] == answer[-1] == 2.0 * number + 1


async def _ask_all(offload: Offloader, numbers: range, values: int) -> int:
    """Ask for each number; return how many objects the offloader then holds."""
    given = iter(numbers)
    await asyncio.gather(*(_ask(offload, given, values) for _ in range(CONCURRENCY)))
    await asyncio.sleep(TELEMETRY_FLUSH_S)
    gc.collect()
    return count_reachable_objects(offload)


async def run_load(file: str, address: str, count: int, values: int) -> dict[str, Any]:
    warm = int(WARM_UP_FRACTION * count)
    async with Offloader(file, broker=address) as offload:
        await _ask_all(offload, range(CONCURRENCY), values)
        print("begun", flush=True)
        begin_s = time.monotonic()
        early = await _ask_all(offload, range(warm), values)
        late = await _ask_all(offload, range(warm, count), values)
        elapsed_s = time.monotonic() - begin_s
        print("asked", flush=True)
    others = asyncio.all_tasks() - {asyncio.current_task()}
    return {
        "elapsed_s": round(elapsed_s, 1),
        "counters": dict(offload.counters),
        "objects": [early, late],
        "tasks": [task.get_name() for task in others if task],
    }


def open_resources() -> list[Any]:
    """What this process has open: the number of its descriptors, and its threads by name."""
    return [psutil.Process().num_fds(), sorted(each.name for each in threading.enumerate())]


def main() -> None:
    _, file, address, count, values = sys.argv
    before = open_resources()
    told = asyncio.run(run_load(file, address, int(count), int(values)))
    print(json.dumps({**told, "before": before, "after": open_resources()}), flush=True)


if __name__ == "__main__":
    main()
