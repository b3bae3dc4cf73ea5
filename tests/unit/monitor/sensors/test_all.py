"""All sensors of a node in one sample, on this machine and on a bare one, and with a sensor that fails."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from brokers.telemetry.schema import ProcessStarted, ProcessStopped
from monitor.sensors.all import Sampler, default_sensors
from monitor.sensors.base import Reading, Sensor
from monitor.sensors.nvml import GpuSensor
from monitor.sensors.processes import ProcessSensor
from tests.support.monitor.cgroup_folders import GIB, write_cgroup_v2, write_proc_self_cgroup
from tests.support.monitor.points import assert_matches_schema, missing_reasons, single_point_fields
from tests.support.monitor.recorded_nvml import RecordedNvml


class FailingSensor(Sensor):
    """A sensor with a bug."""

    name = "failing"

    def __init__(self) -> None:
        super().__init__()
        self.call_count = 0

    def measure(self, now_s: float) -> Iterator[Reading]:
        self.call_count += 1
        raise ZeroDivisionError("float division by zero")


def test_this_machine_is_sampled_and_missing_values_are_reported_once() -> None:
    sensors = Sampler("desk", "r1")
    samples = [sensors.sample(1000 * number, number / 2) for number in range(1, 4)]
    sensors.close()
    sensors.close()
    for points in samples:
        assert_matches_schema(points)
        assert single_point_fields(points, "node")["memory_total_bytes"] > 0
        assert {(point.tags["node"], point.tags["run"]) for point in points} == {("desk", "r1")}
    missing = [point.tags["sensor"] for points in samples for point in points if point.measurement == "missing"]
    assert len(missing) == len(set(missing))
    # On any machine, a GPU is either measured or missing, and so is the power of its processors.
    measurements = {point.measurement for points in samples for point in points}
    assert "gpu" in measurements or any(sensor.startswith("gpu") for sensor in missing)
    assert "power" in measurements or any(sensor.startswith("rapl") for sensor in missing)
    assert "interface" in measurements


def test_container_without_sensors_reports_them_once(tmp_path: Path) -> None:
    write_proc_self_cgroup(tmp_path, "0::/")
    write_cgroup_v2(tmp_path, "", str(GIB // 2), 1000, 0)
    no_driver = GpuSensor(lambda: RecordedNvml(init_error=12))
    others = [sensor for sensor in default_sensors(tmp_path) if not isinstance(sensor, GpuSensor)]
    sensors = Sampler("pod", sensors=[no_driver, *others])
    first, second = sensors.sample(1, 0.0), sensors.sample(2, 0.5)
    assert missing_reasons(first) == {
        "gpu": "NVML Shared Library Not Found",
        "rapl": "there is no /sys/class/powercap/intel-rapl:*",
    }
    assert missing_reasons(second) == {}
    for points in (first, second):
        assert single_point_fields(points, "node")["memory_total_bytes"] == GIB // 2
        assert {point.measurement for point in points} <= {"node", "interface", "process", "missing"}


def test_sensors_have_the_documented_names() -> None:
    names = [sensor.name for sensor in default_sensors()]
    assert [*names, ProcessSensor.name] == ["host", "network", "gpu", "rapl", "jetson", "processes"]


def test_process_keeps_its_own_run() -> None:
    sampler = Sampler("desk", "r1", sensors=[])
    sampler.processes.on_start("stage", "head", 1, "r7")  # there is always a process with pid 1
    points = sampler.sample(1, 0.0)
    assert {point.tags["name"]: point.tags["run"] for point in points} == {"monitor": "r1", "head": "r7"}


def test_failing_sensor_is_reported_once_and_others_are_sampled(caplog: pytest.LogCaptureFixture) -> None:
    failing = FailingSensor()
    sensors = Sampler("desk", sensors=[failing, GpuSensor(RecordedNvml)])
    with caplog.at_level(logging.INFO, "monitor.sensors.base"):
        first, second = sensors.sample(1, 0.0), sensors.sample(2, 0.5)
    assert missing_reasons(first)["failing"] == "ZeroDivisionError: float division by zero"
    assert missing_reasons(second) == {}
    assert caplog.messages == ["the sensor failing failed"]
    for points in (first, second):
        assert {point.measurement for point in points} >= {"gpu", "process"}
    assert failing.call_count == 2


def test_number_of_reports_is_bounded() -> None:
    sensor = FailingSensor()
    reports = [each for number in range(1000) for each in sensor.report_missing("", f"reason {number}")]
    assert len(reports) < 1000


def test_sampler_follows_processes_by_their_events() -> None:
    sampler = Sampler("desk", "r1")
    sampler.on_events([ProcessStarted(time_ns=1, role="stage", name="head", pid=1)])
    processes = [point for point in sampler.sample(1, 0.0) if point.measurement == "process"]
    assert [(point.tags["name"], point.tags["run"]) for point in processes] == [("monitor", "r1"), ("head", "r1")]
    sampler.on_events([ProcessStopped(time_ns=2, pid=1)])
    assert len([point for point in sampler.sample(2, 0.5) if point.measurement == "process"]) == 1
    sampler.stop(1.0)
