"""Presence records of workers, read from a broker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from brokers.dispatch.presence import WorkerRecord
from brokers.dispatch.worker_registry import PresenceEvent, PresenceListener
from brokers.mqtt.client import MqttTransport
from brokers.protocol.topics import all_presence_filter
from tests.support.pipelines.processes import PROCESS_TIMEOUT_S

WorkerRecords = dict[str, WorkerRecord]  # by presence topic


def wait_for_workers(address: str, predicate: Callable[[WorkerRecords], object]) -> WorkerRecords:
    """Return the records of all workers at this broker, as soon as they satisfy the predicate."""
    return asyncio.run(watch_workers(address, predicate))[-1]


async def watch_workers(address: str, predicate: Callable[[WorkerRecords], object]) -> list[WorkerRecords]:
    """Return all states of the records, one for each change, up to the first that satisfies the predicate."""
    states: list[WorkerRecords] = [{}]
    is_reached = asyncio.Event()

    def on_event(event: PresenceEvent) -> None:
        workers = {topic: entry.record for topic, entry in listener.registry.workers.items()}
        if workers != states[-1]:
            states.append(workers)
        if predicate(workers):
            is_reached.set()

    transport = MqttTransport(address)
    listener = PresenceListener(transport, on_event)
    await transport.connect()
    try:
        await listener.subscribe(all_presence_filter())
        await asyncio.wait_for(is_reached.wait(), PROCESS_TIMEOUT_S)
    finally:
        await listener.close()
        await transport.close()
    return states
