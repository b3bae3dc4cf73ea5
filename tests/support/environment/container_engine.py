"""A container engine: whether one can be reached, and what a test asks of it, by the commands that a user types."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.support.brokers.ports import free_port
from tests.support.environment.checkout import ROOT
from tests.support.environment.external_programs import skip_or_fail

NO_ENGINE_REASON = (
    "no container engine can be reached (`docker info` fails): left out are the image, docker-compose.yml, the swarm "
    "stack, and the broker's image"
)


def require_container_engine() -> None:
    """End the test where there is no engine: skipped here, failed on a build server."""
    if not _reachable():
        skip_or_fail(NO_ENGINE_REASON)


@functools.cache
def _reachable() -> bool:
    if shutil.which("docker") is None:
        return False
    command = ["docker", "info", "--format", "{{.ServerVersion}}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return done.returncode == 0


@functools.cache
def compose_command() -> tuple[str, ...]:
    """`docker compose`, or the older program of its own."""
    for command in (("docker", "compose"), ("docker-compose",)):
        if shutil.which(command[0]):
            done = subprocess.run([*command, "version"], capture_output=True, timeout=30, check=False)
            if done.returncode == 0:
                return command
    return skip_or_fail("neither `docker compose` nor docker-compose is there: apt-get install docker-compose")


def docker(*arguments: str, timeout_s: float = 120) -> str:
    """What a docker command prints; fails with what it said when it fails."""
    return _run(["docker", *arguments], {}, timeout_s)


def docker_with_env(environment: Mapping[str, str], *arguments: str) -> str:
    """The same, with some variables more in its environment."""
    return _run(["docker", *arguments], environment, 120)


def docker_inspect(name: str) -> dict[str, Any]:
    """What the engine knows of a container or an image."""
    found: list[dict[str, Any]] = json.loads(docker("inspect", name))
    return found[0]


@dataclass
class ComposeProject:
    """The compose file at the top, as a project with ports of its own beside whatever else runs here."""

    project: str
    broker_port: int = field(default_factory=free_port)
    monitor_port: int = field(default_factory=free_port)

    def __call__(self, *arguments: str, timeout_s: float = 240) -> str:
        given = {
            "COMPOSE_PROJECT_NAME": self.project,
            "SPARSE_PORT": str(self.broker_port),
            "SPARSE_MONITOR_PORT": str(self.monitor_port),
        }
        return _run([*compose_command(), *arguments], given, timeout_s)

    def container_ids(self, service: str) -> list[str]:
        """The ids of a service's containers."""
        return self("ps", "--quiet", service).split()

    def up(self, *services: str, scale: Mapping[str, int] | None = None) -> None:
        """Bring services up, and wait until each of their containers is well."""
        scaled = [word for name, count in (scale or {}).items() for word in ("--scale", f"{name}={count}")]
        self("up", "--detach", "--no-build", *scaled, *services)
        ids = [each for service in services for each in self.container_ids(service)]
        wait_until_healthy(ids)


def wait_until_healthy(container_ids: list[str], timeout_s: float = 180) -> None:
    """Wait until these containers are healthy by their own check; fail with the log of one that is not."""
    end_s = time.monotonic() + timeout_s
    for each in container_ids:
        while (state := docker_inspect(each)["State"]).get("Health", {}).get("Status") != "healthy":
            if time.monotonic() > end_s or state["Status"] != "running":
                raise AssertionError(f"{each} is not healthy: {state}\n{docker('logs', '--tail', '9', each)}")
            time.sleep(0.5)


def _run(command: list[str], environment: Mapping[str, str], timeout_s: float) -> str:
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout
