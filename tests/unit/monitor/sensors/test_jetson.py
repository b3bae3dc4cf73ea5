"""A Jetson's rails and GPU, from folders like those that L4T's releases have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from monitor.points.points import TelemetryPoint
from monitor.sensors.counters import is_additive
from monitor.sensors.jetson import JetsonSensor
from tests.support.monitor.points import missing_reasons

ORIN_NANO = ("VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC")


def board(root: Path, model: str = "NVIDIA Jetson Orin Nano Developer Kit") -> Path:
    tree = root / "proc/device-tree"
    tree.mkdir(parents=True)
    (tree / "compatible").write_text("nvidia,p3768-0000+p3767-0005\0nvidia,tegra234\0")
    (tree / "model").write_text(f"{model}\0")
    return root


def hwmon(root: Path, address: str, labels: tuple[str, ...], millivolts: int = 5000, milliamperes: int = 400) -> Path:
    """A monitor as the kernel's own driver shows it: a link to the device; a fourth channel is the sum of currents."""
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


def iio(root: Path, address: str, labels: tuple[str, ...], folder: str, milliwatts: int = 2000) -> Path:
    """A monitor as NVIDIA's older driver shows it."""
    device = root / "sys/bus/i2c/drivers/ina3221x" / address / folder
    device.mkdir(parents=True)
    for channel, label in enumerate(labels):
        (device / f"rail_name_{channel}").write_text(f"{label}\n")
        (device / f"in_power{channel}_input").write_text(f"{milliwatts}\n")
    return device


def load(root: Path, place: str, value: str = "437\n") -> Path:
    path = root / place
    path.parent.mkdir(parents=True)
    path.write_text(value)
    return path


def rails(points: list[TelemetryPoint]) -> dict[str, dict[str, Any]]:
    return {point.tags["rail"]: dict(point.fields) for point in points if point.measurement == "power"}


def total(points: list[TelemetryPoint]) -> set[str]:
    return {rail for rail in rails(points) if is_additive(rail)}


def test_power_is_voltage_times_current_and_energy_is_power_over_time(tmp_path: Path) -> None:
    folder = hwmon(board(tmp_path), "1-0040", ORIN_NANO)
    jetson = JetsonSensor(tmp_path)
    assert rails(jetson.sample(1, 10.0))["VDD_IN"] == {"power_w": 2.0, "energy_j": None}
    (folder / "curr1_input").write_text("1200\n")
    assert rails(jetson.sample(2, 10.5))["VDD_IN"] == {"power_w": 6.0, "energy_j": 2.0}


def test_what_the_whole_module_draws_is_the_total_and_its_parts_are_not_added_to_it(tmp_path: Path) -> None:
    hwmon(board(tmp_path), "1-0040", ORIN_NANO)
    found = JetsonSensor(tmp_path).sample(1, 0.0)
    assert set(rails(found)) == {"VDD_IN", "VDD_IN/VDD_CPU_GPU_CV", "VDD_IN/VDD_SOC"}
    assert total(found) == {"VDD_IN"}
    assert set(missing_reasons(found)) == {"jetson.gpu"}


