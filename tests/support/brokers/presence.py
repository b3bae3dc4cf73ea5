"""Who is up, as anybody at the broker may see it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from brokers.dispatch.presence import WorkerRecord
from brokers.mqtt.client import MqttTransport
from brokers.protocol.topics import all_presence_filter, is_source_presence
from brokers.protocol.transport import Delivery
from tests.support.pipelines.processes import PROCESS_TIMEOUT_S

WorkerRecords = dict[str, WorkerRecord]


def wait_for_workers(address: str, predicate: Callable[[WorkerRecords], object]) -> WorkerRecords:
    """The records of all workers (by presence topic) at this broker, as soon as they are as `wanted`."""
    seen = asyncio.run(watch_workers(address, predicate))
    return seen[-1]


async def watch_workers(address: str, predicate: Callable[[WorkerRecords], object]) -> list[WorkerRecords]:
    """All states of the records, one for each change, up to the first that is as `wanted`."""
    workers: WorkerRecords = {}
    states: list[WorkerRecords] = [{}]
    reached = asyncio.Event()

    def heard(delivery: Delivery) -> None:
        if is_source_presence(delivery.topic):
            return
        if delivery.payload:
            workers[delivery.topic] = WorkerRecord.from_bytes(bytes(delivery.payload))
        else:
            workers.pop(delivery.topic, None)
        states.append(dict(workers))
        if predicate(workers):
            reached.set()

    transport = MqttTransport(address)
    await transport.connect()
    try:
        await transport.subscribe(all_presence_filter(), heard, qos=1)
        await asyncio.wait_for(reached.wait(), PROCESS_TIMEOUT_S)
    finally:
        await transport.close()
    return states
