"""What the tests of whole pipelines share: a machine for their processes, and brokers of both kinds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from brokers.server.local_broker import BrokerKind, LocalBroker, start_broker
from tests.support.environment.external_programs import require_dependency
from tests.support.pipelines.processes import ProcessSandbox, process_sandbox

BROKER_KINDS: tuple[BrokerKind, ...] = ("embedded", "mosquitto")


@pytest.fixture(name="sandbox")
def _sandbox(tmp_path: Path) -> Iterator[ProcessSandbox]:
    with process_sandbox(tmp_path) as found:
        yield found


@pytest.fixture(scope="module", name="broker", params=BROKER_KINDS)
def _broker(request: pytest.FixtureRequest) -> Iterator[LocalBroker]:
    """A broker of each kind, in turn."""
    require_dependency({"embedded": "iotcore"}.get(request.param, request.param))
    with start_broker(kind=request.param) as found:
        yield found


@pytest.fixture(scope="module", name="embedded_broker")
def _embedded_broker() -> Iterator[LocalBroker]:
    """The broker that is there without being installed."""
    require_dependency("iotcore")
    with start_broker(kind="embedded") as found:
        yield found
