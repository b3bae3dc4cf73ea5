"""The environment of a benchmark: the machine and the versions of the software. A value that cannot be read is None."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from brokers.server.mosquitto_conf import find_mosquitto

_TIMEOUT_S = 10.0
_THIS_FILE = Path(__file__).resolve()


def hardware() -> dict[str, Any]:
    """Processor, memory, GPUs and kernel of this machine."""
    gpus, gpu_error = _gpu_names()
    return {
        "node": platform.node() or None,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus,
        "gpus_missing": gpu_error,
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


def _gpu_names() -> tuple[list[str] | None, str | None]:
    """The names of the NVIDIA GPUs; None, and the reason, where the driver does not answer."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return None, str(error)
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return [str(pynvml.nvmlDeviceGetName(handle)) for handle in handles], None
    except pynvml.NVMLError as error:
        return None, str(error)
    finally:
        pynvml.nvmlShutdown()


def _output(*command: str, any_status: bool = False) -> str | None:
    """The standard output of a program; None where it is not installed or fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if any_status or done.returncode == 0 else None
