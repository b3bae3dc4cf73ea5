"""A stand-in for the module `pynvml`, which returns the values of a recording.

The recording, nvml_two_gpus.json, was written by hand from NVML's documentation.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from monitor.sensors.nvml import load_nvml

TWO_GPUS_RECORDING = Path(__file__).with_name("nvml_two_gpus.json")


class RecordedNvml:
    """Returns the values of sample `sample_index`. It raises the errors of the real module."""

    NVMLError = load_nvml().NVMLError

    def __init__(self, recording: Path = TWO_GPUS_RECORDING, *, init_error: int = 0) -> None:
        self.gpus = json.loads(recording.read_text())["gpus"]
        self.recorded_functions = frozenset(self.gpus[0]["samples"][0])
        self.sample_index = 0
        self.init_count = 0  # calls of nvmlInit, less those of nvmlShutdown
        self.calls: Counter[str] = Counter()
        self._init_error = init_error

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in {*self._constant_functions(), *self.recorded_functions}:
            raise AttributeError(name)
        return lambda *arguments: self._call(name, *arguments)

    def _constant_functions(self) -> dict[str, Callable[..., Any]]:
        return {
            "nvmlInit": self._init,
            "nvmlShutdown": self._shutdown,
            "nvmlDeviceGetCount": lambda: len(self.gpus),
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetName": lambda handle: self.gpus[handle]["name"],
        }

    def _call(self, name: str, *arguments: Any) -> Any:
        self.calls[name] += 1
        if name in (functions := self._constant_functions()):
            return functions[name](*arguments)
        value = self.gpus[arguments[0]]["samples"][self.sample_index][name]
        if not isinstance(value, dict):
            return value
        if "error" in value:
            raise self.NVMLError(value["error"])
        return SimpleNamespace(**value)

    def _init(self) -> None:
        if self._init_error:
            raise self.NVMLError(self._init_error)
        self.init_count += 1

    def _shutdown(self) -> None:
        self.init_count -= 1
