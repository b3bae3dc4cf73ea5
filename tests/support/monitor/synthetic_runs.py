"""Generated runs: the points of a monitor, and its files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from monitor.points.points import FieldValue, TelemetryPoint
from monitor.stores.sqlite import TELEMETRY_FILE, SqliteStore

START_NS = 1_800_000_000_000_000_000
_NS = 1_000_000_000
_SAMPLED_S = 0.5
STAGES = ("head", "body", "tail")


def time_ns_at(second: float) -> int:
    """The time `second` s after `START_NS`."""
    return START_NS + round(second * _NS)


@dataclass(frozen=True)
class SyntheticRun:
    """The properties of a generated run."""

    name: str
    pipeline: str = "street"
    request_count: int = 200
    rate_per_s: float = 20.0
    compute_ms: tuple[float, ...] = (12.0, 30.0, 18.0)
    network_ms: float = 20.0
    bytes_per_request: int = 60_000
    has_gpu: bool = False
    has_link: bool = True
    seed: int = 1

    @property
    def duration_s(self) -> float:
        return self.request_count / self.rate_per_s

    def points(self) -> list[TelemetryPoint]:
        """The points of an inference run."""
        return [*self._requests(), *self._node(), *(self._link() if self.has_link else ())]

    def training_points(self, steps: int = 60, rows: int = 64) -> list[TelemetryPoint]:
        """The points of a training run with a decreasing loss."""
        return [*self._steps(steps, rows), *self._node(), *(self._link() if self.has_link else ())]

    def _point(self, name: str, second: float, tags: dict[str, str], fields: dict[str, FieldValue]) -> TelemetryPoint:
        return TelemetryPoint(
            name, time_ns_at(second), {"node": "pi", "run": self.name, "pipeline": self.pipeline, **tags}, fields
        )

    def _requests(self) -> Iterator[TelemetryPoint]:
        random = Random(self.seed)
        for number in range(self.request_count):
            second, request = (number + 1) / self.rate_per_s, f"{number:032x}"
            parts = [
                {"queue_ms": random.expovariate(1 / 9), "decode_ms": 0.8, "compute_ms": random.gauss(each, each / 10),
                 "encode_ms": 0.6}
                for each in self.compute_ms
            ]  # fmt: skip
            network_ms = self.network_ms * random.lognormvariate(0, 0.3)
            for place, (stage, own) in enumerate(zip(STAGES, parts, strict=False)):
                fields: dict[str, FieldValue] = {**own, "request": request, "place": place}
                yield self._point("hop", second, {"stage": stage, "worker": f"{stage}-1"}, fields)
            latency_ms = network_ms + sum(sum(own.values()) for own in parts)
            fields = {
                "latency_ms": latency_ms,
                "network_ms": network_ms,
                "attempts": 1,
                "request": request,
                "error": "",
            }
            yield self._point("request", second, {"source": "camera"}, fields)

    def _steps(self, steps: int, rows: int) -> Iterator[TelemetryPoint]:
        random = Random(self.seed)
        step_ms = self.duration_s * 1000 / steps
        for number in range(1, steps + 1):
            second = number * step_ms / 1000
            for stage, busy_ms in zip(STAGES, self.compute_ms, strict=False):
                for phase, share in (("forward", 0.35), ("backward", 0.55), ("update", 0.1)):
                    own = {"stage": stage, "worker": f"{stage}-1", "phase": phase}
                    yield self._point("batch", second, own, {"tasks": 1, "rows": rows, "busy_ms": busy_ms * share})
            loss = 2.3 * math.exp(-number / 25) + random.gauss(0.06, 0.02)
            fields: dict[str, FieldValue] = {"step": number, "epoch": 0, "rows": rows, "step_ms": step_ms, "loss": loss,
                                        "accuracy": min(1.0, 1 - loss / 2.6)}  # fmt: skip
            yield self._point("step", second, {"source": "digits"}, fields)

    def _node(self) -> Iterator[TelemetryPoint]:
        random = Random(self.seed)
        for number in range(-2, round(self.duration_s / _SAMPLED_S) + 3):
            second = number * _SAMPLED_S
            sent = round(self.bytes_per_request * self.rate_per_s * _SAMPLED_S * random.uniform(0.8, 1.2))
            yield self._point(
                "interface", second, {"interface": "eth0"}, {"received_bytes": sent // 50, "sent_bytes": sent}
            )
            for place, name in enumerate(("source", "broker", *STAGES)):
                cores = (0.2, 0.1, 0.5, 0.9, 0.6)[place] * (1 + 0.1 * math.sin(second + place))
                role, called = ("stage", f"{name}-1") if name in STAGES else (name, "camera" if not place else "local")
                fields: dict[str, FieldValue] = {
                    "cpu": cores,
                    "cpu_s": 10 + (0.2, 0.1, 0.5, 0.9, 0.6)[place] * (second + 2),
                    "pid": 100 + place,
                }
                yield self._point("process", second, {"role": role, "name": called}, fields)
            if self.has_gpu:
                use = 0.55 + 0.2 * math.sin(second) + random.uniform(-0.05, 0.05)
                fields = {"use": use, "power_w": 40 + 90 * use, "energy_j": (40 + 90 * use) * _SAMPLED_S}
                yield self._point("gpu", second, {"gpu": "0", "model": "made up"}, fields)
        if not self.has_gpu:
            for sensor, reason in (("gpu", "NVML Shared Library Not Found"), ("rapl", "there is no intel-rapl:*")):
                yield self._point("missing", 0, {"sensor": sensor}, {"reason": reason})

    def _link(self) -> Iterator[TelemetryPoint]:
        for number in range(round(self.duration_s) + 2):
            done = self.rate_per_s * min(number, self.duration_s)
            fields: dict[str, FieldValue] = {
                "bytes_out": round(done * self.bytes_per_request), "bytes_in": round(done * 900)
            }  # fmt: skip
            yield self._point("link", number + 0.01, {"from": "device", "to": "cloud"}, fields)


def write_run_folder(points: Sequence[TelemetryPoint], folder: Path) -> Path:
    """Write points as the folder of a run."""
    store = SqliteStore(folder / TELEMETRY_FILE)
    store.write(points)
    store.close()
    return folder


def make_manifest(suites: Mapping[str, Sequence[str]], warm_up: int = 0, **sweep_settings: Any) -> dict[str, Any]:
    """The manifest of a benchmark: the runs of each suite by name, and its point of a sweep."""
    return {
        "command": ["sparse", "bench", *suites], "mode": "run", "started_at": "2026-01-02T03:04:05+00:00",
        "ended_at": "2026-01-02T03:14:05+00:00", "warm_up": warm_up, "requests": 200, "repeats": 3,
        "versions": {"python": "3.11.2", "torch": "2.7.0"}, "revision": {"commit": "0123abc", "dirty": False},
        "hardware": {"cpu": "made up", "cores": 4, "memory_bytes": 8_000_000_000, "gpus": []},
        "suites": [
            {
                "name": name, "path": "swept.toml" if sweep_settings else f"{name}.toml",
                "pipeline_text": f'[pipeline]\nname = "{name}"\n', "overrides": {},
                "sweep_point": sweep_settings.get(name, {}), "kind": "inference", "seed": 0, "runs": list(runs),
                "links": [{"site": "device", "to": "cloud", "delay_ms": 8.0, "rate_mbit": 50.0, "emulated": True}],
            }
            for name, runs in suites.items()
        ],
    }  # fmt: skip
