"""A swarm of this machine alone, with the stack of deploy/swarm."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from brokers.config.pipeline_file import load_pipeline
from tests.support.brokers.locked_broker import create_pipeline_certs
from tests.support.brokers.ports import free_port
from tests.support.environment.checkout import ROOT
from tests.support.environment.container_engine import docker, docker_with_env
from tests.support.environment.external_programs import skip_or_fail

STACK_NAME = "sparse-test"
STACK_SERVICES = ("broker", "gateway", "head", "body", "tail", "monitor")
IDENTITIES = ("broker.local", "street.source", "street.head", "street.body", "street.tail", "monitor")


@contextmanager
def start_swarm() -> Iterator[None]:
    """Make this machine a swarm, with the label of site `cloudlet`.

    When it leaves a swarm, Docker 20.10 forgets the names of all containers on other networks: no other may run.
    """
    if docker("info", "--format", "{{.Swarm.LocalNodeState}}").strip() != "inactive":
        skip_or_fail("this machine is part of a swarm, which tests do not change; not tested: the swarm stack")
    docker("swarm", "init", "--advertise-addr", "127.0.0.1", "--listen-addr", "127.0.0.1")
    try:
        docker("node", "update", "--label-add", "site=cloudlet", docker("node", "ls", "--quiet").strip())
        yield
    finally:
        docker("swarm", "leave", "--force")


@contextmanager
def deploy_stack(certs: Path) -> Iterator[int]:
    """Deploy the stack and wait until it is healthy; yields the port of its broker.

    Its certificates are created in this folder; its secrets are removed with the swarm.
    """
    create_pipeline_certs(certs, load_pipeline(ROOT / "deploy/locked/street.toml"))
    for identity in IDENTITIES:
        for name in ("ca.crt", "tls.crt", "tls.key"):
            docker("secret", "create", f"{identity}.{name}", str(certs / identity / name))
    port = free_port()
    environment = {"SPARSE_PORT": str(port)}
    # The image is on this machine only, in no registry.
    deploy = ("stack", "deploy", "--resolve-image", "never", "--compose-file", "deploy/swarm/stack.yml", STACK_NAME)
    docker_with_env(environment, *deploy)
    try:
        for service in STACK_SERVICES:
            wait_for_replicas(service, 1)
        yield port
    finally:
        docker("stack", "rm", STACK_NAME)
        wait_for_stack_removal()


def running_tasks(service: str) -> list[str]:
    """The ids of the running tasks of a service; an unhealthy one is not running."""
    options = ("--filter", "desired-state=running", "--format", "{{.ID}} {{.CurrentState}}")
    lines = docker("service", "ps", *options, f"{STACK_NAME}_{service}").splitlines()
    return [line.split()[0] for line in lines if line.split()[1] == "Running"]


def wait_for_replicas(service: str, count: int, timeout_s: float = 180) -> None:
    """Wait until `count` tasks of a service run; fails with the list of its tasks."""
    end_s = time.monotonic() + timeout_s
    while len(running_tasks(service)) != count:
        assert time.monotonic() < end_s, docker("service", "ps", "--no-trunc", f"{STACK_NAME}_{service}")
        time.sleep(0.5)


def wait_for_stack_removal(timeout_s: float = 120) -> None:
    """Wait until no container of the stack is left, and remove its volumes."""
    end_s = time.monotonic() + timeout_s
    while docker("ps", "--all", "--quiet", "--filter", f"label=com.docker.stack.namespace={STACK_NAME}").strip():
        assert time.monotonic() < end_s, "containers of the stack are left"
        time.sleep(0.5)
    docker("volume", "rm", "--force", f"{STACK_NAME}_results", f"{STACK_NAME}_broker")
