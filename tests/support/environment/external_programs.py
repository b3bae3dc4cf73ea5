"""Programs and files that tests need and `pip install` does not install: their paths, or how to install them.

A missing one skips the test on the machine of a developer, and fails it where the environment has CI=true: the tests
of a build server without Mosquitto must not pass.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest

from brokers.server.local_broker import BrokerKind

# Debian installs servers in folders that are on the PATH of root only.
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])

# How to install each: Debian packages for programs and files, a distribution for modules.
PROGRAMS = {
    "chromium": "apt-get install chromium",
    "mosquitto": "apt-get install mosquitto",
    "mosquitto_passwd": "apt-get install mosquitto",
    "mosquitto_pub": "apt-get install mosquitto-clients",
    "mosquitto_sub": "apt-get install mosquitto-clients",
    "mosquitto_rr": "apt-get install mosquitto-clients",
    "darknet": "apt-get install darknet",
    "ffmpeg": "apt-get install ffmpeg",
    "influxd": "apt-get install influxdb",
    "victoria-metrics": "apt-get install victoria-metrics",
    "nginx": "apt-get install nginx-light",
    "curl": "apt-get install curl",
    "socat": "apt-get install socat",
    "kubectl": "see kubernetes.io, Install Tools",
}
FILES = {"darknet-files": (Path("/usr/share/darknet"), "apt-get install darknet")}
MODULES = {"iotcore": "no wheel for this platform", "cv2": "make test"}


def find_dependency(name: str) -> Path | None:
    """The program, folder or module file of this name; None if this machine has none."""
    if name in PROGRAMS:
        program = shutil.which(name, path=SEARCH_PATH)
        return Path(program) if program else None
    if name in FILES:
        return FILES[name][0] if FILES[name][0].exists() else None
    if name not in MODULES:
        raise KeyError(f"{name} is not listed in tests/support/environment/external_programs.py")
    spec = importlib.util.find_spec(name)
    return Path(spec.origin) if spec and spec.origin else None


def require_dependency(name: str) -> Path:
    """The path of a program, folder or module; skips or fails the test if it is missing."""
    path = find_dependency(name)
    if path is not None:
        return path
    hint = PROGRAMS.get(name) or MODULES.get(name) or FILES[name][1]
    return skip_or_fail(f"{name} is missing: {hint}")


def require_broker(kind: BrokerKind) -> None:
    """Skip or fail the test if a broker of this kind cannot be started."""
    require_dependency("iotcore" if kind == "embedded" else kind)


def skip_or_fail(reason: str) -> NoReturn:
    """Skip the test for this reason; fail it on a build server."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)
