"""Who is up, as anybody at the broker may see it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from brokers.dispatch.presence import Birth
from brokers.mqtt.client import MqttTransport
from brokers.protocol.topics import every_presence, tells_of_source
from brokers.protocol.transport import Delivery
from tests.support.pipelines.processes import PATIENCE_S

Workers = dict[str, Birth]


def await_workers(address: str, wanted: Callable[[Workers], object]) -> Workers:
    """The records of all workers (by presence topic) at this broker, as soon as they are as `wanted`."""
    seen = asyncio.run(watch_workers(address, wanted))
    return seen[-1]


async def watch_workers(address: str, wanted: Callable[[Workers], object]) -> list[Workers]:
    """All states of the records, one for each change, up to the first that is as `wanted`."""
    workers: Workers = {}
    states: list[Workers] = [{}]
    reached = asyncio.Event()

    def heard(delivery: Delivery) -> None:
        if tells_of_source(delivery.topic):
            return
        if delivery.payload:
            workers[delivery.topic] = Birth.from_bytes(bytes(delivery.payload))
        else:
            workers.pop(delivery.topic, None)
        states.append(dict(workers))
        if wanted(workers):
            reached.set()

    transport = MqttTransport(address)
    await transport.connect()
    try:
        await transport.subscribe(every_presence(), heard, qos=1)
        await asyncio.wait_for(reached.wait(), PATIENCE_S)
    finally:
        await transport.close()
    return states
