"""GPUs through a recorded NVML: two of them, with unsupported values, a counter that resets, and a lost GPU."""

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

NOT_SUPPORTED = 3
DRIVER_NOT_LOADED = 9
LIBRARY_NOT_FOUND = 12
GPU_IS_LOST = 15
STEP_S = 0.5


def sample_all(nvml: RecordedNvml, count: int = 5) -> list[list[TelemetryPoint]]:
    sensor = GpuSensor(lambda: nvml)
    samples = []
    for nvml.sample_index in range(count):
        samples.append(sensor.sample(1000 + nvml.sample_index, nvml.sample_index * STEP_S))
    return samples


def gpu_fields(points: list[TelemetryPoint], gpu: str) -> dict[str, Any]:
    return single_point_fields([point for point in points if point.tags.get("gpu") == gpu], "gpu")


def gpus(points: list[TelemetryPoint]) -> list[str]:
    return [point.tags["gpu"] for point in points if point.measurement == "gpu"]


def test_point_has_all_values_of_a_gpu() -> None:
    second = sample_all(RecordedNvml())[1]
    assert gpu_fields(second, "0") == {
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


def test_energy_is_counted_and_integrated_where_the_counter_resets() -> None:
    energies = [gpu_fields(points, "0")["energy_j"] for points in sample_all(RecordedNvml())]
    assert energies == [None, 18.5, 31.1, (64 + 66) / 2 * STEP_S, 21.5]


def test_energy_without_a_counter_is_integrated_and_not_missing() -> None:
    nvml = RecordedNvml()
    for sample in nvml.gpus[0]["samples"]:
        sample["nvmlDeviceGetTotalEnergyConsumption"] = {"error": NOT_SUPPORTED}
    samples = sample_all(nvml)
    assert [gpu_fields(points, "0")["energy_j"] for points in samples] == [None, 17.5, 31.0, 32.5, 21.5]
    assert not any("gpu.0" in sensor for points in samples for sensor in missing_reasons(points))


def test_unsupported_value_is_missing_and_reported_once() -> None:
    samples = sample_all(RecordedNvml(), 2)
    for points in samples:
        assert gpu_fields(points, "1")["power_w"] is None
        assert gpu_fields(points, "1")["energy_j"] is None
        assert gpu_fields(points, "1")["use"] > 0
    assert missing_reasons(samples[0]) == {"gpu.1.power_w": "Not Supported", "gpu.1.energy_j": "Not Supported"}
    assert gpu_fields(samples[1], "1")["temperature_c"] is None
    assert missing_reasons(samples[1]) == {"gpu.1.temperature_c": "Unknown Error"}


def test_unsupported_query_is_not_repeated() -> None:
    nvml = RecordedNvml()
    for gpu in nvml.gpus:
        gpu["samples"] = gpu["samples"][:1] * 5
    sample_all(nvml)
    assert nvml.calls["nvmlDeviceGetTemperature"] == 2 * 5
    assert nvml.calls["nvmlDeviceGetPowerUsage"] == 5 + 1


def test_lost_gpu_is_reported_once_and_skipped() -> None:
    nvml = RecordedNvml()
    samples = sample_all(nvml)
    assert [missing_reasons(points) for points in samples[2:]] == [{"gpu.1": "GPU is lost"}, {}, {}]
    assert [gpus(points) for points in samples[2:]] == [["0"]] * 3
    assert nvml.calls["nvmlDeviceGetUtilizationRates"] == 5 + 3


def test_gpu_lost_at_start_does_not_hide_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = RecordedNvml()

    def handle_by_index(index: int) -> int:
        if index == 1:
            raise nvml.NVMLError(GPU_IS_LOST)
        return index

    monkeypatch.setattr(nvml, "nvmlDeviceGetHandleByIndex", handle_by_index)
    samples = sample_all(nvml, 2)
    assert missing_reasons(samples[0]) == {"gpu.1": "GPU is lost"}
    assert gpu_fields(samples[1], "0")["use"] == 0.87


def test_gpu_without_any_value_has_no_points() -> None:
    nvml = RecordedNvml()
    for sample in nvml.gpus[1]["samples"]:
        sample |= {name: {"error": NOT_SUPPORTED} for name in sample}
    samples = sample_all(nvml, 2)
    assert [gpus(points) for points in samples] == [["0"], ["0"]]
    assert len(missing_reasons(samples[0])) == 5


@pytest.mark.parametrize(
    ("error", "reason"),
    [(DRIVER_NOT_LOADED, "Driver Not Loaded"), (LIBRARY_NOT_FOUND, "NVML Shared Library Not Found")],
)
def test_missing_driver_is_reported_once_and_not_retried(error: int, reason: str) -> None:
    nvml = RecordedNvml(init_error=error)
    assert [missing_reasons(points) for points in sample_all(nvml)] == [{"gpu": reason}, {}, {}, {}, {}]
    assert nvml.calls == {"nvmlInit": 1}


def test_missing_python_module_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    sensor = GpuSensor()
    assert "pynvml" in missing_reasons(sensor.sample(1, 0.0))["gpu"]
    assert sensor.sample(2, 0.5) == []


def test_driver_without_a_gpu_is_reported() -> None:
    nvml = RecordedNvml()
    nvml.gpus = []
    assert missing_reasons(GpuSensor(lambda: nvml).sample(1, 0.0)) == {"gpu": "NVML finds no GPU"}


def test_nvml_is_initialised_on_first_sample_and_shut_down_once() -> None:
    nvml = RecordedNvml()
    sensor = GpuSensor(lambda: nvml)
    assert nvml.init_count == 0
    sensor.sample(1, 0.0)
    assert nvml.init_count == 1
    sensor.close()
    sensor.close()
    assert nvml.init_count == 0
    assert sensor.sample(2, 0.5) == []


def test_recording_has_only_functions_and_fields_of_the_real_module() -> None:
    nvml, pynvml = RecordedNvml(), load_nvml()
    names = [*nvml._constant_functions(), *nvml.recorded_functions]
    assert [name for name in names if not inspect.isfunction(getattr(pynvml, name, None))] == []
    for gpu in nvml.gpus:
        assert all(before.keys() == after.keys() for before, after in pairwise(gpu["samples"]))
    sample = nvml.gpus[0]["samples"][0]
    memory_fields = {name for name, _ in pynvml.c_nvmlMemory_t._fields_}
    assert sample["nvmlDeviceGetMemoryInfo"].keys() == memory_fields
    use_fields = {name for name, _ in pynvml.c_nvmlUtilization_t._fields_}
    assert sample["nvmlDeviceGetUtilizationRates"].keys() == use_fields
