"""NVIDIA GPUs through NVML (the module `pynvml` of nvidia-ml-py)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

from monitor.points.points import FieldValue, TelemetryPoint
from monitor.sensors.base import Sensor
from monitor.sensors.counters import EnergyIntegrator, MonotonicCounter

_CHIP_TEMPERATURE = 0  # NVML_TEMPERATURE_GPU
_GPU_IS_LOST = 15  # NVML_ERROR_GPU_IS_LOST
# NVML_ERROR_NOT_SUPPORTED, NVML_ERROR_NO_PERMISSION, NVML_ERROR_FUNCTION_NOT_FOUND: these do not go away.
_PERMANENT = frozenset({3, 4, 13})

T = TypeVar("T")


def load_nvml() -> Any:
    """The module `pynvml`, which has no types; imported on first use, since that takes a while."""
    return importlib.import_module("pynvml")


def _memory(nvml: Any, handle: Any) -> dict[str, FieldValue]:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    return {"memory_used_bytes": memory.used, "memory_total_bytes": memory.total}


# The fields of each query, by its name in reports of missing values.
_QUERIES: dict[str, Callable[[Any, Any], dict[str, FieldValue]]] = {
    "use": lambda nvml, handle: {"use": nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100},
    "memory": _memory,
    "temperature_c": lambda nvml, handle: {
        "temperature_c": float(nvml.nvmlDeviceGetTemperature(handle, _CHIP_TEMPERATURE))
    },
    "power_w": lambda nvml, handle: {"power_w": nvml.nvmlDeviceGetPowerUsage(handle) / 1000},
}


class _GpuLostError(Exception):
    """The GPU has fallen off its bus."""


class _Gpu:
    """One GPU; `reasons` says for each query that failed in the last sample why."""

    def __init__(self, nvml: Any, index: int) -> None:
        self.index = index
        self.reasons: dict[str, str] = {}
        self._nvml = nvml
        self._handle = nvml.nvmlDeviceGetHandleByIndex(index)
        self._tags = {"gpu": str(index), "model": str(nvml.nvmlDeviceGetName(self._handle))}
        self._unsupported: dict[str, str] = {}  # reasons of the queries that are not made again
        self._counter = MonotonicCounter()
        self._integrator = EnergyIntegrator()

    def sample(self, time_ns: int, now_s: float) -> list[TelemetryPoint]:
        """Its point, if any value can be read; raises `_GpuLostError`."""
        self.reasons = {}
        fields: dict[str, FieldValue] = {}
        for name, query in _QUERIES.items():
            fields |= self._query(name, query) or {}
        power_w = fields.get("power_w")
        energy_j = self._energy_j(None if power_w is None else float(power_w), now_s)
        if energy_j is not None:
            fields["energy_j"] = energy_j
        return [TelemetryPoint("gpu", time_ns, self._tags, fields)] if fields else []

    def _energy_j(self, power_w: float | None, now_s: float) -> float | None:
        """The GPU's own energy counter; where that is unknown, power integrated over time."""
        energy_mj = self._query("energy_j", lambda nvml, handle: int(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)))
        counted_mj = self._counter.increase(energy_mj)
        integrated_j = self._integrator.increase_j(power_w, now_s)
        if power_w is not None:
            self.reasons.pop("energy_j", None)
        return integrated_j if counted_mj is None else counted_mj / 1000

    def _query(self, name: str, query: Callable[[Any, Any], T]) -> T | None:
        if name in self._unsupported:
            self.reasons[name] = self._unsupported[name]
            return None
        try:
            return query(self._nvml, self._handle)
        except self._nvml.NVMLError as error:
            if error.value == _GPU_IS_LOST:
                raise _GpuLostError(str(error)) from None
            self.reasons[name] = str(error)
            if error.value in _PERMANENT:
                self._unsupported[name] = str(error)
            return None


class GpuSensor(Sensor):
    """The measurement `gpu`; the tag `gpu` is NVML's index.

    Permanent failures are not retried: a node without a driver costs one attempt, and a GPU that is lost is skipped
    until the monitor restarts.
    """

    name = "gpu"

    def __init__(self, load: Callable[[], Any] = load_nvml) -> None:
        super().__init__()
        self._load = load
        self._nvml: Any = None
        self._gpus: list[_Gpu] | None = None  # None: not yet searched

    def sample(self, time_ns: int, now_s: float) -> list[TelemetryPoint]:
        """A point for each GPU with a readable value, and reports of values that cannot be read."""
        points: list[TelemetryPoint] = []
        if self._gpus is None:
            self._gpus = []
            points += self._find_gpus(self._gpus, time_ns)
        for gpu in list(self._gpus):
            try:
                points += gpu.sample(time_ns, now_s)
            except _GpuLostError as error:
                self._gpus.remove(gpu)
                points += self.report_missing(time_ns, str(gpu.index), str(error))
                continue
            for name, reason in gpu.reasons.items():
                points += self.report_missing(time_ns, f"{gpu.index}.{name}", reason)
        return points

    def close(self) -> None:
        """Shut NVML down."""
        nvml = self._nvml
        self._nvml = None
        self._gpus = []
        if nvml is not None:
            try:
                nvml.nvmlShutdown()
            except nvml.NVMLError:
                return  # the driver has been unloaded

    def _find_gpus(self, gpus: list[_Gpu], time_ns: int) -> list[TelemetryPoint]:
        try:
            nvml = self._load()
        except ImportError as error:
            return self.report_missing(time_ns, "", str(error))
        try:
            nvml.nvmlInit()
            self._nvml = nvml
            count = nvml.nvmlDeviceGetCount()
        except nvml.NVMLError as error:
            return self.report_missing(time_ns, "", str(error))
        if not count:
            return self.report_missing(time_ns, "", "NVML finds no GPU")
        missing: list[TelemetryPoint] = []
        for index in range(count):
            try:
                gpus.append(_Gpu(nvml, index))
            except nvml.NVMLError as error:
                missing += self.report_missing(time_ns, str(index), str(error))
        return missing
