"""Energy per sample: joules and samples are added up run by run, and given once."""

from __future__ import annotations

from brokers.telemetry.schema import RequestDone, StepDone
from monitor.points.points import TelemetryPoint, event_to_points
from monitor.points.schema import MEASUREMENTS
from monitor.sensors.energy_per_sample import EnergyPerSample


def used(measurement: str, energy_j: float | None, run: str = "", **tags: str) -> TelemetryPoint:
    return TelemetryPoint(measurement, 1, {"node": "box", "run": run, **tags}, {"energy_j": energy_j, "power_w": 1.0})


def answered(run: str = "", error: str = "") -> list[TelemetryPoint]:
    return event_to_points(RequestDone(time_ns=1, run=run, source="camera", error=error), "box")


def test_what_gpus_and_rails_used_stands_beside_the_results_of_the_same_time() -> None:
    spending = EnergyPerSample("box")
    spending.add([used("gpu", 10.0, gpu="0"), used("gpu", 5.0, gpu="1"), used("power", 4.0, rail="package-0")])
    for _ in range(3):
        spending.add(answered())
    assert spending.pop_points(9) == [
        TelemetryPoint("energy", 9, {"node": "box", "run": ""}, {"energy_j": 19.0, "samples": 3})
    ]
    assert spending.pop_points(10) == []


def test_a_rail_that_is_part_of_another_is_not_counted_twice() -> None:
    spending = EnergyPerSample("box")
    spending.add([used("power", 4.0, rail="package-0"), used("power", 3.0, rail="package-0/core")])
    [point] = spending.pop_points(9)
    assert point.fields["energy_j"] == 4.0


def test_a_request_without_a_result_is_no_sample_and_each_row_of_a_step_is_one() -> None:
    spending = EnergyPerSample("box")
    spending.add([*answered(error="RequestFailed"), *answered()])
    spending.add(event_to_points(StepDone(time_ns=1, source="digits", step=1, rows=64), "box"))
    [point] = spending.pop_points(9)
    assert point.fields["samples"] == 65


def test_runs_are_kept_apart() -> None:
    spending = EnergyPerSample("box")
    spending.add([used("gpu", 10.0, run="a", gpu="0"), *answered(run="a"), *answered(run="b"), *answered(run="b")])
    found = {point.tags["run"]: dict(point.fields) for point in spending.pop_points(9)}
    assert found == {"a": {"energy_j": 10.0, "samples": 1}, "b": {"energy_j": None, "samples": 2}}


def test_a_sensor_without_a_figure_leaves_the_energy_unknown() -> None:
    spending = EnergyPerSample("box")
    spending.add([used("gpu", None, gpu="0"), *answered()])
    assert [point.fields["energy_j"] for point in spending.pop_points(9)] == [None]


def test_its_points_are_those_of_the_schema() -> None:
    spending = EnergyPerSample("box")
    spending.add(answered())
    [point] = spending.pop_points(9)
    measurement = MEASUREMENTS[point.measurement]
    assert tuple(point.tags) == measurement.tags
    assert list(point.fields) == [field.name for field in measurement.fields]
