"""What the tests of whole pipelines share: a machine for their processes, and brokers of both kinds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from brokers.server.local_broker import Kind, LocalBroker, start_broker
from tests.support.environment.external_programs import need
from tests.support.pipelines.processes import Machine, machine

KINDS: tuple[Kind, ...] = ("embedded", "mosquitto")


@pytest.fixture(name="box")
def _box(tmp_path: Path) -> Iterator[Machine]:
    with machine(tmp_path) as found:
        yield found


@pytest.fixture(scope="module", name="broker", params=KINDS)
def _broker(request: pytest.FixtureRequest) -> Iterator[LocalBroker]:
    """A broker of each kind, in turn."""
    need({"embedded": "iotcore"}.get(request.param, request.param))
    with start_broker(kind=request.param) as found:
        yield found


@pytest.fixture(scope="module", name="embedded")
def _embedded() -> Iterator[LocalBroker]:
    """The broker that is there without being installed."""
    need("iotcore")
    with start_broker(kind="embedded") as found:
        yield found
