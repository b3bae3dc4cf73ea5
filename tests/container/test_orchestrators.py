"""A swarm, then docker-compose.yml: a picture is answered, stages scale, a container that dies costs nothing.

All but the first use one project that is up; each says first how many workers it needs.
"""

from __future__ import annotations

import json
import subprocess
import time
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

PICTURES = 40


def workers_of(stage: str, answers: list[dict[str, Any]]) -> Counter[str]:
    """How many of these requests each worker of a stage did, by the name of its host: its container's id."""
    hops = [hop for answer in answers for hop in answer["time"]["stages"] if hop["stage"] == stage]
    return Counter(hop["worker"].rpartition("-")[0] for hop in hops)


def hosts_of(compose: ComposeProject, service: str) -> set[str]:
    return {docker_inspect(each)["Config"]["Hostname"] for each in compose.container_ids(service)}


def knock(port: int, certs: Path, identity: str | None) -> str:
    """What somebody is told who publishes to the ingress of the locked broker."""
    line = ["-h", "127.0.0.1", "-p", str(port), "-V", "5", "-q", "1", "-m", "{}", "-t", "sparse/local/ingress/door"]
    line += ["--cafile", f"{certs}/viewer/ca.crt"]
    if identity is not None:
        line += ["--cert", f"{certs}/{identity}/tls.crt", "--key", f"{certs}/{identity}/tls.key"]
    done = subprocess.run(
        [require_dependency("mosquitto_pub"), *line], capture_output=True, text=True, timeout=30, check=False
    )
    return done.stdout + done.stderr


def test_the_stack_on_a_swarm_answers_a_picture_scales_and_leaves_nothing(
    image: str, photograph: Path, tmp_path: Path
) -> None:
    """Of deploy/swarm, on a swarm of this machine. First, as it must be over when the compose project is up."""
    assert image
    with start_swarm(), deploy_stack(tmp_path) as port:
        door = MqttCamera(port, certs=tmp_path)
        try:
            door.publish(photograph)
            assert {"car", "bicycle", "dog"} <= {each["label"] for each in door.next_result(90)["objects"]}

            docker("service", "scale", "--detach", f"{STACK_NAME}_body=2")
            wait_for_replicas("body", 2)
            for _ in range(20):
                door.publish(photograph)
            assert len(workers_of("body", door.next_results(20))) == 2

            docker("service", "scale", "--detach", f"{STACK_NAME}_body=1")
            wait_for_replicas("body", 1)
        finally:
            door.close()
        assert "Error" in knock(port, tmp_path, None), "nobody comes in without a certificate"
        assert "Not authorized" in knock(port, tmp_path, "viewer"), "or does what is not theirs"
        # A site that no node has gets no task.
        docker("service", "update", "--detach", "--constraint-add", "node.labels.site == cloud", f"{STACK_NAME}_tail")
        listed = ("service", "ps", "--no-trunc", f"{STACK_NAME}_tail")
        eventually("a task without a node", lambda: "no suitable node" in docker(*listed))


def test_a_photograph_published_from_outside_gives_its_detections(door: MqttCamera, photograph: Path) -> None:
    door.publish(photograph)
    answer = door.next_result()
    assert answer["picture"] == {"width": 768, "height": 576}
    found = {each["label"]: each for each in answer["objects"]}
    assert {"car", "bicycle", "dog"} <= found.keys()
    left, top, width, height = found["dog"]["box"]
    assert (left + width / 2, top + height / 2) == pytest.approx((220, 376), abs=40)


def test_the_file_as_a_whole_is_one_that_the_engine_takes(compose: ComposeProject) -> None:
    """Telemetry included, whose images are not started here."""
    read = yaml.safe_load(compose("--profile", "telemetry", "config"))
    assert set(read["services"]) == {*COMPOSE_SERVICES, "recorder", "influxdb", "chronograf", "grafana"}


