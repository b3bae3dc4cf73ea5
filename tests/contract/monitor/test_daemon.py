"""The daemon between a broker that any client may publish to, and clients of its HTTP server."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import pytest

from brokers.errors import BrokerUnreachable, PortTaken
from monitor.daemon.daemon import Daemon
from tests.support.brokers.broker_kinds import run_async
from tests.support.brokers.in_memory import MemoryBroker, MemoryTransport
from tests.support.brokers.ports import free_port
from tests.support.brokers.presence_records import source_publication, worker_publication
from tests.support.monitor.http_client import fetch_metrics, fetch_stages, http_get
from tests.support.monitor.prometheus_series import series_value

MALFORMED = [
    ("sparse/local/street/body/up/x", b"\xff\xfe"),
    ("sparse/local/street/body/up/x", b"[" * 60_000),
    ("sparse/local/street/body/up/x", b"null"),
    ("sparse/local/street/body/up/x", b"{" + b'"a": 1,' * 100_000 + b"}"),
    ("sparse/local/street/body/up/x", worker_publication("w1")[1].to_bytes()),
    ("sparse/local/street/body/up/x", worker_publication("x")[1].model_copy(update={"version": "9"}).to_bytes()),
    ("sparse/local/street/source/up/x", worker_publication("x", "source")[1].to_bytes()),
    ('sparse/a b/\u00e9{}"/body/up/x', worker_publication("x")[1].to_bytes()),
]


@contextlib.asynccontextmanager
async def watching(broker: MemoryBroker) -> AsyncIterator[tuple[int, MemoryTransport]]:
    """The port of a daemon, and a client that may publish."""
    client, port, daemon = MemoryTransport(broker), free_port(), Daemon(MemoryTransport(broker))
    await client.connect()
    await daemon.start("127.0.0.1", port)
    try:
        yield port, client
    finally:
        await daemon.stop()
        await client.close()


def test_malformed_records_are_counted_and_change_nothing() -> None:
    async def test() -> None:
        async with watching(MemoryBroker()) as (port, client):
            for topic, payload in MALFORMED:
                await client.publish(topic, payload, retain=True)
            topic, record = worker_publication("w1", queue=3)
            await client.publish(topic, record.to_bytes(), retain=True)
            series = await asyncio.to_thread(fetch_metrics, port)
            assert series_value(series, "sparse_workers", state="up") == 1
            assert series_value(series, "sparse_worker_queue", worker="w1") == 3
            assert series_value(series, "sparse_monitor_refused_total") == len(MALFORMED)
            stages = await asyncio.to_thread(fetch_stages, port)
            assert {pipeline: list(metrics) for pipeline, metrics in stages.items()} == {"street": ["body"]}

    run_async(test())


def test_stages_are_unavailable_without_the_broker() -> None:
    async def test() -> None:
        broker = MemoryBroker()
        async with watching(broker) as (port, client):
            for topic, record in (worker_publication(queue=3), source_publication(window=4)):
                await client.publish(topic, record.to_bytes(), retain=True)
            connected = await asyncio.to_thread(http_get, port, "/health")
            assert connected == (200, "text/plain; charset=utf-8", "connected to memory://hub\n")
            broker.stop()
            for path in ("/health", "/stages"):
                status, _, text = await asyncio.to_thread(http_get, port, path)
                assert (status, text) == (503, "not connected to memory://hub\n")
            series = await asyncio.to_thread(fetch_metrics, port)
            assert series_value(series, "sparse_broker_connected") == 0
            broker.start()
            status, _, text = await asyncio.to_thread(http_get, port, "/stages")
            assert (status, json.loads(text)["street"]["body"]["queue"]) == (200, 3)

    run_async(test())


def test_daemon_that_cannot_start_leaves_nothing_behind() -> None:
    async def test() -> None:
        broker, port = MemoryBroker(), free_port()
        broker.stop()
        unconnected = Daemon(MemoryTransport(broker))
        with pytest.raises(BrokerUnreachable):
            await unconnected.start("127.0.0.1", port)
        await unconnected.stop()
        broker.start()
        first, second = Daemon(MemoryTransport(broker)), Daemon(MemoryTransport(broker))
        await first.start("127.0.0.1", port)
        with pytest.raises(PortTaken):
            await second.start("127.0.0.1", port)
        await second.stop()
        await first.stop()

    run_async(test())
