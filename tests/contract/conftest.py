"""The brokers on which every transport contract is tested: in memory, embedded, Mosquitto with and without a limit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from brokers.mqtt.publish_packet import MAX_REMAINING_BYTES
from tests.support.brokers.broker_kinds import BrokerUnderTest, InMemoryBrokerUnderTest, LocalBrokerUnderTest
from tests.support.environment.external_programs import require_dependency

KINDS = ["memory", "embedded", "mosquitto", "mosquitto-2MB"]
SMALL_PACKETS_BYTES = 2_000_000  # the default limit of Mosquitto 2.1 and later


def _run(kind: str) -> Iterator[BrokerUnderTest]:
    if kind == "memory":
        yield InMemoryBrokerUnderTest()
        return
    require_dependency("iotcore" if kind == "embedded" else "mosquitto")
    broker = LocalBrokerUnderTest(
        "embedded" if kind == "embedded" else "mosquitto",
        SMALL_PACKETS_BYTES if kind == "mosquitto-2MB" else MAX_REMAINING_BYTES,
    )
    yield broker
    broker.stop()


@pytest.fixture(params=KINDS)
def broker(request: pytest.FixtureRequest) -> Iterator[BrokerUnderTest]:
    """A broker for one test, which may stop it."""
    yield from _run(request.param)


@pytest.fixture(params=KINDS, scope="module")
def shared_broker(request: pytest.FixtureRequest) -> Iterator[BrokerUnderTest]:
    """A broker for the tests of a module, which leave nothing behind on it."""
    yield from _run(request.param)
