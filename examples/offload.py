"""The Python API: one request, many at once, one that fails, one past its deadline. Run in two terminals:

sparse run examples/sensor.toml
python examples/offload.py mqtt://127.0.0.1:1883
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import numpy as np

from brokers.errors import DeadlinePassed, RequestFailed
from sources import Offloader

PIPELINE = Path(__file__).with_name("sensor.toml")


async def main(broker: str) -> None:
    async with Offloader(PIPELINE, broker=broker) as offload:
        result = await offload({"celsius": np.array(21.5)})
        print(f"one: {result['celsius']} degrees, alarm: {result['alarm']}")

        # The in-flight window bounds how many are sent at a time; the others wait here.
        requests = [offload({"celsius": np.array(celsius)}) for celsius in np.linspace(22.0, 40.0, 50)]
        results = await asyncio.gather(*requests)
        print(f"many: {len(results)} results, the last is {results[-1]['celsius']} degrees")

        try:
            await offload({"fahrenheit": np.array(70.7)})
        except RequestFailed as failure:
            print(f"failed: stage {failure.stage!r} says {failure.reason}")

        try:
            await offload({"celsius": np.array(21.5)}, deadline_ms=0.01)
        except DeadlinePassed as late:
            print(f"late: {late.deadline_ms} ms are not enough")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
