"""What every transport promises (brokers/protocol/transport.py), on each of them."""

from __future__ import annotations

import asyncio
import os

import numpy as np
import pytest

from brokers.errors import Disconnected, TooLarge
from brokers.protocol.transport import Delivery, Properties, Transport, Will
from tests.support.brokers.broker_kinds import BrokerUnderTest, DeliveryQueue, run_async

ALL_PROPERTIES = Properties(
    content_type="application/vnd.safetensors",
    correlation_data=bytes(range(16)),
    response_topic="sparse/local/source/s/inbox",
    expiry_s=60,
    user_properties=(("hop", "1"), ("hop", "2"), ("naïve", "ü")),
)


async def connected(place: BrokerUnderTest) -> Transport:
    transport = place.transport()
    await transport.connect()
    return transport


def test_a_publication_arrives_with_its_payload_and_all_its_properties(place: BrokerUnderTest) -> None:
    async def test() -> None:
        line, inbox = await connected(place), DeliveryQueue()
        await line.subscribe("t/+", inbox)
        for qos in (0, 1):
            await line.publish("t/a", [b"one, ", bytearray(b""), memoryview(b"two")], ALL_PROPERTIES, qos=qos)
            came = await inbox.next()
            assert (came.topic, bytes(came.payload), came.retain) == ("t/a", b"one, two", False)
            # A broker counts a message's expiry down while it holds it (MQTT 5.0 section 3.3.2.3.3).
            assert came.properties.expiry_s in (59, 60)
            assert came.properties.user_properties == ALL_PROPERTIES.user_properties
            assert came.properties.correlation_data == ALL_PROPERTIES.correlation_data
            assert came.properties.content_type == ALL_PROPERTIES.content_type
            assert came.properties.response_topic == ALL_PROPERTIES.response_topic
        await line.close()

    run_async(test())


def test_an_empty_payload_is_a_publication_too(place: BrokerUnderTest) -> None:
    async def test() -> None:
        line, inbox = await connected(place), DeliveryQueue()
        await line.subscribe("t", inbox)
        await line.publish("t", b"", ALL_PROPERTIES)
        assert (await inbox.next()).payload.nbytes == 0
        await line.publish("t")
        assert (await inbox.next()).properties == Properties()
        await line.close()

    run_async(test())


def test_the_order_of_a_topic_is_kept_whatever_the_sizes(place: BrokerUnderTest) -> None:
    async def test() -> None:
        sender, receiver, inbox = await connected(place), await connected(place), DeliveryQueue()
        await receiver.subscribe("t", inbox)
        sizes = [1, 70_000, 0, 16_384, 3, 300_000, 20, 131_072] * 10
        for number, size in enumerate(sizes):
            await sender.publish("t", [number.to_bytes(4, "big"), bytes(size)])
        for number, size in enumerate(sizes):
            payload = (await inbox.next()).payload
            assert (int.from_bytes(payload[:4], "big"), payload.nbytes) == (number, size + 4)
        await sender.close()
        await receiver.close()

    run_async(test())


def test_publications_of_many_tasks_at_once_do_not_mix(place: BrokerUnderTest) -> None:
    async def test() -> None:
        sender, receiver, inbox = await connected(place), await connected(place), DeliveryQueue()
        await receiver.subscribe("t/+", inbox)
        async with asyncio.TaskGroup() as group:
            for number in range(16):
                group.create_task(sender.publish(f"t/{number}", [bytes([number]) * 400_000] * 4, qos=number % 2))
        for _ in range(16):
            came = await inbox.next()
            assert came.payload == bytes([int(came.topic[2:])]) * 1_600_000
        await sender.close()
        await receiver.close()

    run_async(test())


def test_a_retained_publication_waits_for_subscribers_until_it_is_cleared(place: BrokerUnderTest) -> None:
    async def test() -> None:
        line, first, second = await connected(place), DeliveryQueue(), DeliveryQueue()
        await line.publish("up/w1", b"here", ALL_PROPERTIES, qos=1, retain=True)
        await line.subscribe("up/+", first)
        came = await first.next()
        assert (bytes(came.payload), came.retain) == (b"here", True)
        assert came.properties.user_properties == ALL_PROPERTIES.user_properties
        await line.publish("up/w1", b"", qos=1, retain=True)
        assert (await first.next()).payload.nbytes == 0
        await line.unsubscribe("up/+")
        await line.subscribe("up/+", second)
        await second.assert_empty()
        await line.close()

    run_async(test())


