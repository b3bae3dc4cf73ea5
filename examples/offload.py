"""The Python way in: one request, many at once, and one that fails. Two commands, in two terminals:

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
        found = await offload({"celsius": np.array(21.5)})
        print(f"one: {found['celsius']} degrees, alarm: {found['alarm']}")

        # As many as the window takes are on their way at a time; the others wait here.
        warming = [offload({"celsius": np.array(celsius)}) for celsius in np.linspace(22.0, 40.0, 50)]
        answers = await asyncio.gather(*warming)
        print(f"many: {len(answers)} answers, the last is {answers[-1]['celsius']} degrees")

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
