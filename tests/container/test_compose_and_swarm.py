"""The swarm stack and docker-compose.yml: pictures are answered, stages scale, killed containers lose no request.

All tests but the first share one compose project; each sets the number of workers that it needs.
"""

from __future__ import annotations

import json
import subprocess
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.container.conftest import COMPOSE_SERVICES
from tests.support.environment.container_engine import ComposeProject, docker, docker_inspect, wait_until_healthy
from tests.support.environment.external_programs import require_dependency
from tests.support.environment.swarm import STACK_NAME, deploy_stack, start_swarm, wait_for_replicas
from tests.support.pipelines.mqtt_camera import MqttCamera
from tests.support.pipelines.processes import eventually

pytestmark = pytest.mark.slow

PICTURES = 40


def requests_by_worker(stage: str, results: list[dict[str, Any]]) -> Counter[str]:
    """How many requests each worker of a stage has done, by its host name: the id of its container."""
    hops = [hop for result in results for hop in result["time"]["stages"] if hop["stage"] == stage]
    return Counter(hop["worker"].rpartition("-")[0] for hop in hops)


def host_names(compose: ComposeProject, service: str) -> set[str]:
    return {docker_inspect(container)["Config"]["Hostname"] for container in compose.container_ids(service)}


def publish_to_ingress(port: int, certs: Path, identity: str | None) -> str:
    """Publish to the ingress of the secured broker, without or with a certificate; return what the client prints."""
    command = [str(require_dependency("mosquitto_pub")), "-h", "127.0.0.1", "-p", str(port), "-V", "5", "-q", "1"]
    command += ["-m", "{}", "-t", "sparse/local/ingress/door", "--cafile", f"{certs}/viewer/ca.crt"]
    if identity is not None:
        command += ["--cert", f"{certs}/{identity}/tls.crt", "--key", f"{certs}/{identity}/tls.key"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return result.stdout + result.stderr


def test_swarm_stack_answers_scales_and_enforces_access(image: str, photograph: Path, tmp_path: Path) -> None:
    """First, because no container of the compose project may be up when the machine leaves the swarm."""
    with start_swarm(), deploy_stack(tmp_path) as port:
        camera = MqttCamera(port, certs=tmp_path)
        try:
            camera.publish(photograph)
            assert {"car", "bicycle", "dog"} <= {found["label"] for found in camera.next_result(120)["objects"]}

            docker("service", "scale", "--detach", f"{STACK_NAME}_body=2")
            wait_for_replicas("body", 2)
            for _ in range(20):
                camera.publish(photograph)
            assert len(requests_by_worker("body", camera.next_results(20))) == 2

            docker("service", "scale", "--detach", f"{STACK_NAME}_body=1")
            wait_for_replicas("body", 1)
        finally:
            camera.close()
        assert "Error" in publish_to_ingress(port, tmp_path, None), "a client without a certificate was accepted"
        assert "Not authorized" in publish_to_ingress(port, tmp_path, "viewer"), "a viewer may publish to the ingress"
        # A stage whose site no node has stays pending.
        docker("service", "update", "--detach", "--constraint-add", "node.labels.site == cloud", f"{STACK_NAME}_tail")
        command = ("service", "ps", "--no-trunc", f"{STACK_NAME}_tail")
        eventually("a task without a node", lambda: "no suitable node" in docker(*command))


def test_published_photograph_returns_its_detections(camera: MqttCamera, photograph: Path) -> None:
    camera.publish(photograph)
    result = camera.next_result()
    assert result["picture"] == {"width": 768, "height": 576}
    objects = {found["label"]: found for found in result["objects"]}
    assert {"car", "bicycle", "dog"} <= objects.keys()
    left, top, width, height = objects["dog"]["box"]
    assert (left + width / 2, top + height / 2) == pytest.approx((220, 376), abs=40)


def test_compose_file_with_telemetry_is_valid(compose: ComposeProject) -> None:
    """The images of the telemetry profile are not started here."""
    config = yaml.safe_load(compose("--profile", "telemetry", "config"))
    assert set(config["services"]) == {*COMPOSE_SERVICES, "recorder", "influxdb", "chronograf", "grafana"}


def test_containers_are_read_only_and_unprivileged(compose: ComposeProject) -> None:
    for service in COMPOSE_SERVICES:
        for container in compose.container_ids(service):
            state = docker_inspect(container)
            limits = state["HostConfig"]
            assert limits["ReadonlyRootfs"], service
            assert limits["CapDrop"] == ["ALL"], service
            assert limits["SecurityOpt"] == ["no-new-privileges:true"], service
            assert limits["Memory"] > 0, service
            assert state["Config"]["User"] not in ("", "0", "root"), service


def test_three_replicas_of_a_stage_share_the_requests(
    compose: ComposeProject, camera: MqttCamera, photograph: Path
) -> None:
    compose.up(*COMPOSE_SERVICES, scale={"body": 3})
    assert len(host_names(compose, "body")) == 3
    for _ in range(PICTURES):
        camera.publish(photograph)
    assert set(requests_by_worker("body", camera.next_results(PICTURES))) == host_names(compose, "body")
    with urllib.request.urlopen(f"http://127.0.0.1:{compose.monitor_port}/stages", timeout=60) as response:
        stages = json.load(response)["street"]
    assert {name: stages[name]["workers"] for name in stages} == {"head": 1, "body": 3, "tail": 1}
    assert stages["body"]["queue_ms"] >= 0


def test_killed_container_loses_and_duplicates_no_request(
    compose: ComposeProject, camera: MqttCamera, photograph: Path
) -> None:
    compose.up(*COMPOSE_SERVICES, scale={"body": 3})
    victim = compose.container_ids("body")[0]
    docker("pause", victim)  # it is then sure to hold tasks when it is killed
    for _ in range(PICTURES):
        camera.publish(photograph)
    results = camera.next_results(5)
    docker("kill", victim)
    results += camera.next_results(PICTURES - 5)
    first = min(result["index"] for result in results)
    assert sorted(result["index"] for result in results) == list(range(first, first + PICTURES))
    assert len({result["request"] for result in results}) == PICTURES
    assert all("error" not in result for result in results)
    assert docker_inspect(victim)["State"]["ExitCode"] == 137
    assert max(result["attempts"] for result in results) > 1, (
        "the killed container held no task: the test shows nothing"
    )
    camera.publish(photograph)
    assert camera.next_result()["index"] == first + PICTURES, "a request was answered twice"


def test_stopped_container_finishes_its_tasks(compose: ComposeProject, camera: MqttCamera, photograph: Path) -> None:
    compose.up(*COMPOSE_SERVICES, scale={"body": 3})
    stopped = compose.container_ids("body")[0]
    for _ in range(PICTURES):
        camera.publish(photograph)
    results = camera.next_results(5)
    docker("stop", stopped)
    results += camera.next_results(PICTURES - 5)
    assert docker_inspect(stopped)["State"]["ExitCode"] == 0, "killed after the engine's grace period"
    assert {result["attempts"] for result in results} == {1}


def test_stage_scaled_to_one_uses_the_remaining_worker(
    compose: ComposeProject, camera: MqttCamera, photograph: Path
) -> None:
    compose.up(*COMPOSE_SERVICES, scale={"body": 3})
    compose.up(*COMPOSE_SERVICES, scale={"body": 1})
    (remaining,) = host_names(compose, "body")
    for _ in range(5):
        camera.publish(photograph)
    assert requests_by_worker("body", camera.next_results(5)) == {remaining: 5}


def test_worker_is_unhealthy_without_its_broker(compose: ComposeProject) -> None:
    body = compose.container_ids("body")[0]
    (broker,) = compose.container_ids("broker")
    docker("stop", "--time", "5", broker)
    try:
        eventually("an unhealthy worker", lambda: docker_inspect(body)["State"]["Health"]["Status"] == "unhealthy")
    finally:
        docker("start", broker)
    wait_until_healthy([broker, body])
