"""RAPL zones, from a folder like Linux's."""

from __future__ import annotations

from pathlib import Path

import pytest

from monitor.points.points import TelemetryPoint
from monitor.sensors.counters import is_additive
from monitor.sensors.rapl import RaplSensor
from tests.support.monitor.points import missing_reasons

RANGE_UJ = 262_143_328_850
POWERCAP = Path("sys/class/powercap")


def make_zone(root: Path, folder: str, name: str, energy_uj: int, range_uj: int | None = RANGE_UJ) -> Path:
    """A zone as Linux has it: a link to the device's folder, which is returned."""
    device = root / "sys/devices/virtual/powercap" / folder
    device.mkdir(parents=True)
    (device / "name").write_text(f"{name}\n")
    set_energy(device, energy_uj)
    if range_uj is not None:
        (device / "max_energy_range_uj").write_text(f"{range_uj}\n")
    (root / POWERCAP).mkdir(parents=True, exist_ok=True)
    (root / POWERCAP / folder).symlink_to(device)
    return device


def set_energy(device: Path, energy_uj: int) -> None:
    (device / "energy_uj").write_text(f"{energy_uj}\n")


def power(points: list[TelemetryPoint]) -> dict[str, dict[str, object]]:
    return {point.tags["rail"]: dict(point.fields) for point in points if point.measurement == "power"}


def test_energy_and_power_are_since_previous_sample(tmp_path: Path) -> None:
    package = make_zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000)
    sensor = RaplSensor(tmp_path)
    assert sensor.sample(1, 10.0) == []
    set_energy(package, 13_000_000)
    assert power(sensor.sample(2, 10.5)) == {"package-0": {"power_w": 16.0, "energy_j": 8.0}}


def test_counter_wraps_at_its_range(tmp_path: Path) -> None:
    package = make_zone(tmp_path, "intel-rapl:0", "package-0", RANGE_UJ - 1_000_000)
    sensor = RaplSensor(tmp_path)
    sensor.sample(1, 10.0)
    set_energy(package, 3_000_000)
    assert power(sensor.sample(2, 12.0)) == {"package-0": {"power_w": 2.0, "energy_j": 4.0}}


def test_drop_without_a_range_is_unknown(tmp_path: Path) -> None:
    package = make_zone(tmp_path, "intel-rapl:0", "package-0", 9_000_000, range_uj=None)
    sensor = RaplSensor(tmp_path)
    sensor.sample(1, 10.0)
    set_energy(package, 1_000_000)
    assert sensor.sample(2, 11.0) == []
    set_energy(package, 2_000_000)
    assert power(sensor.sample(3, 12.0)) == {"package-0": {"power_w": 1.0, "energy_j": 1.0}}


def test_additive_rails_count_no_energy_twice(tmp_path: Path) -> None:
    names = {
        "intel-rapl:0": "package-0",
        "intel-rapl:0:0": "core",
        "intel-rapl:0:1": "uncore",
        "intel-rapl:0:2": "dram",
        "intel-rapl:1": "package-1",
        "intel-rapl:1:0": "dram",
        "intel-rapl:2": "psys",
        "intel-rapl-mmio:0": "package-0",
    }
    (tmp_path / POWERCAP / "intel-rapl").mkdir(parents=True)  # the control type itself, which is no zone
    devices = [make_zone(tmp_path, folder, name, 0) for folder, name in names.items()]
    sensor = RaplSensor(tmp_path)
    sensor.sample(1, 0.0)
    for device in devices:
        set_energy(device, 1_000_000)
    rails = [point.tags["rail"] for point in sensor.sample(2, 1.0)]
    assert {rail for rail in rails if is_additive(rail)} == {"package-0", "dram-0", "package-1", "dram-1"}
    assert {rail for rail in rails if not is_additive(rail)} == {"package-0/core", "package-0/uncore", "board/psys"}
    assert len(rails) == 7


def test_missing_permission_is_reported_once_for_all_zones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(2):
        make_zone(tmp_path, f"intel-rapl:{number}", f"package-{number}", 0)
    read_text = Path.read_text
    attempts = []

    def read_as_user(path: Path, **options: str) -> str:
        if path.name == "energy_uj":  # the tests may run as root, for whom file modes have no effect
            attempts.append(path)
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path, **options)

    monkeypatch.setattr(Path, "read_text", read_as_user)
    sensor = RaplSensor(tmp_path)
    assert missing_reasons(sensor.sample(1, 0.0)) == {"rapl": "only root may read energy_uj, since Linux 5.10"}
    assert sensor.sample(2, 0.5) == []
    assert len(attempts) == 2


def test_removed_zone_is_reported_once_and_others_go_on(tmp_path: Path) -> None:
    devices = [make_zone(tmp_path, f"intel-rapl:{number}", f"package-{number}", 0) for number in range(2)]
    sensor = RaplSensor(tmp_path)
    sensor.sample(1, 0.0)
    (devices[1] / "energy_uj").unlink()
    second = sensor.sample(2, 1.0)
    assert missing_reasons(second) == {"rapl.package-1": "No such file or directory"}
    assert [sorted(power(points)) for points in (second, sensor.sample(3, 2.0))] == [["package-0"], ["package-0"]]


def test_file_without_a_number_is_reported(tmp_path: Path) -> None:
    device = make_zone(tmp_path, "intel-rapl:0", "package-0", 0)
    (device / "energy_uj").write_text("")
    assert "invalid literal" in missing_reasons(RaplSensor(tmp_path).sample(1, 0.0))["rapl.package-0"]


def test_machine_without_rapl_reports_it_once(tmp_path: Path) -> None:
    sensor = RaplSensor(tmp_path)
    assert missing_reasons(sensor.sample(1, 0.0)) == {"rapl": "there is no /sys/class/powercap/intel-rapl:*"}
    assert sensor.sample(2, 0.5) == []
