"""GPUs by NVML, as a recording has it: two of them, with what real ones do not say, lose and forget."""

from __future__ import annotations

import inspect
import sys
from itertools import pairwise
from typing import Any

import pytest

from monitor.points.points import TelemetryPoint
from monitor.sensors.nvml import GpuSensor, load_nvml
from tests.support.monitor.points import missing_reasons, single_point_fields
from tests.support.monitor.recorded_nvml import RecordedNvml

DRIVER_NOT_LOADED = 9
GPU_IS_LOST = 15
STEP_S = 0.5


def play(nvml: RecordedNvml, samples: int = 5) -> list[list[TelemetryPoint]]:
    """What a sensor makes of so many samples."""
    gpus = GpuSensor(lambda: nvml)
    found = []
    for nvml.sample_index in range(samples):
        found.append(gpus.sample(1000 + nvml.sample_index, nvml.sample_index * STEP_S))
    return found


def of(points: list[TelemetryPoint], gpu: str) -> dict[str, Any]:
    return single_point_fields([point for point in points if point.tags.get("gpu") == gpu], "gpu")


def test_a_gpu_says_what_it_does() -> None:
    second = play(RecordedNvml())[1]
    assert of(second, "0") == {
        "use": 0.87,
        "memory_used_bytes": 2147483648,
        "memory_total_bytes": 6442450944,
        "temperature_c": 55.0,
        "power_w": 60.0,
        "energy_j": 18.5,
    }
    assert {(point.tags["gpu"], point.tags["model"]) for point in second if point.measurement == "gpu"} == {
        ("0", "NVIDIA RTX A2000"),
        ("1", "NVIDIA GeForce GT 1030"),
    }


def test_energy_is_the_gpus_own_count_since_the_last_sample_and_none_in_the_first() -> None:
    energies = [of(points, "0")["energy_j"] for points in play(RecordedNvml(), 3)]
    assert energies == [None, 18.5, 31.1]


def test_where_the_count_goes_back_energy_is_power_over_time_and_then_the_count_again() -> None:
    energies = [of(points, "0")["energy_j"] for points in play(RecordedNvml())]
    assert energies[3:] == [(64 + 66) / 2 * STEP_S, 21.5]


def test_a_gpu_that_does_not_count_energy_has_that_of_its_power_and_nothing_is_missing() -> None:
    nvml = RecordedNvml()
    for sample in nvml.gpus[0]["samples"]:
        sample["nvmlDeviceGetTotalEnergyConsumption"] = {"error": 3}
    found = play(nvml)
    energies = [of(points, "0")["energy_j"] for points in found]
    assert energies == [None, 17.5, 31.0, 32.5, 21.5]
    assert not any("gpu.0" in sensor for points in found for sensor in missing_reasons(points))


def test_what_a_gpu_does_not_say_is_none_never_0_and_told_once_with_nvmls_reason() -> None:
    found = play(RecordedNvml(), 2)
    for points in found:
        assert of(points, "1")["power_w"] is None
        assert of(points, "1")["energy_j"] is None
        assert of(points, "1")["use"] > 0
    assert missing_reasons(found[0]) == {"gpu.1.power_w": "Not Supported", "gpu.1.energy_j": "Not Supported"}
    assert of(found[1], "1")["temperature_c"] is None
    assert missing_reasons(found[1]) == {"gpu.1.temperature_c": "Unknown Error"}


def test_what_is_not_supported_is_not_asked_again() -> None:
    nvml = RecordedNvml()
    for gpu in nvml.gpus:
        gpu["samples"] = gpu["samples"][:1] * 5
    play(nvml)
    assert nvml.calls["nvmlDeviceGetTemperature"] == 2 * 5
    assert nvml.calls["nvmlDeviceGetPowerUsage"] == 5 + 1


def test_a_gpu_that_falls_off_the_bus_is_told_once_and_left_alone_while_the_other_goes_on() -> None:
    nvml = RecordedNvml()
    found = play(nvml)
    assert missing_reasons(found[2]) == {"gpu.1": "GPU is lost"}
    for points in found[2:]:
        assert [point.tags["gpu"] for point in points if point.measurement == "gpu"] == ["0"]
    assert [missing_reasons(points) for points in found[3:]] == [{}, {}]
    assert nvml.calls["nvmlDeviceGetUtilizationRates"] == 5 + 3


def test_a_gpu_that_is_lost_from_the_start_does_not_hide_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = RecordedNvml()

    def handle_of(index: int) -> int:
        if index == 1:
            raise nvml.NVMLError(GPU_IS_LOST)
        return index

    monkeypatch.setattr(nvml, "nvmlDeviceGetHandleByIndex", handle_of)
    found = play(nvml, 2)
    assert missing_reasons(found[0]) == {"gpu.1": "GPU is lost"}
    assert of(found[1], "0")["use"] == 0.87


def test_a_gpu_that_says_nothing_at_all_has_no_points() -> None:
    nvml = RecordedNvml()
    for sample in nvml.gpus[1]["samples"]:
        sample |= {name: {"error": 3} for name in sample}
    found = play(nvml, 2)
    assert [[point.tags["gpu"] for point in points if point.measurement == "gpu"] for points in found] == [["0"], ["0"]]
    assert len(missing_reasons(found[0])) == 5


@pytest.mark.parametrize(
    ("nvml", "reason"),
    [
        (RecordedNvml(init_error=DRIVER_NOT_LOADED), "Driver Not Loaded"),
        (RecordedNvml(init_error=12), "NVML Shared Library Not Found"),
    ],
)
def test_without_a_driver_one_thing_is_missing_and_nothing_is_tried_again(nvml: RecordedNvml, reason: str) -> None:
    found = play(nvml)
    assert [missing_reasons(points) for points in found] == [{"gpu": reason}, {}, {}, {}, {}]
    assert nvml.calls == {"nvmlInit": 1}


def test_without_the_library_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    gpus = GpuSensor()
    assert "pynvml" in missing_reasons(gpus.sample(1, 0.0))["gpu"]
    assert gpus.sample(2, 0.5) == []


def test_a_driver_without_a_gpu_is_missing_its_gpu() -> None:
    nvml = RecordedNvml()
    nvml.gpus = []
    assert missing_reasons(GpuSensor(lambda: nvml).sample(1, 0.0)) == {"gpu": "NVML knows of no GPU"}


def test_nvml_is_begun_at_the_first_sample_and_let_go_of_once() -> None:
    nvml = RecordedNvml()
    gpus = GpuSensor(lambda: nvml)
    assert nvml.init_count == 0
    gpus.sample(1, 0.0)
    assert nvml.init_count == 1
    gpus.close()
    gpus.close()
    assert nvml.init_count == 0
    assert gpus.sample(2, 0.5) == []


def test_the_recording_says_only_what_the_real_module_could() -> None:
    nvml, pynvml = RecordedNvml(), load_nvml()
    names = [*nvml._lasting(), *nvml.recorded_functions]
    assert [name for name in names if not inspect.isfunction(getattr(pynvml, name, None))] == []
    for gpu in nvml.gpus:
        assert all(before.keys() == after.keys() for before, after in pairwise(gpu["samples"]))
    memory = {name for name, _ in pynvml.c_nvmlMemory_t._fields_}
    assert nvml.gpus[0]["samples"][0]["nvmlDeviceGetMemoryInfo"].keys() == memory
    use = {name for name, _ in pynvml.c_nvmlUtilization_t._fields_}
    assert nvml.gpus[0]["samples"][0]["nvmlDeviceGetUtilizationRates"].keys() == use
