"""NVIDIA's GPUs, by NVML (the module `pynvml` of nvidia-ml-py)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

from monitor.points.points import FieldValue, TelemetryPoint
from monitor.sensors.base import UnavailableSensors
from monitor.sensors.counters import EnergyIntegrator, MonotonicCounter

_SENSOR_OF_THE_CHIP = 0  # NVML_TEMPERATURE_GPU
_IS_LOST = 15  # NVML_ERROR_GPU_IS_LOST
# NVML_ERROR_NOT_SUPPORTED, NVML_ERROR_NO_PERMISSION, NVML_ERROR_FUNCTION_NOT_FOUND: asking again is of no use.
_FOR_GOOD = frozenset({3, 4, 13})
T = TypeVar("T")
_FIELDS = ("use", "memory_used_bytes", "memory_total_bytes", "temperature_c", "power_w", "energy_j")


def load_nvml() -> Any:
    """The module `pynvml`, imported when it is needed: it takes a while. It has no types."""
    return importlib.import_module("pynvml")


def _use(nvml: Any, handle: Any) -> dict[str, FieldValue]:
    return {"use": nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100}


def _memory(nvml: Any, handle: Any) -> dict[str, FieldValue]:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    return {"memory_used_bytes": memory.used, "memory_total_bytes": memory.total}


def _temperature(nvml: Any, handle: Any) -> dict[str, FieldValue]:
    return {"temperature_c": float(nvml.nvmlDeviceGetTemperature(handle, _SENSOR_OF_THE_CHIP))}


def _power(nvml: Any, handle: Any) -> dict[str, FieldValue]:
    return {"power_w": nvml.nvmlDeviceGetPowerUsage(handle) / 1000}


def _energy_mj(nvml: Any, handle: Any) -> int:
    return int(nvml.nvmlDeviceGetTotalEnergyConsumption(handle))


_QUESTIONS = {"use": _use, "memory": _memory, "temperature_c": _temperature, "power_w": _power}


class _LostError(Exception):
    """A GPU has fallen off its bus; the text is NVML's."""


class _Gpu:
    """One of them. `reasons` is why the last look at it did not give what it does not give."""

    def __init__(self, nvml: Any, index: int) -> None:
        self._nvml = nvml
        self.name = f"gpu.{index}"
        self._handle = nvml.nvmlDeviceGetHandleByIndex(index)
        self._tags = {"gpu": str(index), "model": str(nvml.nvmlDeviceGetName(self._handle))}
        self.reasons: dict[str, str] = {}
        self._refused: dict[str, str] = {}  # what is not asked any more, and why
        self._counter, self._integral = MonotonicCounter(), EnergyIntegrator()

    def look(self, time_ns: int, now_s: float) -> list[TelemetryPoint]:
        """Its point, if anything can be read; raises `_LostError`."""
        self.reasons = {}
        fields: dict[str, FieldValue] = dict.fromkeys(_FIELDS)
        for name, question in _QUESTIONS.items():
            fields |= self._ask(name, question) or {}
        power_w = fields["power_w"]
        fields["energy_j"] = self._energy_j(float(power_w) if power_w is not None else None, now_s)
        if all(value is None for value in fields.values()):
            return []
        return [TelemetryPoint("gpu", time_ns, self._tags, fields)]

    def _energy_j(self, power_w: float | None, now_s: float) -> float | None:
        counted_mj = self._counter.delta(self._ask("energy_j", _energy_mj))
        estimated_j = self._integral.delta_j(power_w, now_s)
        if power_w is not None:
            self.reasons.pop("energy_j", None)  # then it comes of the power
        return counted_mj / 1000 if counted_mj is not None else estimated_j

    def _ask(self, name: str, question: Callable[[Any, Any], T]) -> T | None:
        if name in self._refused:
            self.reasons[name] = self._refused[name]
            return None
        try:
            return question(self._nvml, self._handle)
        except self._nvml.NVMLError as error:
            if error.value == _IS_LOST:
                raise _LostError(str(error)) from None
            self.reasons[name] = str(error)
            if error.value in _FOR_GOOD:
                self._refused[name] = str(error)
            return None


class GpuSensor:
    """The measurement `gpu`; its tag is the index that NVML gives, its energy the GPU's own count.

    Where that cannot be had, or went back, the energy is that of the power over time. What fails once and for all is
    not tried again: without a driver this costs nothing more, and a GPU that is lost is left alone until the monitor is
    started anew.
    """

    def __init__(self, load: Callable[[], Any] = load_nvml) -> None:
        self._load = load
        self._nvml: Any = None
        self._gpus: list[_Gpu] | None = None  # None: not looked for yet
        self._missing = UnavailableSensors()

    def sample(self, time_ns: int, now_s: float) -> list[TelemetryPoint]:
        """One point for each GPU of which anything can be read, and what cannot."""
        points: list[TelemetryPoint] = []
        if self._gpus is None:
            self._gpus = []
            points += self._begin(self._gpus, time_ns)
        for gpu in list(self._gpus):
            try:
                points += gpu.look(time_ns, now_s)
            except _LostError as error:
                self._gpus.remove(gpu)
                points += self._missing.report_once(time_ns, gpu.name, str(error))
                continue
            for name, reason in gpu.reasons.items():
                points += self._missing.report_once(time_ns, f"{gpu.name}.{name}", reason)
        return points

    def close(self) -> None:
        """Let go of NVML."""
        nvml, self._nvml, self._gpus = self._nvml, None, []
        if nvml is not None:
            try:
                nvml.nvmlShutdown()
            except nvml.NVMLError:
                return  # the driver has gone before us

    def _begin(self, gpus: list[_Gpu], time_ns: int) -> list[TelemetryPoint]:
        try:
            nvml = self._load()
        except ImportError as error:
            return self._missing.report_once(time_ns, "gpu", str(error))
        try:
            nvml.nvmlInit()
            self._nvml = nvml
            count = nvml.nvmlDeviceGetCount()
        except nvml.NVMLError as error:
            return self._missing.report_once(time_ns, "gpu", str(error))
        if not count:
            return self._missing.report_once(time_ns, "gpu", "NVML knows of no GPU")
        missing: list[TelemetryPoint] = []
        for index in range(count):
            try:
                gpus.append(_Gpu(nvml, index))
            except nvml.NVMLError as error:
                missing += self._missing.report_once(time_ns, f"gpu.{index}", str(error))
        return missing
