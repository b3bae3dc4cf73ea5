"""The monitor between a broker that anybody may publish to, and HTTP clients."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from brokers.errors import BrokerUnreachable, PortTaken
from brokers.mqtt.in_memory import MemoryBroker, MemoryTransport
from monitor.daemon.daemon import Daemon
from tests.support.brokers.broker_kinds import run_async
from tests.support.brokers.ports import free_port
from tests.support.brokers.presence_records import source_record, worker_record
from tests.support.monitor.http_client import fetch_metrics, fetch_stages, http_get
from tests.support.monitor.prometheus_text import series_value


@contextlib.asynccontextmanager
async def watching(hub: MemoryBroker) -> AsyncIterator[tuple[int, MemoryTransport]]:
    """A monitor's port, and a client that may publish."""
    client, port, daemon = MemoryTransport(hub), free_port(), Daemon(MemoryTransport(hub))
    await client.connect()
    await daemon.start("127.0.0.1", port)
    try:
        yield port, client
    finally:
        await daemon.stop()
        await client.close()


@pytest.mark.parametrize(
    ("topic", "payload"),
    [
        ("sparse/local/street/body/up/x", b"\xff\xfe"),
        ("sparse/local/street/body/up/x", b"[" * 60_000),
        ("sparse/local/street/body/up/x", b"null"),
        ("sparse/local/street/body/up/x", b"{" + b'"a": 1,' * 100_000 + b"}"),
        ("sparse/local/street/body/up/x", worker_record("w1")[1].to_bytes()),
        ("sparse/local/street/body/up/x", worker_record("x")[1].model_copy(update={"version": "9"}).to_bytes()),
        ("sparse/local/street/source/up/x", worker_record("x", "source")[1].to_bytes()),
        ("sparse/a b/\u00e9{}\"/body/up/x", worker_record("x")[1].to_bytes()),
    ],
)  # fmt: skip
def test_what_is_no_record_is_counted_and_changes_nothing(topic: str, payload: bytes) -> None:
    async def test() -> None:
        async with watching(MemoryBroker()) as (port, client):
            known, birth = worker_record("w1", queue=3)
            await client.publish(known, birth.to_bytes(), retain=True)
            await client.publish(topic, payload, retain=True)
            await asyncio.sleep(0.02)
            series = await asyncio.to_thread(fetch_metrics, port)
            assert series_value(series, "sparse_worker_queue", worker="w1") == 3
            assert series_value(series, "sparse_monitor_refused_total") == 1
            stages = await asyncio.to_thread(fetch_stages, port)
            assert {name: list(found) for name, found in stages.items()} == {"street": ["body"]}

    run_async(test())


def test_without_the_broker_no_figures_are_made_up_and_with_it_they_are_back() -> None:
    async def test() -> None:
        hub = MemoryBroker()
        async with watching(hub) as (port, client):
            for topic, record in (worker_record(queue=3), source_record(window=4)):
                await client.publish(topic, record.to_bytes(), retain=True)
            await asyncio.sleep(0.02)
            assert await asyncio.to_thread(http_get, port, "/health") == (
                200, "text/plain; charset=utf-8", "connected to memory://hub\n",
            )  # fmt: skip
            hub.stop()
            for path in ("/health", "/stages"):
                status, _, said = await asyncio.to_thread(http_get, port, path)
                assert (status, said) == (503, "not connected to memory://hub\n")
            series = await asyncio.to_thread(fetch_metrics, port)
            assert series_value(series, "sparse_broker_connected") == 0
            hub.start()
            assert (await asyncio.to_thread(http_get, port, "/health"))[0] == 200
            assert (await asyncio.to_thread(fetch_stages, port))["street"]["body"]["queue"] == 3

    run_async(test())


def test_one_that_cannot_start_leaves_nothing_behind() -> None:
    async def test() -> None:
        hub, port = MemoryBroker(), free_port()
        hub.stop()
        away = Daemon(MemoryTransport(hub))
        with pytest.raises(BrokerUnreachable):
            await away.start("127.0.0.1", port)
        await away.stop()
        hub.start()
        first, second = Daemon(MemoryTransport(hub)), Daemon(MemoryTransport(hub))
        await first.start("127.0.0.1", port)
        with pytest.raises(PortTaken):
            await second.start("127.0.0.1", port)
        await second.stop()
        await first.stop()

    run_async(test())
