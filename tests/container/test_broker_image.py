"""The broker's image of docker-compose.yml, with our configuration: our transport finds in it what it needs."""

from __future__ import annotations

import asyncio
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

LARGE_BYTES = 5_000_000  # more than Mosquitto 2.1 takes by default


@pytest.fixture(scope="module", name="address")
def _address() -> Iterator[str]:
    found = re.search(r"image: (eclipse-mosquitto:\S+)", (ROOT / "docker-compose.yml").read_text())
    assert found
    # It would start one more container, of an image of its own, to end those of a test that was killed.
    testcontainers_config.ryuk_disabled = True
    container = DockerContainer(found[1], user="1883:1883").with_exposed_ports(1883)
    container.with_volume_mapping(str(ROOT / "deploy/config/mosquitto.conf"), "/mosquitto/config/mosquitto.conf", "ro")
    with container as broker:
        PortWaitStrategy(1883).wait_until_ready(broker)
        yield f"mqtt://{broker.get_container_host_ip()}:{broker.get_exposed_port(1883)}"


def test_a_large_message_arrives_whole_with_its_properties(address: str) -> None:
    async def test() -> None:
        sender, reader, inbox = MqttTransport(address), MqttTransport(address), DeliveryQueue()
        await reader.subscribe("sparse/local/street/body/tasks", inbox)
        await reader.connect()
        await sender.connect()
        given = Properties(
            response_topic="sparse/local/source/door/inbox",
            correlation_data=b"0123456789abcdef",
            content_type="application/octet-stream",
            user_properties=(("attempt", "1"),),
        )
        payload = bytes(range(256)) * (LARGE_BYTES // 256)
        await sender.publish("sparse/local/street/body/tasks", payload, given, qos=1)
        came = await inbox.next()
        assert bytes(came.payload) == payload
        assert came.properties == given
        await sender.close()
        await reader.close()

    run_async(test())


def test_presence_is_kept_for_those_who_come_later_and_a_death_clears_it(address: str) -> None:
    topic = "sparse/local/street/body/up/one"

    async def test() -> None:
        teller = MqttTransport(address)
        await teller.connect()
        await teller.publish(topic, b"here", qos=1, retain=True)
        watcher, inbox = MqttTransport(address), DeliveryQueue()
        await watcher.connect()
        await watcher.subscribe(topic, inbox, qos=1)
        assert bytes((await inbox.next()).payload) == b"here"
        await kill_client_process(address, Will(topic, b"gone", retain=True))
        assert bytes((await inbox.next()).payload) == b"gone"
        await teller.close()
        await watcher.close()

    run_async(test())


def test_a_shared_subscription_gives_each_message_to_one(address: str) -> None:
    async def test() -> None:
        readers = [MqttTransport(address) for _ in range(2)]
        inboxes = [DeliveryQueue() for _ in readers]
        for reader, inbox in zip(readers, inboxes, strict=True):
            await reader.connect()
            await reader.subscribe("$share/body/sparse/local/street/body/tasks", inbox, qos=1)
        for number in range(10):
            await readers[0].publish("sparse/local/street/body/tasks", bytes([number]), qos=1)
        first, second = await asyncio.gather(*(_all(inbox) for inbox in inboxes))
        assert sorted(first + second) == list(range(10))
        assert first
        assert second
        for reader in readers:
            await reader.close()

    run_async(test())


async def _all(inbox: DeliveryQueue) -> list[int]:
    """What comes until nothing more does."""
    found = []
    while True:
        try:
            found.append(bytes((await asyncio.wait_for(inbox.next(), 2)).payload)[0])
        except TimeoutError:
            return found
