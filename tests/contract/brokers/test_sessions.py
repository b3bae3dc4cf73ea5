"""What a broker keeps for a client that is away, and for one that is not done with it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from brokers.mqtt import client as mqtt
from brokers.mqtt import socket_loop as pump
from brokers.mqtt.client import MqttTransport
from brokers.protocol.transport import Delivery, Transport
from brokers.server.local_broker import LocalBroker, start_broker
from tests.contract.conftest import require_mosquitto
from tests.support.brokers.broker_kinds import WAIT_S, BrokerUnderTest, DeliveryQueue, LocalBrokerUnderTest, run_async


async def listening(place: BrokerUnderTest, inbox: DeliveryQueue, session: str = "mine") -> Transport:
    line = place.transport(session)
    await line.subscribe("t/+", inbox, qos=1, manual_ack=True)
    await line.connect()
    return line


async def said_to(place: BrokerUnderTest, *numbers: int) -> None:
    line = place.transport()
    await line.connect()
    for number in numbers:
        await line.publish("t/a", str(number).encode(), qos=1)
    await line.close()


async def settled(delivery: Delivery) -> int:
    assert delivery.ack is not None
    delivery.ack()
    return int(bytes(delivery.payload))


async def numbers(inbox: DeliveryQueue, count: int) -> list[int]:
    return [int(bytes((await inbox.next()).payload)) for _ in range(count)]


def test_what_is_not_settled_comes_again_and_before_what_came_meanwhile(place: BrokerUnderTest) -> None:
    async def test() -> None:
        first, second = DeliveryQueue(), DeliveryQueue()
        line = await listening(place, first)
        await said_to(place, *range(5))
        came = [await first.next() for _ in range(5)]
        assert [await settled(each) for each in came[:2]] == [0, 1]
        await settled(came[3])  # out of its turn: told only after the one before it
        await line.close()
        await said_to(place, 5, 6)
        line = await listening(place, second)
        assert [await settled(await second.next()) for _ in range(5)] == [2, 3, 4, 5, 6]
        await second.assert_empty()
        await line.close()

    run_async(test())


def test_what_is_settled_does_not_come_again(place: BrokerUnderTest) -> None:
    async def test() -> None:
        first, second = DeliveryQueue(), DeliveryQueue()
        line = await listening(place, first)
        await said_to(place, *range(20))
        came = [await first.next() for _ in range(20)]
        for each in reversed(came):
            await settled(each)
        await line.close()
        line = await listening(place, second)
        await said_to(place, 20)
        assert await numbers(second, 1) == [20]
        await line.close()

    run_async(test())


def test_without_a_session_nothing_is_kept(place: BrokerUnderTest) -> None:
    async def test() -> None:
        first, second = DeliveryQueue(), DeliveryQueue()
        line = await listening(place, first, session="")
        await said_to(place, 0)
        assert await numbers(first, 1) == [0]
        await line.close()
        await said_to(place, 1)
        line = await listening(place, second, session="")
        await second.assert_empty()
        await line.close()

    run_async(test())


def test_what_is_sent_without_confirmation_has_nothing_to_settle(place: BrokerUnderTest) -> None:
    async def test() -> None:
        inbox = DeliveryQueue()
        line = await listening(place, inbox)
        await line.publish("t/a", b"0")
        if (await inbox.next()).ack is not None:  # rumqttd raises it to the QoS of the subscription
            assert isinstance(place, LocalBrokerUnderTest)
            assert place.local_broker.kind == "embedded"
        await line.close()

    run_async(test())


def test_a_handler_that_fails_has_settled(place: BrokerUnderTest) -> None:
    async def test() -> None:
        second, broken_once = DeliveryQueue(), asyncio.Event()

        def broken(delivery: Delivery) -> None:
            broken_once.set()
            raise KeyError("mine")

        line = place.transport("mine")
        await line.subscribe("t/+", broken, qos=1, manual_ack=True)
        await line.connect()
        await said_to(place, 0)
        await asyncio.wait_for(broken_once.wait(), WAIT_S)
        await line.close()
        line = await listening(place, second)
        await second.assert_empty()
        await line.close()

    run_async(test())


def test_a_broker_that_forgets_a_session_is_gone_on_with(place: BrokerUnderTest) -> None:
    async def test() -> None:
        inbox, again = DeliveryQueue(), asyncio.Event()

        async def back() -> None:
            again.set()

        line = await listening(place, inbox)
        line.on_reconnect(back)
        await said_to(place, 0)
        before = await inbox.next()
        await asyncio.to_thread(place.stop)
        place.start()
        await asyncio.wait_for(again.wait(), 20)
        await settled(before)
        await said_to(place, 1)
        assert await settled(await inbox.next()) == 1
        await inbox.assert_empty()
        await line.close()

    run_async(test())


# What Mosquitto does beyond this: it marks what it sends again -----------------------------------------------------


@contextmanager
def mosquitto_place() -> Iterator[LocalBrokerUnderTest]:
    require_mosquitto()
    made = LocalBrokerUnderTest("mosquitto")
    try:
        yield made
    finally:
        made.stop()


def cut(line: Transport) -> None:
    """Break the connection that stands, as a network does."""
    assert isinstance(line, MqttTransport)
    assert line._connection is not None
    line._connection._pump._socket.shutdown(socket.SHUT_RDWR)


def test_what_is_in_hand_when_a_connection_breaks_is_not_handed_out_twice() -> None:
    async def test(place: LocalBrokerUnderTest) -> None:
        inbox, again = DeliveryQueue(), asyncio.Event()

        async def back() -> None:
            again.set()

        line = await listening(place, inbox)
        line.on_reconnect(back)
        await said_to(place, *range(10))
        came = [await inbox.next() for _ in range(10)]
        await settled(came[4])
        cut(line)
        await asyncio.wait_for(again.wait(), 20)
        await said_to(place, 10)
        came.append(await inbox.next())
        await inbox.assert_empty(0)
        assert [await settled(each) for each in came if each is not came[4]] == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10]
        assert not any(each.redelivered for each in came)
        await line.close()
        second = DeliveryQueue()
        line = await listening(place, second)
        await second.assert_empty()
        await line.close()

    with mosquitto_place() as place:
        run_async(test(place))


def test_what_another_of_the_name_had_in_hand_is_marked() -> None:
    async def test(place: LocalBrokerUnderTest) -> None:
        first, second = DeliveryQueue(), DeliveryQueue()
        line = await listening(place, first)
        await said_to(place, 0)
        await first.next()
        await line.close()
        await said_to(place, 1)
        line = await listening(place, second)
        assert [(await second.next()).redelivered for _ in range(2)] == [True, False]
        await line.close()

    with mosquitto_place() as place:
        run_async(test(place))


@pytest.fixture(params=["mosquitto", "embedded"])
def either(request: pytest.FixtureRequest) -> Iterator[LocalBroker]:
    if request.param == "embedded":
        pytest.importorskip("iotcore")
    else:
        require_mosquitto()
    with start_broker(kind=request.param) as found:
        yield found


def test_no_more_is_read_than_can_be_held_and_the_connection_lives(
    either: LocalBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both brokers send more than a Receive Maximum once there is a backlog; and who reads nothing hears no ping."""
    monkeypatch.setattr(mqtt, "RECEIVE_MAXIMUM", 8)
    monkeypatch.setattr(pump, "TICK_S", 0.4)
    payload_bytes, count = 1 << 19, 100
    most = 8 + -(-pump.READ_BUDGET_BYTES // payload_bytes) + 1  # what one turn of the loop may read at once

    async def test() -> None:
        inbox, held, ended = DeliveryQueue(), 0, []

        def take(delivery: Delivery) -> None:
            nonlocal held
            held += 1
            inbox(delivery)

        line = MqttTransport(either.address, client_id="mine", session_expiry_s=600)
        await line.subscribe("t", take, qos=1, manual_ack=True)
        await line.connect()
        assert line._connection is not None
        line._connection.lost.add_done_callback(lambda _: ended.append(True))
        sender = MqttTransport(either.address)
        await sender.connect()
        for number in range(count):
            await sender.publish("t", [number.to_bytes(4, "big"), bytes(payload_bytes)], qos=1)
        first = await inbox.next()
        await asyncio.sleep(pump.TICK_S * 1.5 * pump.DEAD_AFTER_TICKS)
        found = []
        for each in [first, *[await inbox.next() for _ in range(7)]]:
            assert each.ack is not None
            assert held <= most
            found.append(int.from_bytes(each.payload[:4], "big"))
            each.ack()
            held -= 1
        while len(found) < count:
            each = await inbox.next()
            assert held <= most
            assert each.ack is not None
            found.append(int.from_bytes(each.payload[:4], "big"))
            each.ack()
            held -= 1
        assert found == list(range(count))
        assert not ended
        await line.close()
        await sender.close()

    run_async(test())
