"""Rails and GPU load of a Jetson, from folders like those of its releases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from monitor.points.points import TelemetryPoint
from monitor.sensors.counters import is_additive
from monitor.sensors.jetson import JetsonSensor
from tests.support.monitor.points import missing_reasons

ORIN_NANO = ("VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC")


def make_board(root: Path, model: str = "NVIDIA Jetson Orin Nano Developer Kit") -> Path:
    tree = root / "proc/device-tree"
    tree.mkdir(parents=True)
    (tree / "compatible").write_text("nvidia,p3768-0000+p3767-0005\0nvidia,tegra234\0")
    (tree / "model").write_text(f"{model}\0")
    return root


def make_hwmon(
    root: Path, address: str, labels: tuple[str, ...], millivolts: int = 5000, milliamperes: int = 400
) -> Path:
    """A power monitor with the kernel's driver: a link to its device; the fourth channel is the sum of currents."""
    folder = root / "sys/devices/platform/i2c" / address / "hwmon/hwmon3"
    folder.mkdir(parents=True)
    for channel, label in enumerate(labels, start=1):
        (folder / f"in{channel}_label").write_text(f"{label}\n")
        (folder / f"in{channel}_input").write_text(f"{millivolts}\n")
        (folder / f"curr{channel}_input").write_text(f"{milliamperes}\n")
    (folder / "in7_label").write_text("sum of shunt voltages\n")
    (folder / "in7_input").write_text("760\n")
    (folder / "curr4_input").write_text("1200\n")
    driver = root / "sys/bus/i2c/drivers/ina3221"
    driver.mkdir(parents=True, exist_ok=True)
    (driver / address).symlink_to(folder.parents[1])
    return folder


def make_iio(root: Path, address: str, labels: tuple[str, ...], folder: str, milliwatts: int = 2000) -> Path:
    """A power monitor with NVIDIA's older driver."""
    device = root / "sys/bus/i2c/drivers/ina3221x" / address / folder
    device.mkdir(parents=True)
    for channel, label in enumerate(labels):
        (device / f"rail_name_{channel}").write_text(f"{label}\n")
        (device / f"in_power{channel}_input").write_text(f"{milliwatts}\n")
    return device


def make_load(root: Path, path: str, value: str = "437\n") -> Path:
    file = root / path
    file.parent.mkdir(parents=True)
    file.write_text(value)
    return file


def rails(points: list[TelemetryPoint]) -> dict[str, dict[str, Any]]:
    return {point.tags["rail"]: dict(point.fields) for point in points if point.measurement == "power"}


def additive_rails(points: list[TelemetryPoint]) -> set[str]:
    return {rail for rail in rails(points) if is_additive(rail)}


def test_power_is_voltage_times_current_and_energy_its_integral(tmp_path: Path) -> None:
    folder = make_hwmon(make_board(tmp_path), "1-0040", ORIN_NANO)
    sensor = JetsonSensor(tmp_path)
    assert rails(sensor.sample(1, 10.0))["VDD_IN"] == {"power_w": 2.0, "energy_j": None}
    (folder / "curr1_input").write_text("1200\n")
    assert rails(sensor.sample(2, 10.5))["VDD_IN"] == {"power_w": 6.0, "energy_j": 2.0}


def test_input_rail_is_the_total_and_others_are_its_parts(tmp_path: Path) -> None:
    make_hwmon(make_board(tmp_path), "1-0040", ORIN_NANO)
    points = JetsonSensor(tmp_path).sample(1, 0.0)
    assert set(rails(points)) == {"VDD_IN", "VDD_IN/VDD_CPU_GPU_CV", "VDD_IN/VDD_SOC"}
    assert additive_rails(points) == {"VDD_IN"}
    assert set(missing_reasons(points)) == {"jetson.gpu"}


