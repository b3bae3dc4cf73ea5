"""The broker image of docker-compose.yml with its configuration: it does what our transport needs."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from testcontainers.core.config import testcontainers_config
from testcontainers.core.container import DockerContainer
from testcontainers.core.wait_strategies import PortWaitStrategy

from brokers.mqtt.client import MqttTransport
from brokers.protocol.transport import Properties, Will
from tests.support.brokers.broker_kinds import DeliveryQueue, kill_client_process, run_async
from tests.support.environment.checkout import ROOT

pytestmark = pytest.mark.slow

LARGE_BYTES = 5_000_000  # more than Mosquitto 2.1 accepts by default
TOPIC = "sparse/local/street/body/tasks"


@pytest.fixture(scope="module", name="address")
def _address() -> Iterator[str]:
    image = re.search(r"image: (eclipse-mosquitto:\S+)", (ROOT / "docker-compose.yml").read_text())
    assert image
    # Ryuk would be another container, from another image, that removes those of killed tests.
    testcontainers_config.ryuk_disabled = True
    container = DockerContainer(image[1], user="1883:1883").with_exposed_ports(1883)
    container.with_volume_mapping(str(ROOT / "deploy/config/mosquitto.conf"), "/mosquitto/config/mosquitto.conf", "ro")
    with container as broker:
        PortWaitStrategy(1883).wait_until_ready(broker)
        yield f"mqtt://{broker.get_container_host_ip()}:{broker.get_exposed_port(1883)}"


def test_large_message_arrives_with_its_properties(address: str) -> None:
    async def test() -> None:
        sender, reader, inbox = MqttTransport(address), MqttTransport(address), DeliveryQueue()
        await reader.subscribe(TOPIC, inbox)
        await reader.connect()
        await sender.connect()
        properties = Properties(
            response_topic="sparse/local/source/camera/inbox",
            correlation_data=b"0123456789abcdef",
            content_type="application/octet-stream",
            user_properties=(("attempt", "1"),),
        )
        payload = bytes(range(256)) * (LARGE_BYTES // 256)
        await sender.publish(TOPIC, payload, properties, qos=1)
        received = await inbox.next()
        assert bytes(received.payload) == payload
        assert received.properties == properties
        await sender.close()
        await reader.close()

    run_async(test())


def test_will_of_killed_client_replaces_its_retained_record(address: str) -> None:
    topic = "sparse/local/street/body/up/one"

    async def test() -> None:
        publisher = MqttTransport(address)
        await publisher.connect()
        await publisher.publish(topic, b"up", qos=1, retain=True)
        subscriber, inbox = MqttTransport(address), DeliveryQueue()
        await subscriber.connect()
        await subscriber.subscribe(topic, inbox, qos=1)
        assert bytes((await inbox.next()).payload) == b"up"
        await kill_client_process(address, Will(topic, b"lost", retain=True))
        assert bytes((await inbox.next()).payload) == b"lost"
        await publisher.close()
        await subscriber.close()

    run_async(test())


def test_shared_subscription_delivers_each_message_to_one_reader(address: str) -> None:
    async def test() -> None:
        readers = [MqttTransport(address) for _ in range(2)]
        inboxes = [DeliveryQueue() for _ in readers]
        for reader, inbox in zip(readers, inboxes, strict=True):
            await reader.connect()
            await reader.subscribe(f"$share/body/{TOPIC}", inbox, qos=1)
            await reader.subscribe("end", inbox, qos=1)
        for number in range(10):
            await readers[0].publish(TOPIC, bytes([number]), qos=1)
        await readers[0].publish("end", b"", qos=1)  # to both, after all others
        first, second = [await receive_until_end(inbox) for inbox in inboxes]
        assert sorted(first + second) == list(range(10))
        assert first
        assert second
        for reader in readers:
            await reader.close()

    run_async(test())


async def receive_until_end(inbox: DeliveryQueue) -> list[int]:
    numbers = []
    while (delivery := await inbox.next()).topic != "end":
        numbers.append(delivery.payload[0])
    return numbers