def test_the_will_of_a_killed_client_is_published(place: BrokerUnderTest) -> None:
    async def test() -> None:
        line, inbox = await connected(place), DeliveryQueue()
        await line.subscribe("up/#", inbox)
        await place.kill_client_with_will(Will("up/w1", b"gone"))
        assert bytes((await inbox.next()).payload) == b"gone"
        await line.close()

    run_async(test())


def test_the_will_of_a_client_that_closed_is_not_published(place: BrokerUnderTest) -> None:
    async def test() -> None:
        line, inbox = await connected(place), DeliveryQueue()
        await line.subscribe("up/#", inbox)
        leaver = place.transport()
        await leaver.subscribe("noise", DeliveryQueue())
        await leaver.connect(will=Will("up/w1", b"gone"))
        # Bytes that it never reads must not turn its goodbye into a reset.
        await line.publish("noise", bytes(1_500_000))
        await leaver.close()
        await inbox.assert_empty()
        await line.close()

    run_async(test())


def test_a_shared_subscription_gives_each_publication_to_one_member(place: BrokerUnderTest) -> None:
    async def test() -> None:
        sender, members, inbox = await connected(place), [await connected(place) for _ in range(2)], DeliveryQueue()
        counts = [0, 0]

        def handler(member: int) -> None:
            counts[member] += 1

        for number, member in enumerate(members):

            def take(delivery: Delivery, number: int = number) -> None:
                handler(number)
                inbox(delivery)

            await member.subscribe("$share/workers/tasks", take)
        for number in range(20):
            await sender.publish("tasks", bytes([number]), qos=1)
        assert sorted([(await inbox.next()).payload[0] for _ in range(20)]) == list(range(20))
        await inbox.assert_empty()
        assert min(counts) >= 5
        for line in (sender, *members):
            await line.close()

    run_async(test())


def test_a_payload_is_written_where_the_placer_says(place: BrokerUnderTest) -> None:
    async def test() -> None:
        line, inbox = await connected(place), DeliveryQueue()
        whole = memoryview(bytearray(500_000))
        asked: list[tuple[str, str, int]] = []

        def placer(topic: str, properties: Properties, length: int) -> memoryview | None:
            asked.append((topic, properties.content_type, length))
            offset = int(properties.user_properties[0][1])
            return None if offset < 0 else whole[offset : offset + length]

        await line.subscribe("t", inbox, buffer_provider=placer)
        for offset, size in ((100, 300_000), (300_100, 5), (300_105, 100_000), (-1, 7)):
            await line.publish("t", b"x" * size, Properties("c", user_properties=(("offset", str(offset)),)))
        for size in (300_000, 5, 100_000, 7):
            came = await inbox.next()
            assert (came.payload.nbytes, came.payload.obj is whole.obj) == (size, size != 7)
        assert asked == [("t", "c", 300_000), ("t", "c", 5), ("t", "c", 100_000), ("t", "c", 7)]
        assert bytes(whole) == bytes(100) + b"x" * 400_005 + bytes(99_895)
        await line.close()

    run_async(test())


def test_a_tensor_of_64_mib_passes_in_chunks(place: BrokerUnderTest) -> None:
    async def test() -> None:
        sender, receiver, inbox = await connected(place), await connected(place), DeliveryQueue()
        chunk_bytes, total = 512 << 10, 64 << 20
        tensor = np.random.default_rng(0).integers(0, 255, total, np.uint8)
        came = np.zeros(total, np.uint8)

        def placer(topic: str, properties: Properties, length: int) -> memoryview:
            offset = int(properties.user_properties[0][1])
            return came.data[offset : offset + length]

        await receiver.subscribe("t", inbox, buffer_provider=placer)
        for offset in range(0, total, chunk_bytes):
            properties = Properties(user_properties=(("offset", str(offset)),))
            await sender.publish("t", tensor.data[offset : offset + chunk_bytes], properties)
        for _ in range(0, total, chunk_bytes):
            await inbox.next()
        assert np.array_equal(came, tensor)
        await sender.close()
        await receiver.close()

    run_async(test())


