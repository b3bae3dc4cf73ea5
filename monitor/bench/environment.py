"""What a benchmark ran on and with: the machine, and the versions of what matters. What cannot be read is None."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from brokers.server import mosquitto_conf as mosquitto

_PATIENCE_S = 10.0
_HERE = Path(__file__).resolve()


def hardware() -> dict[str, Any]:
    """The machine: its processor, memory, GPUs and kernel."""
    gpus, why = _gpus()
    return {
        "node": platform.node() or None,
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus,
        "gpus_missing": why,
        "kernel": f"{platform.system()} {platform.release()}",
    }


def versions() -> dict[str, str | None]:
    """Sparse, Python, what computes, and what carries messages."""
    return {
        "sparse": _version("sparse-mqtt"),
        "python": platform.python_version(),
        "torch": _version("torch"),
        "numpy": _version("numpy"),
        "paho-mqtt": _version("paho-mqtt"),
        "mosquitto": _mosquitto(),
        "iotcore": _version("iotcore"),
    }


def git_revision(file: Path = _HERE) -> dict[str, Any] | None:
    """The git revision of the checkout that `file`, or Sparse itself, is part of, and whether it has other changes.

    None where it was installed, or where there is no git.
    """
    folder = file.parent
    if _said("git", "-C", str(folder), "ls-files", "--error-unmatch", file.name) is None:
        return None
    commit = _said("git", "-C", str(folder), "rev-parse", "HEAD")
    changes = _said("git", "-C", str(folder), "status", "--porcelain")
    return {"commit": commit, "dirty": bool(changes)} if commit else None


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _mosquitto() -> str | None:
    program = mosquitto.find_mosquitto()
    found = re.search(r"version (\S+)", _said(program, "-h", any_status=True) or "") if program else None
    return found.group(1) if found else None


def _cpu() -> str | None:
    """What the kernel calls the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return names[0] if names else platform.processor() or platform.machine() or None


def _gpus() -> tuple[list[str] | None, str | None]:
    """The names of NVIDIA's GPUs; None, and why, where the driver cannot be asked."""
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


def _said(*command: str, any_status: bool = False) -> str | None:
    """What a program writes to standard output; None where it is not there, or fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_PATIENCE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if any_status or done.returncode == 0 else None