def test_all_rails_are_additive_without_an_input_rail(tmp_path: Path) -> None:
    make_hwmon(make_board(tmp_path), "1-0040", ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"))
    make_hwmon(tmp_path, "1-0041", ("NC", "VDDQ_VDD2_1V8AO", ""))
    points = JetsonSensor(tmp_path).sample(1, 0.0)
    assert (
        additive_rails(points) == {"VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO"} == set(rails(points))
    )


@pytest.mark.parametrize("folder", ["iio_device", "iio:device0"])
def test_older_driver_has_power_directly(tmp_path: Path, folder: str) -> None:
    make_iio(
        make_board(tmp_path, "NVIDIA Jetson Nano Developer Kit"),
        "6-0040",
        ("POM_5V_IN", "POM_5V_GPU", "POM_5V_CPU"),
        folder,
    )
    points = JetsonSensor(tmp_path).sample(1, 0.0)
    assert rails(points)["POM_5V_IN"] == {"power_w": 2.0, "energy_j": None}
    assert additive_rails(points) == {"POM_5V_IN"}
    assert len(rails(points)) == 3


def test_monitor_reachable_by_two_folders_counts_once(tmp_path: Path) -> None:
    device = make_iio(make_board(tmp_path), "6-0040", ("VDD_IN",), "iio:device0")
    (device.parent / "iio_device").symlink_to(device)
    assert len(JetsonSensor(tmp_path).sample(1, 0.0)) == 1 + 1  # the rail, and that the GPU's load is missing


def test_rails_of_carrier_board_are_not_additive(tmp_path: Path) -> None:
    make_iio(make_board(tmp_path), "0-0041", ("VDD_IN", "VDD_SYS_CPU", "VDD_SYS_DDR"), "iio_device")
    make_iio(tmp_path, "0-0042", ("VDD_MUX", "VDD_5V0_IO_SYS", "VDD_3V3_SYS"), "iio_device")
    points = JetsonSensor(tmp_path).sample(1, 0.0)
    assert "carrier/VDD_MUX" in rails(points)
    assert additive_rails(points) == {"VDD_IN"}


def test_unreadable_rail_is_reported_once_and_returns_without_energy(tmp_path: Path) -> None:
    current = make_hwmon(make_board(tmp_path), "1-0040", ORIN_NANO) / "curr1_input"
    sensor = JetsonSensor(tmp_path)
    sensor.sample(1, 0.0)
    current.unlink()
    second, third = sensor.sample(2, 0.5), sensor.sample(3, 1.0)
    assert missing_reasons(second) == {"jetson.VDD_IN": "No such file or directory"}
    assert missing_reasons(third) == {}
    assert [set(rails(points)) for points in (second, third)] == [{"VDD_IN/VDD_CPU_GPU_CV", "VDD_IN/VDD_SOC"}] * 2
    current.write_text("400\n")
    assert rails(sensor.sample(4, 1.5))["VDD_IN"] == {"power_w": 2.0, "energy_j": None}
    assert rails(sensor.sample(5, 2.0))["VDD_IN"] == {"power_w": 2.0, "energy_j": 1.0}


@pytest.mark.parametrize(
    "path",
    [
        "sys/devices/gpu.0/load",
        "sys/devices/platform/gpu.0/load",
        "sys/devices/platform/17000000.gpu/load",
        "sys/devices/platform/bus@0/17000000.gpu/load",
        "sys/devices/57000000.gpu/load",
        "sys/devices/17000000.gp10b/load",
        "sys/devices/17000000.gv11b/load",
        "sys/devices/17000000.ga10b/load",
        "sys/class/devfreq/17000000.ga10b/device/load",
    ],
)
def test_gpu_load_is_found_in_each_release(tmp_path: Path, path: str) -> None:
    make_load(make_board(tmp_path), path)
    (gpu,) = [point for point in JetsonSensor(tmp_path).sample(1, 0.0) if point.measurement == "gpu"]
    assert gpu.tags == {"gpu": "jetson", "model": "NVIDIA Jetson Orin Nano Developer Kit"}
    assert gpu.fields["use"] == 0.437
    assert {name for name, value in gpu.fields.items() if value is not None} == {"use"}


def test_unreadable_load_is_reported_once_and_has_no_point(tmp_path: Path) -> None:
    make_hwmon(make_board(tmp_path), "1-0040", ORIN_NANO)
    load_file = make_load(tmp_path, "sys/devices/gpu.0/load")
    sensor = JetsonSensor(tmp_path)
    sensor.sample(1, 0.0)
    load_file.unlink()
    samples = [sensor.sample(2, 0.5), sensor.sample(3, 1.0)]
    assert [missing_reasons(points) for points in samples] == [{"jetson.gpu": "No such file or directory"}, {}]
    assert {point.measurement for points in samples for point in points} == {"power", "missing"}


def test_jetson_without_monitors_reports_it_once(tmp_path: Path) -> None:
    sensor = JetsonSensor(make_board(tmp_path, "NVIDIA Jetson Nano 2GB Developer Kit"))
    assert set(missing_reasons(sensor.sample(1, 0.0))) == {"jetson", "jetson.gpu"}
    assert sensor.sample(2, 0.5) == []


def test_other_machine_has_no_points_and_no_reports(tmp_path: Path) -> None:
    make_hwmon(tmp_path, "1-0040", ORIN_NANO)
    assert JetsonSensor(tmp_path).sample(1, 0.0) == []