def test_no_container_may_write_its_files_or_become_more_than_it_is(compose: ComposeProject) -> None:
    for service in COMPOSE_SERVICES:
        for each in compose.container_ids(service):
            seen = docker_inspect(each)
            limits = seen["HostConfig"]
            assert limits["ReadonlyRootfs"], service
            assert limits["CapDrop"] == ["ALL"], service
            assert limits["SecurityOpt"] == ["no-new-privileges:true"], service
            assert limits["Memory"] > 0, service
            assert seen["Config"]["User"] not in ("", "0", "root"), service


def test_a_stage_that_is_scaled_to_three_is_worked_by_three(
    compose: ComposeProject, door: MqttCamera, photograph: Path
) -> None:
    compose.up(*COMPOSE_SERVICES, scale={"body": 3})
    assert len(hosts_of(compose, "body")) == 3
    for _ in range(PICTURES):
        door.publish(photograph)
    assert set(workers_of("body", door.next_results(PICTURES))) == hosts_of(compose, "body")
    with urllib.request.urlopen(f"http://127.0.0.1:{compose.monitor_port}/stages", timeout=10) as answer:
        stages = json.load(answer)["street"]
    assert {name: stages[name]["workers"] for name in stages} == {"head": 1, "body": 3, "tail": 1}
    assert stages["body"]["queue_ms"] >= 0


def test_a_container_that_is_killed_under_load_costs_no_picture_and_doubles_none(
    compose: ComposeProject, door: MqttCamera, photograph: Path
) -> None:
    compose.up(*COMPOSE_SERVICES, scale={"body": 3})
    victim = compose.container_ids("body")[0]
    docker("pause", victim)  # so that it is sure to have tasks in hand when it dies: it takes them, and no more
    for _ in range(PICTURES):
        door.publish(photograph)
    answers = door.next_results(5)
    docker("kill", victim)  # which lets a paused container run, after the signal
    answers += door.next_results(PICTURES - 5)
    first = min(answer["index"] for answer in answers)
    assert sorted(answer["index"] for answer in answers) == list(range(first, first + PICTURES))
    assert len({answer["request"] for answer in answers}) == PICTURES
    assert all("error" not in answer for answer in answers)
    assert docker_inspect(victim)["State"]["ExitCode"] == 137
    assert max(answer["attempts"] for answer in answers) > 1, "it held nothing when it died"
    assert door.is_silent()


def test_a_container_that_is_stopped_finishes_what_it_holds(
    compose: ComposeProject, door: MqttCamera, photograph: Path
) -> None:
    compose.up(*COMPOSE_SERVICES, scale={"body": 3})
    leaver = compose.container_ids("body")[0]
    for _ in range(PICTURES):
        door.publish(photograph)
    answers = door.next_results(5)
    begun_s = time.monotonic()
    docker("stop", leaver)
    stopped_s = time.monotonic() - begun_s
    answers += door.next_results(PICTURES - 5)
    assert docker_inspect(leaver)["State"]["ExitCode"] == 0
    assert stopped_s < 25, "the engine waits for 30 s, then it kills"
    assert {answer["attempts"] for answer in answers} == {1}


def test_a_stage_that_is_scaled_back_to_one_is_worked_by_one(
    compose: ComposeProject, door: MqttCamera, photograph: Path
) -> None:
    compose.up(*COMPOSE_SERVICES, scale={"body": 3})
    compose.up(*COMPOSE_SERVICES, scale={"body": 1})
    (left,) = hosts_of(compose, "body")
    for _ in range(5):
        door.publish(photograph)
    assert workers_of("body", door.next_results(5)) == {left: 5}
    assert door.is_silent()


def test_a_worker_is_unhealthy_while_its_broker_is_away(compose: ComposeProject) -> None:
    body = compose.container_ids("body")[0]
    (broker,) = compose.container_ids("broker")
    docker("stop", "--time", "5", broker)
    try:
        end_s = time.monotonic() + 90
        while docker_inspect(body)["State"]["Health"]["Status"] != "unhealthy":
            assert time.monotonic() < end_s
            time.sleep(1)
    finally:
        docker("start", broker)
    wait_until_healthy([broker, body])