def test_a_packet_over_the_limit_is_refused_before_a_byte_is_sent(place: BrokerUnderTest) -> None:
    async def test() -> None:
        line, inbox = await connected(place), DeliveryQueue()
        await line.subscribe("t", inbox)
        limit = line.limits.max_packet_bytes
        for qos in (0, 1):
            with pytest.raises(TooLarge) as caught:
                await line.publish("t", np.zeros(limit, np.uint8).data, qos=qos)
            assert str(limit) in str(caught.value)
            assert str(caught.value.fields["actual_bytes"]) in str(caught.value)
        await line.publish("t", b"still here")
        assert bytes((await inbox.next()).payload) == b"still here"
        await line.close()

    run_async(test())


def test_after_a_restart_of_the_broker_all_goes_on_by_itself(place: BrokerUnderTest) -> None:
    async def test() -> None:
        line, inbox, again = place.transport(), DeliveryQueue(), asyncio.Event()

        async def back() -> None:
            await line.publish("t/back", b"back", qos=1)  # as presence does
            again.set()

        line.on_reconnect(back)
        await line.subscribe("t/#", inbox, qos=1)
        connected = [line.is_connected]
        await line.connect()
        connected.append(line.is_connected)
        await asyncio.to_thread(place.stop)
        waiting = asyncio.create_task(line.publish("t/waited", b"waited", qos=1))
        await asyncio.sleep(0.3)
        assert not waiting.done()
        connected.append(line.is_connected)
        place.start()
        await asyncio.wait_for(again.wait(), 20)
        assert [*connected, line.is_connected] == [False, True, False, True]
        await waiting
        assert {(await inbox.next()).topic for _ in range(2)} == {"t/back", "t/waited"}
        await line.close()

    run_async(test())


def test_a_handler_or_callback_that_fails_does_not_end_the_line(
    place: BrokerUnderTest, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        line, inbox = await connected(place), DeliveryQueue()

        def broken(delivery: Delivery) -> None:
            raise KeyError("mine")

        await line.subscribe("broken", broken)
        await line.subscribe("t", inbox)
        await line.publish("broken", b"secret", qos=1)
        await line.publish("t", b"fine")
        assert bytes((await inbox.next()).payload) == b"fine"
        await line.close()

    run_async(test())
    assert "KeyError" in caplog.text
    assert "secret" not in caplog.text


def test_what_was_unsubscribed_does_not_come(place: BrokerUnderTest) -> None:
    async def test() -> None:
        line, first, second = await connected(place), DeliveryQueue(), DeliveryQueue()
        await line.subscribe("a", first)
        await line.subscribe("b", second)
        await line.unsubscribe("a")
        await line.publish("a", b"1")
        await line.publish("b", b"2")
        await second.next()
        await first.assert_empty(0.05)
        await line.close()

    run_async(test())


def test_a_filter_has_one_handler(place: BrokerUnderTest) -> None:
    async def test() -> None:
        line = await connected(place)
        await line.subscribe("a", DeliveryQueue())
        with pytest.raises(ValueError, match="subscribed already"):
            await line.subscribe("a", DeliveryQueue())
        await line.close()

    run_async(test())


def test_closing_twice_is_closing_once_and_whoever_waits_is_told(place: BrokerUnderTest) -> None:
    async def test() -> None:
        line = await connected(place)
        await line.subscribe("t", DeliveryQueue())
        await asyncio.to_thread(place.stop)
        await asyncio.sleep(0.1)
        waiting = asyncio.create_task(line.publish("t", b"never", qos=1))
        await asyncio.sleep(0.1)
        await asyncio.gather(line.close(), line.close())
        await line.close()
        with pytest.raises(Disconnected):
            await waiting
        with pytest.raises(Disconnected):
            await line.publish("t", b"late")

    run_async(test(), 10)


def test_a_placer_that_raises_costs_nothing_but_a_copy(place: BrokerUnderTest) -> None:
    """What it could not place goes to a fresh buffer, and what follows is read as before."""

    def broken(topic: str, properties: Properties, length: int) -> memoryview | None:
        raise KeyError("a mistake of whoever placed it")

    async def test() -> None:
        line, inbox = place.transport(), DeliveryQueue()
        await line.connect()
        await line.subscribe("t", inbox, buffer_provider=broken)
        payload = os.urandom(300_000)
        for _ in range(3):
            await line.publish("t", payload)
        for _ in range(3):
            assert (await inbox.next()).payload == payload
        await line.close()

    run_async(test())
