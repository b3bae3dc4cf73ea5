"""NVIDIA GPUs through NVML (the module `pynvml` of nvidia-ml-py)."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

from monitor.points.points import FieldValue
from monitor.sensors.base import Reading, Sensor
from monitor.sensors.counters import EnergyIntegrator, MonotonicCounter

_CHIP_TEMPERATURE = 0  # NVML_TEMPERATURE_GPU
_GPU_IS_LOST = 15  # NVML_ERROR_GPU_IS_LOST
# NVML_ERROR_NOT_SUPPORTED, NVML_ERROR_NO_PERMISSION, NVML_ERROR_FUNCTION_NOT_FOUND: these do not go away.
_PERMANENT = frozenset({3, 4, 13})


def load_nvml() -> Any:
    """The module `pynvml`, which has no types; imported on first use, since that takes a while."""
    return importlib.import_module("pynvml")


def _memory(nvml: Any, handle: Any) -> dict[str, FieldValue]:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    return {"memory_used_bytes": memory.used, "memory_total_bytes": memory.total}


# The fields of each query, by its name in reports of missing values; `energy_mj` becomes the field `energy_j`.
_QUERIES: dict[str, Callable[[Any, Any], dict[str, Any]]] = {
    "use": lambda nvml, handle: {"use": nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100},
    "memory": _memory,
    "temperature_c": lambda nvml, handle: {
        "temperature_c": float(nvml.nvmlDeviceGetTemperature(handle, _CHIP_TEMPERATURE))
    },
    "power_w": lambda nvml, handle: {"power_w": nvml.nvmlDeviceGetPowerUsage(handle) / 1000},
    "energy_j": lambda nvml, handle: {"energy_mj": int(nvml.nvmlDeviceGetTotalEnergyConsumption(handle))},
}


class _Gpu:
    """One GPU; `reasons` says for each query that failed in the last sample why."""

    def __init__(self, nvml: Any, index: int) -> None:
        self.index = index
        self.reasons: dict[str, str] = {}
        self._nvml = nvml
        self._handle = nvml.nvmlDeviceGetHandleByIndex(index)
        self.tags = {"gpu": str(index), "model": str(nvml.nvmlDeviceGetName(self._handle))}
        self._unsupported: dict[str, str] = {}  # reasons of the queries that are not made again
        self._counter = MonotonicCounter()
        self._integrator = EnergyIntegrator()

    def fields(self, now_s: float) -> dict[str, FieldValue]:
        """All values that can be read; raises `NVMLError` if the GPU has fallen off its bus."""
        fields: dict[str, Any] = {}
        self.reasons = dict(self._unsupported)
        for name, query in _QUERIES.items():
            if name in self._unsupported:
                continue
            try:
                fields |= query(self._nvml, self._handle)
            except self._nvml.NVMLError as error:
                if error.value == _GPU_IS_LOST:
                    raise
                self.reasons[name] = str(error)
                if error.value in _PERMANENT:
                    self._unsupported[name] = str(error)
        # The GPU's own energy counter; where that is unknown, power integrated over time.
        power_w = fields.get("power_w")
        counted_mj = self._counter.increase(fields.pop("energy_mj", None))
        energy_j = self._integrator.increase_j(power_w, now_s)
        if counted_mj is not None:
            energy_j = counted_mj / 1000
        if energy_j is not None:
            fields["energy_j"] = energy_j
        if power_w is not None:
            self.reasons.pop("energy_j", None)
        return fields


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

    def measure(self, now_s: float) -> Iterator[Reading]:
        """A reading of each GPU with a readable value, and reports of values that cannot be read."""
        if self._gpus is None:
            self._gpus = []
            yield from self._find_gpus(self._gpus)
        for gpu in list(self._gpus):
            try:
                fields = gpu.fields(now_s)
            except self._nvml.NVMLError as error:
                self._gpus.remove(gpu)
                yield from self.report_missing(str(gpu.index), str(error))
                continue
            if fields:
                yield "gpu", gpu.tags, fields
            for name, reason in gpu.reasons.items():
                yield from self.report_missing(f"{gpu.index}.{name}", reason)

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

    def _find_gpus(self, gpus: list[_Gpu]) -> Iterator[Reading]:
        try:
            nvml = self._load()
        except ImportError as error:
            yield from self.report_missing("", str(error))
            return
        try:
            nvml.nvmlInit()
            self._nvml = nvml
            count = nvml.nvmlDeviceGetCount()
        except nvml.NVMLError as error:
            yield from self.report_missing("", str(error))
            return
        if not count:
            yield from self.report_missing("", "NVML finds no GPU")
        for index in range(count):
            try:
                gpus.append(_Gpu(nvml, index))
            except nvml.NVMLError as error:
                yield from self.report_missing(str(index), str(error))
