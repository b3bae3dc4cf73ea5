"""Parts of a test's world that do not come with `pip install`: where they are, or what to say when they are not.

On a developer's machine a missing part skips the test; where the environment has CI=true it fails it, so that a build
server without Mosquitto cannot be green.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest

from brokers.server.local_broker import BrokerKind

# Debian puts servers where only root looks.
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])

# What to install for each: Debian packages for programs and files, a distribution for modules.
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
    """The program, folder or module file of that name, or None where this machine has none."""
    if name in PROGRAMS:
        program = shutil.which(name, path=SEARCH_PATH)
        return Path(program) if program else None
    if name in FILES:
        return FILES[name][0] if FILES[name][0].exists() else None
    if name not in MODULES:
        raise KeyError(f"{name} is no part that tests/support/environment/external_programs.py knows")
    spec = importlib.util.find_spec(name)
    return Path(spec.origin) if spec and spec.origin else None


def require_dependency(name: str) -> Path:
    """Where the part is; ends the test when it is missing: skipped here, failed on a build server."""
    found = find_dependency(name)
    if found is not None:
        return found
    hint = PROGRAMS.get(name) or MODULES.get(name) or FILES[name][1]
    return skip_or_fail(f"{name} is missing: {hint}")


def require_broker(kind: BrokerKind) -> None:
    """End the test where a broker of this kind cannot be started."""
    require_dependency("iotcore" if kind == "embedded" else kind)


def skip_or_fail(reason: str) -> NoReturn:
    """End the test, because a part of its world is not there."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)
