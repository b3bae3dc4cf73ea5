"""The collector passes points to all stores, and counts each sample once."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from brokers.telemetry.schema import RequestDone
from monitor.daemon.collector import TelemetryCollector
from monitor.daemon.unix_listener import UnixListener
from monitor.errors import SocketUnavailable
from monitor.points.points import TelemetryPoint, event_to_points
from monitor.stores.batch_writer import BatchWriter
from tests.support.monitor.unix_client import short_temp_folder


class MemoryStore:
    """Keeps points in memory."""

    waiting = 0
    dropped = 0

    def __init__(self) -> None:
        self.points: list[TelemetryPoint] = []

    def write(self, items: Sequence[TelemetryPoint]) -> None:
        self.points += items

    def close(self) -> None:
        """There is nothing to close."""

    def of(self, measurement: str) -> list[TelemetryPoint]:
        return [point for point in self.points if point.measurement == measurement]


def test_each_result_counts_as_one_sample() -> None:
    store = MemoryStore()
    collector = TelemetryCollector("box", "r1", [BatchWriter(store, "memory")], sample_interval_s=0.05)
    collector.start()
    for number in range(1, 41):
        collector.add(event_to_points(RequestDone(time_ns=number, source="camera"), "box", "r1"))
    collector.stop(60)
    samples = [int(point.fields["samples"] or 0) for point in store.of("energy") if point.tags["run"] == "r1"]
    assert sum(samples) == 40
    assert len(store.of("request")) == 40
    [monitor_point] = store.of("monitor")
    assert monitor_point.fields["dropped_points"] == 0


def test_unusable_socket_is_an_error_unless_it_is_optional(caplog: pytest.LogCaptureFixture) -> None:
    with short_temp_folder() as folder:
        (folder / "events").write_text("a file")
        listener = UnixListener(folder / "events")
        required = TelemetryCollector("box", "r1", listener=listener)
        with pytest.raises(SocketUnavailable):
            required.start()
        required.stop(0)
        optional = TelemetryCollector("box", "r1", listener=listener, listener_optional=True)
        optional.start()
        assert optional.socket_path is None
        optional.stop(0)
    assert "no events are received" in caplog.text
