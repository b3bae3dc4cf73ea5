"""All that is measured of a node, in one sample: of this one, of one that has nothing, and with a sensor that fails."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from monitor.points.points import TelemetryPoint
from monitor.sensors.all import NodeSensors, default_sensors
from monitor.sensors.base import UnavailableSensors
from monitor.sensors.host import HostSensor
from monitor.sensors.jetson import JetsonSensor
from monitor.sensors.network import NetworkSensor
from monitor.sensors.nvml import GpuSensor
from monitor.sensors.processes import ProcessSensor
from monitor.sensors.rapl import RaplSensor
from monitor.stores.sqlite import TELEMETRY_FILE, SqliteReader, SqliteStore
from tests.support.monitor.cgroup_folders import GIB, write_cgroup_v2, write_proc_self_cgroup
from tests.support.monitor.points import assert_matches_schema, missing_reasons, single_point_fields
from tests.support.monitor.recorded_nvml import RecordedNvml


class Broken:
    """A sensor with a mistake."""

    def __init__(self) -> None:
        self.asked = 0

    def sample(self, time_ns: int, now_s: float) -> list[TelemetryPoint]:
        self.asked += 1
        raise ZeroDivisionError("float division by zero")

    def close(self) -> None:
        """Nothing is held."""


def test_this_machine_says_what_it_has_and_once_what_it_lacks() -> None:
    sensors = NodeSensors("desk", "r1")
    found = [sensors.sample(1000 * number, number / 2) for number in range(1, 4)]
    sensors.close()
    sensors.close()
    for points in found:
        assert_matches_schema(points)
        assert single_point_fields(points, "node")["memory_total_bytes"] > 0
        assert {(point.tags["node"], point.tags["run"]) for point in points} == {("desk", "r1")}
    said = [point.tags["sensor"] for points in found for point in points if point.measurement == "missing"]
    assert len(said) == len(set(said))
    # Whatever machine this is: a GPU is there, or it is missing; so with what its processors draw.
    kinds = {point.measurement for points in found for point in points}
    assert "gpu" in kinds or any(sensor.startswith("gpu") for sensor in said)
    assert "power" in kinds or any(sensor.startswith("rapl") for sensor in said)
    assert "interface" in kinds


def test_a_container_with_nothing_but_a_limit_says_that_and_once_what_it_lacks(tmp_path: Path) -> None:
    write_proc_self_cgroup(tmp_path, "0::/")
    write_cgroup_v2(tmp_path, "", str(GIB // 2), 1000, 0)
    no_driver = GpuSensor(lambda: RecordedNvml(init_error=12))
    others = [sensor for sensor in default_sensors(tmp_path) if not isinstance(sensor, GpuSensor)]
    sensors = NodeSensors("pod", sensors=[no_driver, *others])
    first, second = sensors.sample(1, 0.0), sensors.sample(2, 0.5)
    assert missing_reasons(first) == {
        "gpu": "NVML Shared Library Not Found",
        "rapl": "there is no /sys/class/powercap/intel-rapl:*",
    }
    assert missing_reasons(second) == {}
    for points in (first, second):
        assert single_point_fields(points, "node")["memory_total_bytes"] == GIB // 2
        assert {point.measurement for point in points} <= {"node", "interface", "process", "missing"}


def test_every_kind_of_sensor_is_asked() -> None:
    assert [type(sensor) for sensor in default_sensors()] == [
        HostSensor,
        NetworkSensor,
        GpuSensor,
        RaplSensor,
        JetsonSensor,
    ]


def test_processes_keep_their_own_run_and_the_monitor_has_the_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    processes = ProcessSensor()
    processes.on_start("stage", "head", 1, "r7")  # there is always one with pid 1
    points = NodeSensors("desk", "r1", processes, sensors=[]).sample(1, 0.0)
    assert {point.tags["name"]: point.tags["run"] for point in points} == {"monitor": "r1", "head": "r7"}


def test_a_sensor_that_fails_costs_none_of_the_others_and_is_told_and_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken = Broken()
    sensors = NodeSensors("desk", sensors=[broken, GpuSensor(RecordedNvml)])
    with caplog.at_level(logging.INFO, "monitor.sensors.all"):
        first, second = sensors.sample(1, 0.0), sensors.sample(2, 0.5)
    assert missing_reasons(first)["broken"] == "ZeroDivisionError: float division by zero"
    assert missing_reasons(second) == {}
    assert len(caplog.records) == 1
    for points in (first, second):
        assert {point.measurement for point in points} >= {"gpu", "process"}
    assert broken.asked == 2


def test_reasons_that_are_never_the_same_twice_end_some_time() -> None:
    missing = UnavailableSensors()
    told = [point for number in range(1000) for point in missing.report_once(1, "gpu", f"reason {number}")]
    assert len(told) < 1000


def test_all_of_it_goes_into_a_store_and_comes_out_with_nulls(tmp_path: Path) -> None:
    sensors = NodeSensors("desk", "r1", sensors=[GpuSensor(RecordedNvml), *default_sensors(tmp_path)])
    store = SqliteStore(tmp_path / TELEMETRY_FILE)
    store.write(sensors.sample(1000, 0.0))
    store.close()
    reader = SqliteReader(tmp_path / TELEMETRY_FILE)
    powers = {point.tags["gpu"]: point.fields["power_w"] for point in reader.points("gpu")}
    assert powers == {"0": 10.0, "1": None}
    assert len(reader.points("missing")) >= 3
