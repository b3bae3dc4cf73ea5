"""A recorded NVML: stands in for the module `pynvml`, and says at each moment what a recording has for it.

The recording beside it (nvml_two_gpus.json) is made by hand from NVML's documentation, and says so.
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
    """Begins at the first sample; `moment` is set to go on. Its errors, with their texts, are the real ones."""

    NVMLError = load_nvml().NVMLError

    def __init__(self, recording: Path = TWO_GPUS_RECORDING, *, init_error: int = 0) -> None:
        self.gpus = json.loads(recording.read_text())["gpus"]
        self.recorded_functions = frozenset(self.gpus[0]["samples"][0])
        self.sample_index = 0
        self.init_count = 0  # how often it was begun, less how often it was let go of
        self.calls: Counter[str] = Counter()
        self._refuses_to_begin = init_error

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in {*self._lasting(), *self.recorded_functions}:
            raise AttributeError(name)
        return lambda *arguments: self._call(name, *arguments)

    def _lasting(self) -> dict[str, Callable[..., Any]]:
        return {
            "nvmlInit": self._begin,
            "nvmlShutdown": self._end,
            "nvmlDeviceGetCount": lambda: len(self.gpus),
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetName": lambda handle: self.gpus[handle]["name"],
        }

    def _call(self, name: str, *arguments: Any) -> Any:
        self.calls[name] += 1
        if name in (lasting := self._lasting()):
            return lasting[name](*arguments)
        answer = self.gpus[arguments[0]]["samples"][self.sample_index][name]
        if not isinstance(answer, dict):
            return answer
        if "error" in answer:
            raise self.NVMLError(answer["error"])
        return SimpleNamespace(**answer)

    def _begin(self) -> None:
        if self._refuses_to_begin:
            raise self.NVMLError(self._refuses_to_begin)
        self.init_count += 1

    def _end(self) -> None:
        self.init_count -= 1