def test_a_board_without_such_a_rail_has_the_sum_of_its_rails(tmp_path: Path) -> None:
    hwmon(board(tmp_path), "1-0040", ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"))
    hwmon(tmp_path, "1-0041", ("NC", "VDDQ_VDD2_1V8AO", ""))
    found = JetsonSensor(tmp_path).sample(1, 0.0)
    assert total(found) == {"VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO"} == set(rails(found))


@pytest.mark.parametrize("folder", ["iio_device", "iio:device0"])
def test_older_releases_say_the_power_itself(tmp_path: Path, folder: str) -> None:
    iio(
        board(tmp_path, "NVIDIA Jetson Nano Developer Kit"), "6-0040", ("POM_5V_IN", "POM_5V_GPU", "POM_5V_CPU"), folder
    )
    found = JetsonSensor(tmp_path).sample(1, 0.0)
    assert rails(found)["POM_5V_IN"] == {"power_w": 2.0, "energy_j": None}
    assert total(found) == {"POM_5V_IN"}
    assert len(rails(found)) == 3


def test_a_monitor_that_two_folders_lead_to_counts_once(tmp_path: Path) -> None:
    device = iio(board(tmp_path), "6-0040", ("VDD_IN",), "iio:device0")
    (device.parent / "iio_device").symlink_to(device)
    assert len(JetsonSensor(tmp_path).sample(1, 0.0)) == 1 + 1  # the rail, and that the GPU's load is missing


def test_the_carrier_boards_rails_are_not_the_modules(tmp_path: Path) -> None:
    iio(board(tmp_path), "0-0041", ("VDD_IN", "VDD_SYS_CPU", "VDD_SYS_DDR"), "iio_device")
    iio(tmp_path, "0-0042", ("VDD_MUX", "VDD_5V0_IO_SYS", "VDD_3V3_SYS"), "iio_device")
    found = JetsonSensor(tmp_path).sample(1, 0.0)
    assert "carrier/VDD_MUX" in rails(found)
    assert total(found) == {"VDD_IN"}


def test_a_rail_that_cannot_be_read_is_told_once_and_makes_up_no_energy_when_it_is_back(tmp_path: Path) -> None:
    current = hwmon(board(tmp_path), "1-0040", ORIN_NANO) / "curr1_input"
    jetson = JetsonSensor(tmp_path)
    jetson.sample(1, 0.0)
    current.unlink()
    second, third = jetson.sample(2, 0.5), jetson.sample(3, 1.0)
    assert missing_reasons(second) == {"jetson.VDD_IN": "No such file or directory"}
    assert missing_reasons(third) == {}
    assert [set(rails(points)) for points in (second, third)] == [{"VDD_IN/VDD_CPU_GPU_CV", "VDD_IN/VDD_SOC"}] * 2
    current.write_text("400\n")
    assert rails(jetson.sample(4, 1.5))["VDD_IN"] == {"power_w": 2.0, "energy_j": None}
    assert rails(jetson.sample(5, 2.0))["VDD_IN"] == {"power_w": 2.0, "energy_j": 1.0}


@pytest.mark.parametrize(
    "place",
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
def test_the_gpus_load_is_found_where_each_release_has_it(tmp_path: Path, place: str) -> None:
    load(board(tmp_path), place)
    (gpu,) = [point for point in JetsonSensor(tmp_path).sample(1, 0.0) if point.measurement == "gpu"]
    assert gpu.tags == {"gpu": "jetson", "model": "NVIDIA Jetson Orin Nano Developer Kit"}
    assert gpu.fields["use"] == 0.437
    assert {name for name, value in gpu.fields.items() if value is not None} == {"use"}


def test_a_load_that_cannot_be_read_is_told_once_and_is_no_idle_gpu(tmp_path: Path) -> None:
    hwmon(board(tmp_path), "1-0040", ORIN_NANO)
    place = load(tmp_path, "sys/devices/gpu.0/load")
    jetson = JetsonSensor(tmp_path)
    jetson.sample(1, 0.0)
    place.unlink()
    found = [jetson.sample(2, 0.5), jetson.sample(3, 1.0)]
    assert [missing_reasons(points) for points in found] == [{"jetson.gpu": "No such file or directory"}, {}]
    assert {point.measurement for points in found for point in points} == {"power", "missing"}


def test_a_jetson_without_monitors_is_missing_them_once(tmp_path: Path) -> None:
    jetson = JetsonSensor(board(tmp_path, "NVIDIA Jetson Nano 2GB Developer Kit"))
    assert set(missing_reasons(jetson.sample(1, 0.0))) == {"jetson", "jetson.gpu"}
    assert jetson.sample(2, 0.5) == []


def test_what_is_no_jetson_says_nothing_whatever_monitors_it_has(tmp_path: Path) -> None:
    hwmon(tmp_path, "1-0040", ORIN_NANO)
    assert JetsonSensor(tmp_path).sample(1, 0.0) == []
