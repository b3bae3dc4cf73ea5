"""The liveness file is touched with each publication, where the environment names one."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from brokers.dispatch.presence import SourceRecord
from brokers.dispatch.presence_publisher import LIVENESS_VARIABLE, PresencePublisher
from tests.support.brokers.broker_kinds import run_async
from tests.support.brokers.in_memory import MemoryBroker, MemoryTransport

RECORD = SourceRecord(source="cam", pipeline="street", site="local", node="here", pid=1)


async def publish(count: int) -> None:
    transport = MemoryTransport(MemoryBroker())
    await transport.connect()
    publisher = PresencePublisher(transport, RECORD)
    for _ in range(count):
        await publisher.publish()
    await transport.close()


def test_publication_creates_and_updates_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "liveness"
    monkeypatch.setenv(LIVENESS_VARIABLE, str(path))
    run_async(publish(1))
    os.utime(path, (0, 0))
    run_async(publish(1))
    assert path.stat().st_mtime > 0


@pytest.mark.parametrize("value", [None, ""])
def test_without_the_variable_no_file_is_created(
    value: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if value is None:
        monkeypatch.delenv(LIVENESS_VARIABLE, raising=False)
    else:
        monkeypatch.setenv(LIVENESS_VARIABLE, value)
    run_async(publish(1))
    assert list(tmp_path.iterdir()) == []


def test_unwritable_file_is_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(LIVENESS_VARIABLE, str(tmp_path / "no folder" / "liveness"))
    with caplog.at_level(logging.WARNING):
        run_async(publish(2))
    assert len(caplog.records) == 1
