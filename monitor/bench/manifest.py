"""The manifest of a benchmark: all that is needed to run it again, as manifest.json beside the results.

It has the suites and their overrides, the machine, and the versions of the software. A value of the environment that
cannot be read is None.
"""

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

import psutil
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from brokers.errors import UsageError
from brokers.server.mosquitto_conf import find_mosquitto
from monitor.bench.suite import BenchCase
from monitor.sensors.nvml import GpuSensor

MANIFEST_FILE = "manifest.json"
# The password of a broker's address anywhere in a file, comments included.
_PASSWORD = re.compile(r"(://[^/@\s:]*):[^@\s]*@")
_PROGRAM_TIMEOUT_S = 10.0
_THIS_FILE = Path(__file__).resolve()


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class LinkRecord(_Record):
    """A link between two sites; `emulated`: a link emulator imposed its delay and rate."""

    site: str
    to: str
    delay_ms: float
    rate_mbit: float | None
    emulated: bool


class SuiteRecord(_Record):
    """A suite, or a point of a sweep: its pipeline file, its overrides and its runs."""

    name: str
    path: str
    pipeline_text: str = Field(description="the pipeline file, without passwords of brokers")
    overrides: dict[str, Any]
    sweep_point: dict[str, Any] = {}
    kind: Literal["inference", "training"]
    seed: int
    links: tuple[LinkRecord, ...]
    runs: tuple[str, ...] = Field(description="names of folders beside the manifest")


class Manifest(_Record):
    """A whole benchmark."""

    format: Literal[1] = 1
    command: tuple[str, ...]
    mode: Literal["run", "source"] = Field(
        description="run: whole pipelines on one machine; source: only their sources"
    )
    started_at: str = Field(description="ISO 8601 with a time zone")
    ended_at: str | None = Field(default=None, description="None while the benchmark runs")
    warm_up: Annotated[int, Field(ge=0)]
    requests: int | None
    repeats: int
    versions: dict[str, str | None]
    revision: dict[str, Any] | None
    hardware: dict[str, Any]
    suites: tuple[SuiteRecord, ...]

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"


def suite_record(case: BenchCase, emulated: bool, runs: Sequence[str]) -> SuiteRecord:
    """The record of a case; `emulated`: its runs emulate links that have a delay or a rate."""
    pipeline = case.pipeline
    links = [
        LinkRecord(
            site=site.name,
            emulated=emulated and link.is_emulated,
            **link.model_dump(include={"to", "delay_ms", "rate_mbit"}),
        )
        for site in pipeline.site
        for link in site.links
        if {site.name, link.to} <= set(case.sites)
    ]
    return SuiteRecord(
        name=case.name,
        path=str(case.path),
        pipeline_text=redact_passwords(case.path.read_text()),
        overrides=dict(case.overrides),
        sweep_point=dict(case.sweep_point),
        kind=pipeline.pipeline.kind,
        seed=pipeline.pipeline.seed,
        links=tuple(links),
        runs=tuple(runs),
    )


def redact_passwords(text: str) -> str:
    """A pipeline file without the passwords in its brokers' addresses."""
    return _PASSWORD.sub(r"\1@", text)


def load_manifest(folder: Path) -> Manifest | None:
    """The manifest in a folder; None if it is missing. Raises `UsageError` ("BadManifest") for an invalid one."""
    path = folder / MANIFEST_FILE
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        problem = error.strerror or str(error)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(level) for level in first["loc"])
        problem = f"{key}: {first['msg']}" if key else first["msg"]
    raise UsageError(
        "BadManifest", f"{path}: not the manifest of a benchmark: {problem}", path=str(path), problem=problem
    )


def hardware() -> dict[str, Any]:
    """Processor, memory, GPUs and kernel of this machine."""
    sensor = GpuSensor()
    readings = list(sensor.measure(0.0))
    sensor.close()
    gpus = [tags["model"] for measurement, tags, _ in readings if measurement == "gpu"]
    reasons = [str(fields["reason"]) for measurement, _, fields in readings if measurement == "missing"]
    return {
        "node": platform.node() or None,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus or None,
        "gpus_missing": None if gpus else "; ".join(reasons),
        "kernel": f"{platform.system()} {platform.release()}",
    }


def versions() -> dict[str, str | None]:
    """The versions of Sparse, Python, and the packages and broker that compute and carry messages."""
    packages = {"sparse": "sparse-mqtt", **{name: name for name in ("torch", "numpy", "paho-mqtt", "iotcore")}}
    found: dict[str, str | None] = {"python": platform.python_version(), "mosquitto": _mosquitto_version()}
    for name, distribution in packages.items():
        try:
            found[name] = version(distribution)
        except PackageNotFoundError:
            found[name] = None
    return found


def git_revision(file: Path = _THIS_FILE) -> dict[str, Any] | None:
    """The commit of the checkout that tracks `file`, and whether it has uncommitted changes; None without one."""
    git = ("git", "-C", str(file.parent))
    if _output(*git, "ls-files", "--error-unmatch", file.name) is None:
        return None
    commit = _output(*git, "rev-parse", "HEAD")
    return {"commit": commit, "dirty": bool(_output(*git, "status", "--porcelain"))} if commit else None


def _mosquitto_version() -> str | None:
    program = find_mosquitto()
    usage = _output(program, "-h", any_status=True) if program else None
    match = re.search(r"version (\S+)", usage or "")
    return match.group(1) if match else None


def _cpu_name() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return names[0] if names else platform.processor() or platform.machine() or None


def _output(*command: str, any_status: bool = False) -> str | None:
    """The standard output of a program; None where it is not installed or fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_PROGRAM_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if any_status or done.returncode == 0 else None
