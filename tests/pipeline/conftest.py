"""Fixtures of the pipeline tests: a broker for the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from brokers.server.local_broker import BrokerKind, LocalBroker, start_broker
from tests.support.environment.external_programs import require_broker
from tests.support.pipelines.processes import ProcessSandbox, process_sandbox

BROKER_KINDS: tuple[BrokerKind, ...] = ("embedded", "mosquitto")


@pytest.fixture(name="sandbox")
def _sandbox(tmp_path: Path) -> Iterator[ProcessSandbox]:
    with process_sandbox(tmp_path) as sandbox:
        yield sandbox


@pytest.fixture(scope="module", name="broker", params=BROKER_KINDS)
def _broker(request: pytest.FixtureRequest) -> Iterator[LocalBroker]:
    """A broker of each kind, for tests of what depends on the broker."""
    require_broker(request.param)
    with start_broker(kind=request.param) as broker:
        yield broker


@pytest.fixture(scope="module", name="embedded_broker")
def _embedded_broker() -> Iterator[LocalBroker]:
    require_broker("embedded")
    with start_broker(kind="embedded") as broker:
        yield broker
