"""A container engine, used through its command line."""

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
    "no container engine can be reached (`docker info` fails); not tested: the image, docker-compose.yml, the swarm "
    "stack and the image of the broker"
)


def require_container_engine() -> None:
    """Skip the test if there is no engine; fail it on a build server."""
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
    """`docker compose`, or the older docker-compose."""
    for command in (("docker", "compose"), ("docker-compose",)):
        if shutil.which(command[0]):
            done = subprocess.run([*command, "version"], capture_output=True, timeout=30, check=False)
            if done.returncode == 0:
                return command
    return skip_or_fail("neither `docker compose` nor docker-compose is installed: apt-get install docker-compose")


def docker(*arguments: str, timeout_s: float = 120) -> str:
    """Run a docker command and return its standard output; fails with its output if it fails."""
    return _run(["docker", *arguments], {}, timeout_s)


def docker_with_env(environment: Mapping[str, str], *arguments: str) -> str:
    """Run a docker command with additional environment variables."""
    return _run(["docker", *arguments], environment, 120)


def docker_inspect(name: str) -> dict[str, Any]:
    """`docker inspect` of a container or an image."""
    objects: list[dict[str, Any]] = json.loads(docker("inspect", name))
    return objects[0]


@dataclass
class ComposeProject:
    """docker-compose.yml as a project with its own name and ports, so that it may run next to others."""

    project: str
    broker_port: int = field(default_factory=free_port)
    monitor_port: int = field(default_factory=free_port)

    def __call__(self, *arguments: str, timeout_s: float = 240) -> str:
        environment = {
            "COMPOSE_PROJECT_NAME": self.project,
            "SPARSE_PORT": str(self.broker_port),
            "SPARSE_MONITOR_PORT": str(self.monitor_port),
        }
        return _run([*compose_command(), *arguments], environment, timeout_s)

    def container_ids(self, service: str) -> list[str]:
        """The ids of a service's containers."""
        return self("ps", "--quiet", service).split()

    def up(self, *services: str, scale: Mapping[str, int] | None = None) -> None:
        """Start services, and wait until each of their containers is healthy."""
        scaled = [word for name, count in (scale or {}).items() for word in ("--scale", f"{name}={count}")]
        self("up", "--detach", "--no-build", *scaled, *services)
        ids = [each for service in services for each in self.container_ids(service)]
        wait_until_healthy(ids)


def wait_until_healthy(container_ids: list[str], timeout_s: float = 180) -> None:
    """Wait until these containers are healthy; fails with the log of one that is not."""
    end_s = time.monotonic() + timeout_s
    for each in container_ids:
        while (state := docker_inspect(each)["State"]).get("Health", {}).get("Status") != "healthy":
            if time.monotonic() > end_s or state["Status"] != "running":
                raise AssertionError(f"{each} is not healthy: {state}\n{docker('logs', '--tail', '9', each)}")
            time.sleep(0.5)


def _run(command: list[str], environment: Mapping[str, str], timeout_s: float) -> str:
    result = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    output = f"{result.stdout}\n{result.stderr}"
    assert result.returncode == 0, f"{' '.join(command)} exited with status {result.returncode}:\n{output}"
    return result.stdout
