"""Sessions: what a broker keeps for a client that is away, or that has not acknowledged a publication yet."""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Iterator

import pytest

from brokers.mqtt import client, connection, socket_loop
from brokers.mqtt.client import MqttTransport
from brokers.protocol.transport import Delivery, Transport
from brokers.server.local_broker import BrokerKind
from tests.support.brokers.broker_kinds import (
    WAIT_S,
    BrokerUnderTest,
    DeliveryQueue,
    LocalBrokerUnderTest,
    async_test,
    reconnected_event,
)
from tests.support.environment.external_programs import require_dependency


@pytest.fixture(scope="module", params=["embedded", "mosquitto"])
def local_broker(request: pytest.FixtureRequest) -> Iterator[LocalBrokerUnderTest]:
    """A broker with sessions, which tests may stop and start again."""
    kind: BrokerKind = request.param
    require_dependency("iotcore" if kind == "embedded" else kind)
    broker = LocalBrokerUnderTest(kind)
    yield broker
    broker.stop()


@pytest.fixture
def session() -> str:
    return f"session-{secrets.token_hex(4)}"


@pytest.fixture
def mosquitto() -> Iterator[LocalBrokerUnderTest]:
    """Only Mosquitto marks what it redelivers."""
    require_dependency("mosquitto")
    broker = LocalBrokerUnderTest("mosquitto")
    yield broker
    broker.stop()


async def subscribed(broker: BrokerUnderTest, queue: DeliveryQueue, session: str) -> Transport:
    """Return a connected transport that acknowledges by hand."""
    transport = broker.transport(session)
    await transport.subscribe("t/+", queue, qos=1, manual_ack=True)
    await transport.connect()
    return transport


async def publish_numbers(broker: BrokerUnderTest, *numbers: int) -> None:
    transport = broker.transport()
    await transport.connect()
    for number in numbers:
        await transport.publish("t/a", str(number).encode(), qos=1)
    await transport.close()


def number_of(delivery: Delivery) -> int:
    return int(bytes(delivery.payload))


def ack(delivery: Delivery) -> int:
    """Acknowledge a delivery; return its number."""
    assert delivery.ack is not None
    delivery.ack()
    return number_of(delivery)


@async_test
async def test_unacknowledged_publications_are_redelivered_first(
    local_broker: LocalBrokerUnderTest, session: str
) -> None:
    first, second = DeliveryQueue(), DeliveryQueue()
    transport = await subscribed(local_broker, first, session)
    await publish_numbers(local_broker, *range(5))
    deliveries = [await first.next() for _ in range(5)]
    assert [ack(each) for each in deliveries[:2]] == [0, 1]
    ack(deliveries[3])  # out of order: sent only after that of the one before it
    await transport.close()
    await publish_numbers(local_broker, 5, 6)
    transport = await subscribed(local_broker, second, session)
    assert [ack(await second.next()) for _ in range(5)] == [2, 3, 4, 5, 6]
    await publish_numbers(local_broker, 7)
    assert ack(await second.next()) == 7
    await transport.close()


@async_test
async def test_acknowledged_publications_are_not_redelivered(local_broker: LocalBrokerUnderTest, session: str) -> None:
    first, second = DeliveryQueue(), DeliveryQueue()
    transport = await subscribed(local_broker, first, session)
    await publish_numbers(local_broker, *range(20))
    for delivery in reversed([await first.next() for _ in range(20)]):
        ack(delivery)
    await transport.close()
    transport = await subscribed(local_broker, second, session)
    await publish_numbers(local_broker, 20)
    assert number_of(await second.next()) == 20
    await transport.close()


@async_test
async def test_without_session_nothing_is_kept(local_broker: LocalBrokerUnderTest) -> None:
    first, second = DeliveryQueue(), DeliveryQueue()
    transport = await subscribed(local_broker, first, "")
    await publish_numbers(local_broker, 0)
    assert number_of(await first.next()) == 0
    await transport.close()
    await publish_numbers(local_broker, 1)
    transport = await subscribed(local_broker, second, "")
    await publish_numbers(local_broker, 2)
    assert number_of(await second.next()) == 2
    await transport.close()


@async_test
async def test_qos_0_delivery_has_no_acknowledgement(local_broker: LocalBrokerUnderTest, session: str) -> None:
    queue = DeliveryQueue()
    transport = await subscribed(local_broker, queue, session)
    await transport.publish("t/a", b"0")
    if (await queue.next()).ack is not None:  # rumqttd raises it to the QoS of the subscription
        assert local_broker.local_broker.kind == "embedded"
    await transport.close()


