"""The contract of `Transport`, on each implementation."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest

from brokers.errors import Disconnected, TooLarge
from brokers.protocol.transport import Delivery, Properties, Transport, Will
from tests.support.brokers.broker_kinds import WAIT_S, BrokerUnderTest, DeliveryQueue, async_test

ALL_PROPERTIES = Properties(
    content_type="application/vnd.safetensors",
    correlation_data=bytes(range(16)),
    response_topic="sparse/local/source/s/inbox",
    expiry_s=60,
    user_properties=(("hop", "1"), ("hop", "2"), ("naïve", "ü")),
)


@asynccontextmanager
async def connected(broker: BrokerUnderTest) -> AsyncIterator[Transport]:
    transport = broker.transport()
    await transport.connect()
    try:
        yield transport
    finally:
        await transport.close()


async def next_payload(queue: DeliveryQueue) -> bytes:
    return bytes((await queue.next()).payload)


async def until_disconnected(transport: Transport) -> None:
    async with asyncio.timeout(WAIT_S):
        while transport.is_connected:  # noqa: ASYNC110 - a transport has no event for it
            await asyncio.sleep(0.01)


@async_test
async def test_publication_arrives_with_payload_and_all_properties(shared_broker: BrokerUnderTest) -> None:
    async with connected(shared_broker) as transport:
        queue = DeliveryQueue()
        await transport.subscribe("t/+", queue)
        for qos in (0, 1):
            await transport.publish("t/a", [b"one, ", bytearray(b""), memoryview(b"two")], ALL_PROPERTIES, qos=qos)
            delivery = await queue.next()
            assert (delivery.topic, bytes(delivery.payload), delivery.retain) == ("t/a", b"one, two", False)
            properties = delivery.properties
            assert properties.expiry_s in (59, 60)  # brokers count it down: MQTT 5.0 section 3.3.2.3.3
            assert properties.user_properties == ALL_PROPERTIES.user_properties
            assert properties.correlation_data == ALL_PROPERTIES.correlation_data
            assert properties.content_type == ALL_PROPERTIES.content_type
            assert properties.response_topic == ALL_PROPERTIES.response_topic


@async_test
async def test_empty_payload_is_delivered(shared_broker: BrokerUnderTest) -> None:
    async with connected(shared_broker) as transport:
        queue = DeliveryQueue()
        await transport.subscribe("t", queue)
        await transport.publish("t", b"", ALL_PROPERTIES)
        assert await next_payload(queue) == b""
        await transport.publish("t")
        assert (await queue.next()).properties == Properties()


@async_test
async def test_publications_of_all_sizes_stay_in_order(shared_broker: BrokerUnderTest) -> None:
    async with connected(shared_broker) as sender, connected(shared_broker) as receiver:
        queue = DeliveryQueue()
        await receiver.subscribe("t", queue)
        sizes = [1, 70_000, 0, 16_384, 3, 300_000, 20, 131_072] * 10
        for number, size in enumerate(sizes):
            await sender.publish("t", [number.to_bytes(4, "big"), bytes(size)])
        for number, size in enumerate(sizes):
            payload = (await queue.next()).payload
            assert (int.from_bytes(payload[:4], "big"), payload.nbytes) == (number, size + 4)


@async_test
async def test_concurrent_publications_do_not_mix(shared_broker: BrokerUnderTest) -> None:
    async with connected(shared_broker) as sender, connected(shared_broker) as receiver:
        queue = DeliveryQueue()
        await receiver.subscribe("t/+", queue)
        async with asyncio.TaskGroup() as group:
            for number in range(16):
                group.create_task(sender.publish(f"t/{number}", [bytes([number]) * 400_000] * 4, qos=number % 2))
        for _ in range(16):
            delivery = await queue.next()
            assert delivery.payload == bytes([int(delivery.topic[2:])]) * 1_600_000


@async_test
async def test_retained_publication_is_delivered_until_cleared(shared_broker: BrokerUnderTest) -> None:
    async with connected(shared_broker) as transport:
        first, second = DeliveryQueue(), DeliveryQueue()
        await transport.publish("up/w1", b"here", ALL_PROPERTIES, qos=1, retain=True)
        await transport.subscribe("up/+", first)
        delivery = await first.next()
        assert (bytes(delivery.payload), delivery.retain) == (b"here", True)
        assert delivery.properties.user_properties == ALL_PROPERTIES.user_properties
        await transport.publish("up/w1", b"", qos=1, retain=True)
        assert await next_payload(first) == b""
        await transport.unsubscribe("up/+")
        await transport.subscribe("up/+", second)
        await transport.publish("up/w2", b"next")
        assert await next_payload(second) == b"next"


@async_test
async def test_will_of_a_killed_client_is_published(shared_broker: BrokerUnderTest) -> None:
    async with connected(shared_broker) as transport:
        queue = DeliveryQueue()
        await transport.subscribe("killed/#", queue)
        await shared_broker.kill_client_with_will(Will("killed/w1", b"gone"))
        assert await next_payload(queue) == b"gone"


@async_test
async def test_will_of_a_closed_client_is_not_published(shared_broker: BrokerUnderTest) -> None:
    async with connected(shared_broker) as transport:
        queue = DeliveryQueue()
        await transport.subscribe("up/#", queue)
        leaving = shared_broker.transport()
        await leaving.subscribe("noise", DeliveryQueue())
        await leaving.connect(will=Will("up/w1", b"gone"))
        await transport.publish("noise", bytes(1_500_000))  # unread bytes must not turn the DISCONNECT into a reset
        await leaving.close()
        await transport.publish("up/w2", b"next")
        assert await next_payload(queue) == b"next"


@async_test
async def test_shared_subscription_delivers_to_one_member_each(shared_broker: BrokerUnderTest) -> None:
    async with (
        connected(shared_broker) as sender,
        connected(shared_broker) as first,
        connected(shared_broker) as second,
    ):
        queues = [DeliveryQueue(), DeliveryQueue()]
        for member, queue in zip((first, second), queues, strict=True):
            await member.subscribe("$share/workers/tasks", queue)
            await member.subscribe("end", queue)
        for number in range(20):
            await sender.publish("tasks", bytes([number]), qos=1)
        await sender.publish("end", b"end", qos=1)
        numbers: list[list[int]] = [[], []]
        for received, queue in zip(numbers, queues, strict=True):
            while (payload := await next_payload(queue)) != b"end":
                received.append(payload[0])
        assert sorted(numbers[0] + numbers[1]) == list(range(20))
        assert min(map(len, numbers)) >= 5


@async_test
async def test_payload_is_received_in_the_provided_buffer(shared_broker: BrokerUnderTest) -> None:
    async with connected(shared_broker) as transport:
        queue, whole = DeliveryQueue(), memoryview(bytearray(500_000))
        calls: list[tuple[str, str, int]] = []

        def provide(topic: str, properties: Properties, length: int) -> memoryview | None:
            calls.append((topic, properties.content_type, length))
            offset = int(properties.user_properties[0][1])
            return None if offset < 0 else whole[offset : offset + length]

        await transport.subscribe("t", queue, buffer_provider=provide)
        pieces = ((100, 300_000), (300_100, 5), (300_105, 100_000), (-1, 7))
        for offset, size in pieces:
            await transport.publish("t", b"x" * size, Properties("c", user_properties=(("offset", str(offset)),)))
        for offset, size in pieces:
            payload = (await queue.next()).payload
            assert (payload.nbytes, payload.obj is whole.obj) == (size, offset >= 0)
        assert calls == [("t", "c", size) for _, size in pieces]
        assert bytes(whole) == bytes(100) + b"x" * 400_005 + bytes(99_895)


@async_test
async def test_failing_buffer_provider_costs_a_new_buffer_only(shared_broker: BrokerUnderTest) -> None:
    def failing(topic: str, properties: Properties, length: int) -> memoryview | None:
        raise KeyError("a bug in the provider")

    async with connected(shared_broker) as transport:
        queue, payload = DeliveryQueue(), os.urandom(300_000)
        await transport.subscribe("t", queue, buffer_provider=failing)
        for _ in range(3):
            await transport.publish("t", payload)
        for _ in range(3):
            assert await next_payload(queue) == payload


@async_test
async def test_64_mib_pass_in_chunks(shared_broker: BrokerUnderTest) -> None:
    chunk_bytes, total = 512 << 10, 64 << 20
    tensor = np.arange(total // 8).view(np.uint8)
    received = np.zeros(total, np.uint8)

    def provide(topic: str, properties: Properties, length: int) -> memoryview:
        offset = int(properties.user_properties[0][1])
        return received.data[offset : offset + length]

    async with connected(shared_broker) as sender, connected(shared_broker) as receiver:
        queue = DeliveryQueue()
        await receiver.subscribe("t", queue, buffer_provider=provide)
        for offset in range(0, total, chunk_bytes):
            properties = Properties(user_properties=(("offset", str(offset)),))
            await sender.publish("t", tensor.data[offset : offset + chunk_bytes], properties)
        for _ in range(0, total, chunk_bytes):
            await queue.next()
        assert np.array_equal(received, tensor)


@async_test
async def test_packet_over_the_limit_raises_before_anything_is_sent(shared_broker: BrokerUnderTest) -> None:
    async with connected(shared_broker) as transport:
        queue, limit = DeliveryQueue(), transport.limits.max_packet_bytes
        await transport.subscribe("t", queue)
        for qos in (0, 1):
            with pytest.raises(TooLarge) as caught:
                await transport.publish("t", np.zeros(limit, np.uint8).data, qos=qos)
            assert caught.value.fields["limit_bytes"] == limit
            assert caught.value.fields["actual_bytes"] > limit
        await transport.publish("t", b"next")
        assert await next_payload(queue) == b"next"


@async_test
async def test_broker_restart_is_survived(broker: BrokerUnderTest) -> None:
    transport, queue, reconnected = broker.transport(), DeliveryQueue(), asyncio.Event()

    async def publish_again() -> None:
        await transport.publish("t/callback", b"", qos=1)  # as presence does
        reconnected.set()

    transport.on_reconnect(publish_again)
    await transport.subscribe("t/#", queue, qos=1)
    connected_before = transport.is_connected
    await transport.connect()
    assert (connected_before, transport.is_connected) == (False, True)
    await asyncio.to_thread(broker.stop)
    await until_disconnected(transport)
    waiting = asyncio.create_task(transport.publish("t/waiting", b"", qos=1))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    broker.start()
    await asyncio.wait_for(reconnected.wait(), WAIT_S)
    assert transport.is_connected
    await waiting
    assert {(await queue.next()).topic for _ in range(2)} == {"t/callback", "t/waiting"}
    await transport.close()


def test_failing_handler_is_logged_without_the_payload(
    shared_broker: BrokerUnderTest, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(delivery: Delivery) -> None:
        raise KeyError("a bug in the handler")

    @async_test
    async def test() -> None:
        async with connected(shared_broker) as transport:
            queue = DeliveryQueue()
            await transport.subscribe("broken", failing)
            await transport.subscribe("t", queue)
            await transport.publish("broken", b"secret", qos=1)
            await transport.publish("t", b"next")
            assert await next_payload(queue) == b"next"

    test()
    assert "KeyError" in caplog.text
    assert "secret" not in caplog.text


@async_test
async def test_unsubscribed_topic_is_not_delivered(shared_broker: BrokerUnderTest) -> None:
    async with connected(shared_broker) as transport:
        first, second = DeliveryQueue(), DeliveryQueue()
        await transport.subscribe("a", first)
        await transport.subscribe("b", second)
        await transport.unsubscribe("a")
        await transport.publish("a", b"1")
        await transport.publish("b", b"2")
        assert await next_payload(second) == b"2"
        await first.assert_empty(0)


@async_test
async def test_close_ends_waiting_publications_and_may_be_repeated(broker: BrokerUnderTest) -> None:
    async with connected(broker) as transport:
        await transport.subscribe("t", DeliveryQueue())
        await asyncio.to_thread(broker.stop)
        await until_disconnected(transport)
        waiting = asyncio.create_task(transport.publish("t", b"x", qos=1))
        await asyncio.sleep(0)
        await asyncio.gather(transport.close(), transport.close())
        with pytest.raises(Disconnected):
            await waiting
        with pytest.raises(Disconnected):
            await transport.publish("t", b"x")
