"""The daemon and energy per sample: every result that it hears of is counted once, beside the samples of the node."""

from __future__ import annotations

from collections.abc import Sequence

from brokers.telemetry.schema import RequestDone
from monitor.daemon.collector import TelemetryCollector
from monitor.points.points import TelemetryPoint, event_to_points
from monitor.stores.batch_writer import BatchWriter
from tests.support.pipelines.processes import eventually


class Kept:
    """A store that keeps in memory what it is given."""

    def __init__(self) -> None:
        self.points: list[TelemetryPoint] = []

    def write(self, points: Sequence[TelemetryPoint]) -> None:
        self.points += points

    def close(self) -> None:
        """There is nothing to close."""

    def samples(self) -> int:
        found = [point.fields["samples"] for point in self.points if point.measurement == "energy"]
        return sum(int(each or 0) for each in found)


def test_each_result_is_counted_once_whoever_tells_of_it() -> None:
    kept = Kept()
    telemetry = TelemetryCollector("box", "r1", [BatchWriter(kept, "memory")], sample_interval_s=0.05)
    telemetry.start()
    try:
        for number in range(1, 41):
            telemetry.add(event_to_points(RequestDone(time_ns=number, source="camera"), "box", "r1"))
        eventually("all samples", lambda: kept.samples() >= 40)
    finally:
        telemetry.stop(5)
    assert kept.samples() == 40
    assert {
        point.tags["run"] for point in kept.points if point.measurement == "energy" and point.fields["samples"]
    } == {"r1"}
