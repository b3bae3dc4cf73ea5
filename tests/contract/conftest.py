"""Every transport that must keep the contract: within the process, over the embedded broker, over two Mosquittos."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from brokers.server import mosquitto_conf as mosquitto
from tests.support.brokers.broker_kinds import BrokerUnderTest, InMemoryBrokerUnderTest, LocalBrokerUnderTest

# What Mosquitto 2.1 and later allow by default.
SMALL_PACKETS_BYTES = 2_000_000


def require_mosquitto() -> None:
    """Skip a test that needs Mosquitto where it is not installed; in CI that is a failure, not a green skip."""
    if mosquitto.find_mosquitto() is None:
        if os.environ.get("CI") == "true":
            pytest.fail("Mosquitto is not installed, and CI must test with it")
        pytest.skip("Mosquitto is not installed (Debian: apt-get install mosquitto)")


@pytest.fixture(params=["memory", "embedded", "mosquitto", "mosquitto-2MB"])
def broker(request: pytest.FixtureRequest) -> Iterator[BrokerUnderTest]:
    if request.param == "memory":
        yield InMemoryBrokerUnderTest()
        return
    if request.param == "embedded":
        pytest.importorskip("iotcore", reason="the embedded broker has no wheel for this machine")
        made = LocalBrokerUnderTest("embedded")
    else:
        require_mosquitto()
        made = LocalBrokerUnderTest("mosquitto", SMALL_PACKETS_BYTES if request.param == "mosquitto-2MB" else None)
    yield made
    made.stop()