@async_test
async def test_failing_handler_acknowledges(local_broker: LocalBrokerUnderTest, session: str) -> None:
    called, queue = asyncio.Event(), DeliveryQueue()

    def failing(delivery: Delivery) -> None:
        called.set()
        raise KeyError("a bug in the handler")

    transport = local_broker.transport(session)
    await transport.subscribe("t/+", failing, qos=1, manual_ack=True)
    await transport.connect()
    await publish_numbers(local_broker, 0)
    await asyncio.wait_for(called.wait(), WAIT_S)
    await transport.close()
    transport = await subscribed(local_broker, queue, session)
    await publish_numbers(local_broker, 1)
    assert ack(await queue.next()) == 1
    await transport.close()


@async_test
async def test_lost_session_does_not_stop_deliveries(local_broker: LocalBrokerUnderTest, session: str) -> None:
    queue = DeliveryQueue()
    transport = await subscribed(local_broker, queue, session)
    reconnected = reconnected_event(transport)
    await publish_numbers(local_broker, 0)
    before = await queue.next()
    await asyncio.to_thread(local_broker.stop)
    local_broker.start()
    await asyncio.wait_for(reconnected.wait(), WAIT_S)
    ack(before)
    await publish_numbers(local_broker, 1, 2)
    assert [ack(await queue.next()) for _ in range(2)] == [1, 2]
    await transport.close()


@async_test
async def test_pending_deliveries_are_not_repeated_on_a_new_connection(
    mosquitto: LocalBrokerUnderTest, session: str
) -> None:
    queue, second = DeliveryQueue(), DeliveryQueue()
    transport = await subscribed(mosquitto, queue, session)
    reconnected = reconnected_event(transport)
    await publish_numbers(mosquitto, *range(10))
    deliveries = [await queue.next() for _ in range(10)]
    ack(deliveries[4])
    assert isinstance(transport, MqttTransport)
    assert transport._connection is not None
    transport._connection._packets._socket.shutdown(socket.SHUT_RDWR)  # as when a network fails
    await asyncio.wait_for(reconnected.wait(), WAIT_S)
    await publish_numbers(mosquitto, 10)
    deliveries.append(await queue.next())
    await queue.assert_empty(0)
    assert [ack(each) for each in deliveries if each is not deliveries[4]] == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10]
    assert not any(each.redelivered for each in deliveries)
    await transport.close()
    transport = await subscribed(mosquitto, second, session)
    await publish_numbers(mosquitto, 11)
    assert ack(await second.next()) == 11
    await transport.close()


@async_test
async def test_pending_deliveries_of_an_earlier_client_are_marked(
    mosquitto: LocalBrokerUnderTest, session: str
) -> None:
    first, second = DeliveryQueue(), DeliveryQueue()
    transport = await subscribed(mosquitto, first, session)
    await publish_numbers(mosquitto, 0)
    await first.next()
    await transport.close()
    await publish_numbers(mosquitto, 1)
    transport = await subscribed(mosquitto, second, session)
    assert [(await second.next()).redelivered for _ in range(2)] == [True, False]
    await transport.close()


@async_test
async def test_unacknowledged_deliveries_are_bounded(
    local_broker: LocalBrokerUnderTest, session: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both brokers exceed the Receive Maximum once they have a backlog."""
    limit, payload_bytes, count = 8, 1 << 19, 60
    for module in (client, connection):
        monkeypatch.setattr(module, "RECEIVE_MAXIMUM", limit)
    most = limit + -(-socket_loop.READ_BUDGET_BYTES // payload_bytes) + 1  # with those of the last read
    queue, pending, address = DeliveryQueue(), 0, local_broker.local_broker.address

    def on_delivery(delivery: Delivery) -> None:
        nonlocal pending
        pending += 1
        queue(delivery)

    receiver = MqttTransport(address, client_id=session, session_expiry_s=600)
    await receiver.subscribe("t", on_delivery, qos=1, manual_ack=True)
    await receiver.connect()
    first_connection = receiver._connection
    sender = MqttTransport(address)
    await sender.connect()
    for number in range(count):
        await sender.publish("t", [number.to_bytes(4, "big"), bytes(payload_bytes)], qos=1)
    for number in range(count):
        delivery = await queue.next()
        assert pending <= most
        assert int.from_bytes(delivery.payload[:4], "big") == number
        assert delivery.ack is not None
        delivery.ack()
        pending -= 1
    assert receiver._connection is first_connection
    await receiver.close()
    await sender.close()
