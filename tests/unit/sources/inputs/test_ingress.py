"""The ingress gateway over the in-memory broker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from brokers.protocol.messages import JPEG, JSON
from brokers.protocol.transport import Delivery, Properties
from sources.inputs import ingress
from sources.inputs.ingress import IngressGateway, sample_from_delivery
from sources.inputs.source import SampleBuffer
from tests.support.brokers.broker_kinds import run_async
from tests.support.brokers.in_memory import MemoryBroker, MemoryTransport
from tests.support.environment.clips import frame_number, image_bytes


class Gateway:
    """A gateway of site `local`, a client that publishes, and the rejections."""

    def __init__(self) -> None:
        self.hub = hub = MemoryBroker()
        self.buffer = SampleBuffer("all")
        self.rejections: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.transport = MemoryTransport(hub)
        self.client = MemoryTransport(hub)
        self.gateway = IngressGateway(self.transport, "local", self.buffer, self.reject)

    async def reject(self, source: str, rejection: dict[str, Any]) -> bool:
        self.rejections.put_nowait(rejection)
        return True

    async def start(self) -> None:
        await self.transport.connect()
        await self.client.connect()
        await self.gateway.start()

    async def publish(self, source: str, payload: bytes, content_type: str = "", *, retain: bool = False) -> None:
        properties = Properties(content_type=content_type)
        await self.client.publish(f"sparse/local/ingress/{source}", payload, properties, qos=1, retain=retain)

    async def stop(self) -> None:
        await self.gateway.stop()
        await self.transport.close()
        await self.client.close()


def with_gateway(test: Callable[[Gateway], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        gateway = Gateway()
        await gateway.start()
        await test(gateway)
        await gateway.stop()

    run_async(main())


def test_messages_become_samples_numbered_by_source() -> None:
    async def test(gateway: Gateway) -> None:
        for source, payload in (("door", image_bytes("JPEG", 5)), ("gate", b'{"x": 1}'), ("door", b"[1]")):
            await gateway.publish(source, payload)
        samples = [await gateway.buffer.get() for _ in range(3)]
        assert [(sample.source, sample.index, sample.content_type) for sample in samples if sample] == [
            ("door", 0, JPEG), ("gate", 0, JSON), ("door", 1, JSON),
        ]  # fmt: skip
        picture = samples[0]
        assert picture is not None
        assert picture.load_image is not None
        assert frame_number(picture.load_image()) == 5

    with_gateway(test)


def test_malformed_message_is_rejected_with_its_index() -> None:
    async def test(gateway: Gateway) -> None:
        await gateway.publish("door", b"[1]")
        await gateway.publish("door", b"\x00\x01")
        rejection = await gateway.rejections.get()
        assert (rejection["source"], rejection["index"], rejection["error"]) == ("door", 1, "BadPayload")
        assert gateway.gateway.counters == {"refused": 1}

    with_gateway(test)


def test_long_names_are_ignored_and_drain_ends_the_subscription() -> None:
    async def test(gateway: Gateway) -> None:
        await gateway.publish("x" * 300, b"[1]")
        await gateway.publish("door", b"[2]")
        sample = await gateway.buffer.get()
        assert sample is not None
        assert sample.payload == b"[2]"
        assert gateway.gateway.counters == {"long_name": 1}
        await gateway.gateway.drain()
        await gateway.publish("door", b"[3]")
        assert await gateway.buffer.get() is None

    with_gateway(test)


def test_retained_message_is_ignored() -> None:
    async def test(gateway: Gateway) -> None:
        await gateway.publish("door", b"[1]", retain=True)
        first = await gateway.buffer.get()  # live for this subscriber, retained for later ones
        assert first is not None
        later = MemoryTransport(gateway.hub)
        await later.connect()
        buffer = SampleBuffer("all")
        second = IngressGateway(later, "local", buffer, gateway.reject)
        await second.start()
        await gateway.publish("door", b"[2]")
        sample = await buffer.get()
        assert sample is not None
        assert sample.payload == b"[2]"
        assert second.counters == {"retained": 1}
        await later.close()

    with_gateway(test)


def test_number_of_sources_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingress, "SOURCES_LIMIT", 2)

    async def test(gateway: Gateway) -> None:
        indices = []
        for source in ("a", "b", "a", "c", "a", "b"):
            await gateway.publish(source, b"1")
            sample = await gateway.buffer.get()
            assert sample is not None
            indices.append((sample.source, sample.index))
        assert indices == [("a", 0), ("b", 0), ("a", 1), ("c", 0), ("a", 2), ("b", 1)]  # b was forgotten

    with_gateway(test)


def test_sample_carries_acknowledgement_and_redelivery() -> None:
    acks: list[bool] = []
    properties = Properties(content_type="image/jpg")
    delivery = Delivery(
        "sparse/local/ingress/door", properties, memoryview(b"x"), ack=lambda: acks.append(True), redelivered=True
    )
    sample = sample_from_delivery("door", 3, delivery)
    assert (sample.content_type, sample.index, sample.redelivered) == (JPEG, 3, True)
    assert sample.ack is not None
    sample.ack()
    assert acks == [True]
