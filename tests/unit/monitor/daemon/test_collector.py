"""The collector passes points to all stores, and counts each sample once."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from brokers.telemetry.schema import RequestDone, StepDone
from monitor.daemon.collector import EnergyPerSample, TelemetryCollector
from monitor.daemon.event_socket import UnixListener
from monitor.errors import SocketUnavailable
from monitor.points.points import TelemetryPoint, event_to_points
from monitor.stores.batch_writer import BatchWriter
from tests.support.monitor.points import assert_matches_schema
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


def energy(measurement: str, energy_j: float | None, run: str = "", **tags: str) -> TelemetryPoint:
    return TelemetryPoint(measurement, 1, {"node": "box", "run": run, **tags}, {"energy_j": energy_j, "power_w": 1.0})


def request(run: str = "", error: str = "") -> list[TelemetryPoint]:
    return event_to_points(RequestDone(time_ns=1, run=run, source="camera", error=error), "box")


def totals(*points: TelemetryPoint) -> dict[str, dict[str, object]]:
    """The fields of the `energy` points by run."""
    energy_per_sample = EnergyPerSample("box")
    energy_per_sample.add(points)
    return {point.tags["run"]: dict(point.fields) for point in energy_per_sample.pop_points(9)}


def test_energy_of_gpus_and_rails_is_beside_samples() -> None:
    energy_per_sample = EnergyPerSample("box")
    energy_per_sample.add([energy("gpu", 10.0, gpu="0"), energy("gpu", 5.0, gpu="1")])
    energy_per_sample.add([energy("power", 4.0, rail="package-0"), *request(), *request(), *request()])
    points = energy_per_sample.pop_points(9)
    assert points == [TelemetryPoint("energy", 9, {"node": "box", "run": ""}, {"energy_j": 19.0, "samples": 3})]
    assert_matches_schema(points)
    assert energy_per_sample.pop_points(10) == []


def test_part_of_a_rail_is_not_counted_twice() -> None:
    rails = [energy("power", 4.0, rail="package-0"), energy("power", 3.0, rail="package-0/core")]
    assert totals(*rails)[""]["energy_j"] == 4.0


def test_samples_are_results_and_rows_of_steps() -> None:
    step = event_to_points(StepDone(time_ns=1, source="digits", step=1, rows=64), "box")
    assert totals(*request(error="RequestFailed"), *request(), *step)[""]["samples"] == 65


def test_runs_are_separate() -> None:
    points = [energy("gpu", 10.0, run="a", gpu="0"), *request(run="a"), *request(run="b"), *request(run="b")]
    assert totals(*points) == {"a": {"energy_j": 10.0, "samples": 1}, "b": {"energy_j": None, "samples": 2}}


def test_energy_is_unknown_without_a_value() -> None:
    assert totals(energy("gpu", None, gpu="0"), *request())[""]["energy_j"] is None
