"""All that is measured of a node, in one sample: of this one, of one that has nothing, and with a sensor that fails."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from monitor.points.points import Point
from monitor.sensors.all import Sensors, sensors_of
from monitor.sensors.base import Missing
from monitor.sensors.host import Host
from monitor.sensors.jetson import Jetson
from monitor.sensors.network import Interfaces
from monitor.sensors.nvml import Gpus
from monitor.sensors.processes import OwnProcesses
from monitor.sensors.rapl import Rapl
from monitor.stores.sqlite import FILE, SqliteReader, SqliteStore
from tests.support.monitor.cgroup_folders import GIB, group_v2, own_groups
from tests.support.monitor.points import as_in_the_schema, only, reasons
from tests.support.monitor.recorded_nvml import RecordedNvml


class Broken:
    """A sensor with a mistake."""

    def __init__(self) -> None:
        self.asked = 0

    def sample(self, time_ns: int, now_s: float) -> list[Point]:
        self.asked += 1
        raise ZeroDivisionError("float division by zero")

    def close(self) -> None:
        """Nothing is held."""


def test_this_machine_says_what_it_has_and_once_what_it_lacks() -> None:
    sensors = Sensors("desk", "r1")
    found = [sensors.sample(1000 * number, number / 2) for number in range(1, 4)]
    sensors.close()
    sensors.close()
    for points in found:
        as_in_the_schema(points)
        assert only(points, "node")["memory_total_bytes"] > 0
        assert {(point.tags["node"], point.tags["run"]) for point in points} == {("desk", "r1")}
    said = [point.tags["sensor"] for points in found for point in points if point.measurement == "missing"]
    assert len(said) == len(set(said))
    # Whatever machine this is: a GPU is there, or it is missing; so with what its processors draw.
    kinds = {point.measurement for points in found for point in points}
    assert "gpu" in kinds or any(sensor.startswith("gpu") for sensor in said)
    assert "power" in kinds or any(sensor.startswith("rapl") for sensor in said)
    assert "interface" in kinds


def test_a_container_with_nothing_but_a_limit_says_that_and_once_what_it_lacks(tmp_path: Path) -> None:
    own_groups(tmp_path, "0::/")
    group_v2(tmp_path, "", str(GIB // 2), 1000, 0)
    no_driver = Gpus(lambda: RecordedNvml(refuses_to_begin=12))
    others = [sensor for sensor in sensors_of(tmp_path) if not isinstance(sensor, Gpus)]
    sensors = Sensors("pod", sensors=[no_driver, *others])
    first, second = sensors.sample(1, 0.0), sensors.sample(2, 0.5)
    assert reasons(first) == {
        "gpu": "NVML Shared Library Not Found",
        "rapl": "there is no /sys/class/powercap/intel-rapl:*",
    }
    assert reasons(second) == {}
    for points in (first, second):
        assert only(points, "node")["memory_total_bytes"] == GIB // 2
        assert {point.measurement for point in points} <= {"node", "interface", "process", "missing"}


def test_every_kind_of_sensor_is_asked() -> None:
    assert [type(sensor) for sensor in sensors_of()] == [Host, Interfaces, Gpus, Rapl, Jetson]


def test_processes_keep_their_own_run_and_the_monitor_has_the_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    processes = OwnProcesses()
    processes.began("stage", "head", 1, "r7")  # there is always one with pid 1
    points = Sensors("desk", "r1", processes, sensors=[]).sample(1, 0.0)
    assert {point.tags["name"]: point.tags["run"] for point in points} == {"monitor": "r1", "head": "r7"}


def test_a_sensor_that_fails_costs_none_of_the_others_and_is_told_and_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken = Broken()
    sensors = Sensors("desk", sensors=[broken, Gpus(RecordedNvml)])
    with caplog.at_level(logging.INFO, "monitor.sensors.all"):
        first, second = sensors.sample(1, 0.0), sensors.sample(2, 0.5)
    assert reasons(first)["broken"] == "ZeroDivisionError: float division by zero"
    assert reasons(second) == {}
    assert len(caplog.records) == 1
    for points in (first, second):
        assert {point.measurement for point in points} >= {"gpu", "process"}
    assert broken.asked == 2


def test_reasons_that_are_never_the_same_twice_end_some_time() -> None:
    missing = Missing()
    told = [point for number in range(1000) for point in missing.tell(1, "gpu", f"reason {number}")]
    assert len(told) < 1000


def test_all_of_it_goes_into_a_store_and_comes_out_with_nulls(tmp_path: Path) -> None:
    sensors = Sensors("desk", "r1", sensors=[Gpus(RecordedNvml), *sensors_of(tmp_path)])
    store = SqliteStore(tmp_path / FILE)
    store.write(sensors.sample(1000, 0.0))
    store.close()
    reader = SqliteReader(tmp_path / FILE)
    powers = {point.tags["gpu"]: point.fields["power_w"] for point in reader.points("gpu")}
    assert powers == {"0": 10.0, "1": None}
    assert len(reader.points("missing")) >= 3
