"""RAPL's zones, from a folder like Linux's."""

from __future__ import annotations

from pathlib import Path

import pytest

from monitor.points.points import TelemetryPoint
from monitor.sensors.counters import is_additive
from monitor.sensors.rapl import RaplSensor
from tests.support.monitor.points import missing_reasons

RANGE_UJ = 262_143_328_850
POWERCAP = Path("sys/class/powercap")


def zone(root: Path, folder: str, name: str, energy_uj: int, range_uj: int | None = RANGE_UJ) -> Path:
    """A zone as Linux has it: a link to where the device is."""
    device = root / "sys/devices/virtual/powercap" / folder
    device.mkdir(parents=True)
    (device / "name").write_text(f"{name}\n")
    (device / "energy_uj").write_text(f"{energy_uj}\n")
    if range_uj is not None:
        (device / "max_energy_range_uj").write_text(f"{range_uj}\n")
    (root / POWERCAP).mkdir(parents=True, exist_ok=True)
    (root / POWERCAP / folder).symlink_to(device)
    return device


def count(device: Path, energy_uj: int) -> None:
    (device / "energy_uj").write_text(f"{energy_uj}\n")


def power(points: list[TelemetryPoint]) -> dict[str, dict[str, float]]:
    return {point.tags["rail"]: dict(point.fields) for point in points if point.measurement == "power"}  # type: ignore[arg-type]


def test_energy_is_what_was_counted_since_the_last_sample_and_power_is_that_for_a_second(tmp_path: Path) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000)
    rapl = RaplSensor(tmp_path)
    assert rapl.sample(1, 10.0) == []
    count(package, 13_000_000)
    assert power(rapl.sample(2, 10.5)) == {"package-0": {"power_w": 16.0, "energy_j": 8.0}}


def test_a_counter_that_wraps_at_its_range_is_counted_on(tmp_path: Path) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", RANGE_UJ - 1_000_000)
    rapl = RaplSensor(tmp_path)
    rapl.sample(1, 10.0)
    count(package, 3_000_000)
    assert power(rapl.sample(2, 12.0)) == {"package-0": {"power_w": 2.0, "energy_j": 4.0}}


def test_without_a_range_a_counter_that_goes_back_is_no_energy_rather_than_a_wrong_one(tmp_path: Path) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", 9_000_000, range_uj=None)
    rapl = RaplSensor(tmp_path)
    rapl.sample(1, 10.0)
    count(package, 1_000_000)
    assert rapl.sample(2, 11.0) == []
    count(package, 2_000_000)
    assert power(rapl.sample(3, 12.0)) == {"package-0": {"power_w": 1.0, "energy_j": 1.0}}


def test_packages_and_their_memory_add_up_and_no_energy_counts_twice(tmp_path: Path) -> None:
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
    (tmp_path / POWERCAP / "intel-rapl").mkdir(parents=True)  # the kind of control itself: no zone
    devices = [zone(tmp_path, folder, name, 0) for folder, name in names.items()]
    rapl = RaplSensor(tmp_path)
    rapl.sample(1, 0.0)
    for device in devices:
        count(device, 1_000_000)
    points = rapl.sample(2, 1.0)
    rails = [point.tags["rail"] for point in points]
    assert {rail for rail in rails if is_additive(rail)} == {"package-0", "dram-0", "package-1", "dram-1"}
    assert {rail for rail in rails if not is_additive(rail)} == {"package-0/core", "package-0/uncore", "board/psys"}
    assert len(rails) == 7


def test_where_only_root_may_read_it_that_is_said_once_for_all_zones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        zone(tmp_path, f"intel-rapl:{number}", f"package-{number}", 0)
    read_text, tried = Path.read_text, []

    def not_for_us(path: Path, *arguments: str) -> str:
        if path.name == "energy_uj":  # who runs the tests may be root, to whom file modes mean nothing
            tried.append(path)
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path, *arguments)

    monkeypatch.setattr(Path, "read_text", not_for_us)
    rapl = RaplSensor(tmp_path)
    assert missing_reasons(rapl.sample(1, 0.0)) == {"rapl": "only root may read energy_uj, since Linux 5.10"}
    assert rapl.sample(2, 0.5) == []
    assert len(tried) == 2


def test_a_zone_that_goes_away_is_told_once_and_the_others_go_on(tmp_path: Path) -> None:
    devices = [zone(tmp_path, f"intel-rapl:{number}", f"package-{number}", 0) for number in range(2)]
    rapl = RaplSensor(tmp_path)
    rapl.sample(1, 0.0)
    (devices[1] / "energy_uj").unlink()
    second = rapl.sample(2, 1.0)
    assert missing_reasons(second) == {"rapl.package-1": "No such file or directory"}
    assert [sorted(power(points)) for points in (second, rapl.sample(3, 2.0))] == [["package-0"], ["package-0"]]


def test_a_file_that_holds_no_number_is_told(tmp_path: Path) -> None:
    device = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    (device / "energy_uj").write_text("")
    assert "invalid literal" in missing_reasons(RaplSensor(tmp_path).sample(1, 0.0))["rapl.package-0"]


def test_a_machine_without_it_is_missing_it_once(tmp_path: Path) -> None:
    rapl = RaplSensor(tmp_path)
    assert missing_reasons(rapl.sample(1, 0.0)) == {"rapl": "there is no /sys/class/powercap/intel-rapl:*"}
    assert rapl.sample(2, 0.5) == []
