"""deploy/swarm/stack.yml on a swarm of this one machine: locked, it comes up, answers, scales, and goes again."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from brokers.pipeline import load_pipeline
from tests.support.checkout import ROOT
from tests.support.door import Door
from tests.support.engine import docker, docker_with
from tests.support.locks import certs_for
from tests.support.parts import missing, need
from tests.support.ports import free_port

STACK = "sparse-test"
OURS = ("broker", "gateway", "head", "body", "tail", "monitor")
IDENTITIES = ("broker.local", "street.source", "street.head", "street.body", "street.tail", "monitor")


@pytest.fixture(scope="module", name="swarm")
def _swarm(image: str) -> Iterator[None]:
    """This machine as a swarm, and as the site `cloudlet`."""
    assert image
    if docker("info", "--format", "{{.Swarm.LocalNodeState}}").strip() != "inactive":
        missing("this machine is part of a swarm, which a test must leave alone: the swarm stack is left out")
    docker("swarm", "init", "--advertise-addr", "127.0.0.1", "--listen-addr", "127.0.0.1")
    try:
        docker("node", "update", "--label-add", "site=cloudlet", docker("node", "ls", "--quiet").strip())
        yield
    finally:
        docker("swarm", "leave", "--force")


@pytest.fixture(scope="module", name="certs")
def _certs(swarm: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates for all of the pipeline, and those of the stack as secrets of the swarm."""
    certs = certs_for(tmp_path_factory.mktemp("swarm") / "certs", load_pipeline(ROOT / "deploy/locked/street.toml"))
    for identity in IDENTITIES:
        for name in ("ca.crt", "tls.crt", "tls.key"):
            docker("secret", "create", f"{identity}.{name}", str(certs / identity / name))
    return certs


@pytest.fixture(scope="module", name="port")
def _port(certs: Path) -> Iterator[int]:
    """The stack, deployed; the port of its broker."""
    assert certs
    port = free_port()
    environment = {"SPARSE_PORT": str(port)}
    # The image is on this machine only: there is no registry to ask for it.
    deploy = ("stack", "deploy", "--resolve-image", "never", "--compose-file", "deploy/swarm/stack.yml", STACK)
    docker_with(environment, *deploy)
    try:
        for service in OURS:
            await_replicas(service, 1)
        yield port
    finally:
        docker("stack", "rm", STACK)
        await_none()


def running(service: str) -> list[str]:
    """The tasks of a service that run, which those are that are healthy."""
    what = ("--filter", "desired-state=running", "--format", "{{.ID}} {{.CurrentState}}")
    lines = docker("service", "ps", *what, f"{STACK}_{service}").splitlines()
    return [line.split()[0] for line in lines if line.split()[1] == "Running"]


def await_replicas(service: str, count: int, timeout_s: float = 180) -> None:
    end_s = time.monotonic() + timeout_s
    while len(running(service)) != count:
        assert time.monotonic() < end_s, docker("service", "ps", "--no-trunc", f"{STACK}_{service}")
        time.sleep(0.5)


def await_none(timeout_s: float = 120) -> None:
    end_s = time.monotonic() + timeout_s
    while docker("ps", "--all", "--quiet", "--filter", f"label=com.docker.stack.namespace={STACK}").strip():
        assert time.monotonic() < end_s, "containers of the stack are left"
        time.sleep(0.5)
    docker("volume", "rm", "--force", f"{STACK}_results", f"{STACK}_broker")


def test_the_stack_answers_a_picture_and_a_scaled_service_is_used(port: int, certs: Path, photograph: Path) -> None:
    door = Door(port, certs=certs)
    try:
        door.show(photograph)
        assert {"car", "bicycle", "dog"} <= {each["label"] for each in door.answer(90)["objects"]}

        docker("service", "scale", "--detach", f"{STACK}_body=2")
        await_replicas("body", 2)
        for _ in range(20):
            door.show(photograph)
        answers = door.answers(20)
        assert len({hop["worker"] for each in answers for hop in each["time"]["stages"] if hop["stage"] == "body"}) == 2

        docker("service", "scale", "--detach", f"{STACK}_body=1")
        await_replicas("body", 1)
    finally:
        door.close()


def test_nobody_comes_in_without_a_certificate_or_writes_what_is_not_theirs(port: int, certs: Path) -> None:
    line = [str(need("mosquitto_pub")), "-h", "127.0.0.1", "-p", str(port), "-V", "5", "-q", "1", "-m", "{}"]
    line += ["--cafile", f"{certs}/viewer/ca.crt", "-t", "sparse/local/ingress/door"]
    stranger = subprocess.run(line, capture_output=True, timeout=30, check=False)
    assert stranger.returncode != 0
    viewer = ["--cert", f"{certs}/viewer/tls.crt", "--key", f"{certs}/viewer/tls.key"]
    denied = subprocess.run([*line, *viewer], capture_output=True, text=True, timeout=30, check=False)
    assert "Not authorized" in denied.stdout + denied.stderr


def test_a_site_that_no_node_has_gets_no_task(port: int) -> None:
    assert port
    docker("service", "update", "--detach", "--constraint-add", "node.labels.site == cloud", f"{STACK}_tail")
    end_s = time.monotonic() + 60
    while "no suitable node" not in docker("service", "ps", "--no-trunc", f"{STACK}_tail"):
        assert time.monotonic() < end_s
        time.sleep(0.5)
